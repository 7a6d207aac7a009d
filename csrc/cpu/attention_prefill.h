// Many queries of a row: matrix products over blocks of keys. Part of attention_kernel.h, which includes it.

// c[i][j] += sum over k < depth of a[i][k] b[k][j]: a with rows of lda lanes, b with rows of ldb lanes.
template <int vectors, class E>
DRLLM_INLINE void product(Floats (&c)[kRows][kVectors], const E* a, int64_t lda, const float* b, int64_t ldb,
                          int64_t depth, int pack) {
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = load(b + k * ldb + j * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < vectors; ++j) c[i][j] = dot(c[i][j], a + (i * lda + k) * pack, right[j]);
  }
}

template <class E>
DRLLM_INLINE void product_of(int vectors, Floats (&c)[kRows][kVectors], const E* a, int64_t lda, const float* b,
                             int64_t ldb, int64_t depth, int pack) {
  if (vectors == 1) return product<1>(c, a, lda, b, ldb, depth, pack);
  if (kVectors == 2 || vectors == 2) return product<2>(c, a, lda, b, ldb, depth, pack);
  if (vectors == 3) return product<3>(c, a, lda, b, ldb, depth, pack);
  product<kVectors>(c, a, lda, b, ldb, depth, pack);
}

// One lane of an operand: as many neighbours of a row as it holds, zeros past the row's end.
template <class T>
DRLLM_INLINE float lane_of(const T* row, int64_t at, int64_t size) {
  if constexpr (Operand<T>::pack == 1) {
    return at < size ? widen(row[at]) : 0.0f;
  } else {
    uint32_t bits = 0;
    for (int i = 0; i < 2; ++i)
      if (at * 2 + i < size) bits |= static_cast<uint32_t>(row[at * 2 + i].bits) << (16 * i);
    return from_bits(bits);
  }
}

DRLLM_INLINE Floats lanes_at(const float* row) { return load(row); }
#if defined(DRLLM_DOT_BF16)
DRLLM_INLINE Floats lanes_at(const BFloat16* row) { return load_bits<Floats>(row); }
#else
DRLLM_INLINE Floats lanes_at(const BFloat16* row) { return load(row); }
#endif

// A block of keys, transposed: to[lane of D][key]. Keys past `count` are zeros.
template <class T>
DRLLM_INLINE void pack_keys(float* to, const T* keys, int64_t stride, int64_t count, int64_t dim) {
  constexpr int pack = Operand<T>::pack;
  const int64_t depth = (dim + pack - 1) / pack;
  for (int64_t key = 0; key < kKeys; key += kLanes)
    for (int64_t k = 0; k < depth; k += kLanes) {
      Floats block[kLanes] = {};
      for (int i = 0; i < kLanes; ++i) {
        const T* row = keys + (key + i) * stride;
        if (key + i >= count) block[i] = Floats{};
        else if ((k + kLanes) * pack <= dim) block[i] = lanes_at(row + k * pack);
        else
          for (int lane = 0; lane < kLanes; ++lane) block[i][lane] = lane_of(row, k + lane, dim);
      }
      transpose(block);
      for (int i = 0; i < kLanes && k + i < depth; ++i) store(to + (k + i) * kKeys + key, block[i]);
    }
}

// A block of values, as they lie but for neighbours of a column side by side where lanes hold two: to[lane of keys][D_v].
template <class T>
DRLLM_INLINE void pack_values(float* to, int64_t width, const T* values, int64_t stride, int64_t count, int64_t dim) {
  constexpr int pack = Operand<T>::pack;
  const int64_t dense = dim / kLanes * kLanes;
  for (int64_t key = 0; key < kKeys; key += pack) {
    float* row = to + key / pack * width;
    if constexpr (pack == 1) {
      const T* from = values + key * stride;
      for (int64_t d = 0; d < width; d += kLanes) {
        Floats lanes{};
        if (key < count && d < dense) lanes = load(from + d);
        else if (key < count)
          for (int i = 0; i < kLanes && d + i < dim; ++i) lanes[i] = widen(from[d + i]);
        store(row + d, lanes);
      }
    } else {
      for (int64_t d = 0; d < width; d += kLanes) {
        Words lanes{};
        for (int half = 0; half < 2 && key + half < count; ++half) {
          const T* from = values + (key + half) * stride;
          Words bits{};
          if (d < dense) bits = __builtin_convertvector(load_bits<Halves>(from + d), Words);
          else
            for (int i = 0; i < kLanes && d + i < dim; ++i) bits[i] = from[d + i].bits;
          lanes |= bits << (16 * half);
        }
        store(row + d, (Floats)lanes);
      }
    }
  }
}

// How much scratch a task of `rows` queries needs, in floats.
DRLLM_INLINE int64_t prefill_scratch_size(const Attention& a, int64_t rows) {
  const int64_t padded = up(rows, kRows), depth = up(a.dim, kLanes), width = up(a.dim_v, kLanes);
  return padded * (depth + width + 2) + kKeys * (depth + width) + kRows * kKeys * 2 + kLanes;
}

