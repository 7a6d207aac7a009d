// One query a head. Part of attention_kernel.h, which includes it.

// One query a head: keys are read where they are, and neither transposed nor packed.
constexpr int kHeads = 4;  // of a group that are done together, so that their weighted values stay in registers

// acc[h] = acc[h] * rescale[h] + sum over keys of weights[h][key] values[key], a few columns of D_v.
template <int heads, int vectors, class T>
DRLLM_INLINE void add_values(float* acc, int64_t width, const float* rescale, const float* weights, const T* values,
                             int64_t stride, int64_t count) {
  Floats c[heads][vectors];
  for (int h = 0; h < heads; ++h)
    for (int j = 0; j < vectors; ++j) c[h][j] = load(acc + h * width + j * kLanes) * rescale[h];
  for (int64_t key = 0; key < count; ++key)
    for (int j = 0; j < vectors; ++j) {
      const Floats value = load(values + key * stride + j * kLanes);
      for (int h = 0; h < heads; ++h) c[h][j] += weights[h * kKeys + key] * value;
    }
  for (int h = 0; h < heads; ++h)
    for (int j = 0; j < vectors; ++j) store(acc + h * width + j * kLanes, c[h][j]);
}

template <int heads, int pack, class T>
DRLLM_INLINE void decode_heads(const Attention& a, const AttentionTask& task, int64_t head, float* scratch) {
  const int64_t lanes = a.dim / pack, width = a.dim_v;
  float* queries = scratch;               // [heads, lanes]
  float* acc = queries + heads * lanes;   // [heads, width]
  float* scores = acc + heads * width;    // [heads, kKeys]
  float m[heads], l[heads];
  for (int h = 0; h < heads; ++h) {
    const T* from = static_cast<const T*>(a.query) + task.token * a.query_token + (head + h) * a.query_head;
    for (int64_t k = 0; k < lanes; k += kLanes) {
      if constexpr (pack == 1) store(queries + h * lanes + k, load(from + k));
      else store(queries + h * lanes + k, load_bits<Floats>(from + k * pack));
    }
    for (int64_t d = 0; d < width; ++d) acc[h * width + d] = 0;
    m[h] = -kInfinity;
    l[h] = 0;
  }
  const T* all_keys = static_cast<const T*>(a.keys) + task.kv_head * a.key_head + task.start * a.key_token;
  const T* all_values = static_cast<const T*>(a.values) + task.kv_head * a.value_head + task.start * a.value_token;
  Ints lane_number;
  for (int i = 0; i < kLanes; ++i) lane_number[i] = i;

  for (int64_t block = task.first_key; block < task.last_key; block += kKeys) {
    const int64_t count = smaller(kKeys, task.last_key - block);
    const int vectors = static_cast<int>((count + kLanes - 1) / kLanes);
    for (int j = 0; j < vectors; ++j) {
      Floats products[heads][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t key = smaller(j * kLanes + i, count - 1);  // what lies behind the last one must not be read
        const T* row = all_keys + (block + key) * a.key_token;
        Floats c[heads] = {};
        for (int64_t k = 0; k < lanes; k += kLanes) {
          if constexpr (pack == 1) {
            const Floats key_part = load(row + k);
            for (int h = 0; h < heads; ++h) c[h] += key_part * load(queries + h * lanes + k);
          } else {
#if defined(DRLLM_DOT_BF16)
            const __m512bh key_part = (__m512bh)load_bits<Floats>(row + k * pack);
            for (int h = 0; h < heads; ++h)
              c[h] = (Floats)_mm512_dpbf16_ps((__m512)c[h], key_part, (__m512bh)load(queries + h * lanes + k));
#endif
          }
        }
        for (int h = 0; h < heads; ++h) products[h][i] = c[h];
      }
      const Ints key = lane_number + j * kLanes;
      for (int h = 0; h < heads; ++h) {
        const Floats s = scores_of(sums(products[h]), a);
        store(scores + h * kKeys + j * kLanes, key < static_cast<int32_t>(count) ? s : broadcast(-kInfinity));
      }
    }
    float rescale[heads];
    for (int h = 0; h < heads; ++h) {
      float* row = scores + h * kKeys;
      Floats top = load(row);
      for (int j = 1; j < vectors; ++j) top = larger(top, load(row + j * kLanes));
      const float before = m[h], block_top = maximum(top);
      m[h] = before > block_top ? before : block_top;
      const float safe = finite_or_zero(m[h]);
      rescale[h] = exp2(broadcast(before - safe))[0];
      Floats added{};
      for (int j = 0; j < vectors; ++j) {
        const Floats p = exp2(load(row + j * kLanes) - safe);
        added += p;
        store(row + j * kLanes, p);
      }
      l[h] = l[h] * rescale[h] + sum(added);
    }
    int64_t d = 0;
    for (; d + kVectors * kLanes <= width; d += kVectors * kLanes)
      add_values<heads, kVectors>(acc + d, width, rescale, scores, all_values + block * a.value_token + d,
                                  a.value_token, count);
    for (; d < width; d += kLanes)
      add_values<heads, 1>(acc + d, width, rescale, scores, all_values + block * a.value_token + d, a.value_token,
                           count);
  }
  for (int h = 0; h < heads; ++h) {
    if (task.partial) {
      float* partial = task.partial + (head - task.kv_head * a.group + h) * (width + 2);
      for (int64_t d = 0; d < width; ++d) partial[d] = acc[h * width + d];
      partial[width] = m[h];
      partial[width + 1] = l[h];
    } else {
      finish(static_cast<T*>(a.out) + (task.token * a.heads + head + h) * width, acc + h * width, m[h], l[h],
             a.sinks ? a.sinks + head + h : nullptr, width);
    }
  }
}

template <int pack, class T>
DRLLM_INLINE void decode_task(const Attention& a, const AttentionTask& task, float* scratch) {
  int64_t head = task.kv_head * a.group;
  const int64_t end = head + a.group;
  for (; head + kHeads <= end; head += kHeads) decode_heads<kHeads, pack, T>(a, task, head, scratch);
  if (end - head == 3) decode_heads<3, pack, T>(a, task, head, scratch);
  if (end - head == 2) decode_heads<2, pack, T>(a, task, head, scratch);
  if (end - head == 1) decode_heads<1, pack, T>(a, task, head, scratch);
}