// Many queries: the keys of a block are transposed and the values packed once for all of them.
template <class T>
DRLLM_INLINE void prefill_task(const Attention& a, const AttentionTask& task, float* scratch) {
  using E = typename Operand<T>::Type;
  constexpr int pack = Operand<T>::pack;
  const int64_t group = a.group, rows = task.tokens * group, padded = up(rows, kRows);
  const int64_t depth = (a.dim + pack - 1) / pack, width = up(a.dim_v, kLanes);
  const int64_t lda = up(a.dim, kLanes) / pack;
  float* acc = scratch;                   // [padded, width]
  float* keys = acc + padded * width;     // [depth, kKeys]
  float* values = keys + kKeys * up(a.dim, kLanes);  // [kKeys / pack, width]
  float* weights = values + kKeys * width;           // [kRows, kKeys]
  float* m = weights + kRows * kKeys;                // [padded]
  float* l = m + padded;                             // [padded]
  E* queries = reinterpret_cast<E*>(l + padded);     // [padded, lda * pack]
  E* operand = reinterpret_cast<E*>(queries + padded * lda * pack);  // [kRows, kKeys], the weights as E

  for (int64_t i = 0; i < padded * width; ++i) acc[i] = 0;
  for (int64_t r = 0; r < padded; ++r) {
    m[r] = -kInfinity;
    l[r] = 0;
    const int64_t real = smaller(r, rows - 1), token = task.token + real / group;
    const int64_t head = task.kv_head * group + real % group;
    const T* from = static_cast<const T*>(a.query) + token * a.query_token + head * a.query_head;
    float* to = reinterpret_cast<float*>(queries) + r * lda;
    for (int64_t k = 0; k < lda; ++k) to[k] = lane_of(from, k, a.dim);
  }

  const T* all_keys = static_cast<const T*>(a.keys) + task.kv_head * a.key_head + task.start * a.key_token;
  const T* all_values = static_cast<const T*>(a.values) + task.kv_head * a.value_head + task.start * a.value_token;
  Ints lane_number;
  for (int i = 0; i < kLanes; ++i) lane_number[i] = i;

  const int64_t first = bigger(task.first_key, task.position - a.window + 1);
  for (int64_t block = first; block < task.last_key; block += kKeys) {
    const int64_t count = smaller(kKeys, task.last_key - block);
    pack_keys(keys, all_keys + block * a.key_token, a.key_token, count, a.dim);
    pack_values(values, width, all_values + block * a.value_token, a.value_token, count, a.dim_v);

    for (int64_t r = 0; r < padded; r += kRows) {
      const int64_t newest = task.position + smaller(r + kRows - 1, rows - 1) / group;  // position of the last query
      const int64_t oldest = task.position + r / group - a.window + 1;                  // key that the first one sees
      if (newest < block || oldest >= block + kKeys) continue;
      const int64_t visible = smaller(kKeys, newest + 1 - block);
      const int vectors = static_cast<int>((visible + kLanes - 1) / kLanes);

      for (int first_vector = 0; first_vector < vectors; first_vector += kVectors) {
        const int here = static_cast<int>(smaller(kVectors, vectors - first_vector));
        Floats c[kRows][kVectors] = {};
        product_of(here, c, queries + r * lda * pack, lda, keys + first_vector * kLanes, kKeys, depth, pack);
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kVectors; ++j)
            if (j < here) store(weights + i * kKeys + (first_vector + j) * kLanes, c[i][j]);
      }

      float rescale[kRows];
      for (int i = 0; i < kRows; ++i) {
        const int64_t position = task.position + smaller(r + i, rows - 1) / group;
        const int32_t end = static_cast<int32_t>(smaller(position - block, kKeys));
        const int32_t begin = static_cast<int32_t>(bigger(position - a.window - block, -1));
        float* row = weights + i * kKeys;
        Floats top = broadcast(-kInfinity);
        for (int j = 0; j < vectors; ++j) {
          const Ints key = lane_number + j * kLanes;
          const Floats s = scores_of(load(row + j * kLanes), a);
          const Floats seen = (key <= end) & (key > begin) ? s : broadcast(-kInfinity);
          store(row + j * kLanes, seen);
          top = larger(top, seen);
        }
        const float before = m[r + i], block_top = maximum(top), after = before > block_top ? before : block_top;
        const float safe = finite_or_zero(after);
        rescale[i] = exp2(broadcast(before - safe))[0];
        Floats added{};
        for (int j = 0; j < vectors; ++j) {
          const Floats p = exp2(load(row + j * kLanes) - safe);
          added += p;
          if constexpr (pack == 1) store(row + j * kLanes, p);
          else store(operand + i * kKeys + j * kLanes, p);
        }
        m[r + i] = after;
        l[r + i] = l[r + i] * rescale[i] + sum(added);
      }

      const E* left = operand;
      if constexpr (pack == 1) left = weights;
      const int64_t lanes = (visible + pack - 1) / pack;
      for (int64_t d = 0; d < width; d += kVectors * kLanes) {
        const int here = static_cast<int>(smaller(kVectors, (width - d) / kLanes));
        Floats c[kRows][kVectors] = {};
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kVectors; ++j)
            if (j < here) c[i][j] = load(acc + (r + i) * width + d + j * kLanes) * rescale[i];
        product_of(here, c, left, kKeys / pack, values + d, width, lanes, pack);
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kVectors; ++j)
            if (j < here) store(acc + (r + i) * width + d + j * kLanes, c[i][j]);
      }
    }
  }

  T* out = static_cast<T*>(a.out);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = task.kv_head * group + r % group, token = task.token + r / group;
    finish(out + (token * a.heads + head) * a.dim_v, acc + r * width, m[r], l[r], a.sinks ? a.sinks + head : nullptr,
           a.dim_v);
  }
}
