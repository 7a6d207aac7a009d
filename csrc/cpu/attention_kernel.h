// Attention with online softmax (Milakov and Gimelshein, arXiv 1805.02867), for attention.cpp. Included once for each
// instruction set, without include guard.
//
// Scores are kept in units of log 2, so that the softmax takes powers of 2. For each query: m, the largest score so far;
// l, the sum of 2^(s - m); and acc, the values weighted so.

#if defined(DRLLM_DOT_BF16)
// bf16 is multiplied as it is, two products at a time, into fp32.
typedef __m512bh Pairs;
DRLLM_INLINE Floats dot(Floats to, const BFloat16* a, Floats b) {
  uint32_t pair;
  __builtin_memcpy(&pair, a, sizeof pair);
  return (Floats)_mm512_dpbf16_ps((__m512)to, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)), (__m512bh)b);
}
#endif
DRLLM_INLINE Floats dot(Floats to, const float* a, Floats b) { return to + *a * b; }

// What the operands of the matrix products hold: how many elements a lane, and of which type.
template <class T>
struct Operand {
  using Type = float;
  static constexpr int pack = 1;
};
#if defined(DRLLM_DOT_BF16)
template <>
struct Operand<BFloat16> {
  using Type = BFloat16;
  static constexpr int pack = 2;
};
#endif

constexpr int kRows = 6, kVectors = kLanes == 16 ? 4 : 2;  // of a product's accumulators: 24 of 32 registers, 12 of 16
constexpr int kKeys = 64;                                  // of a block

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

DRLLM_INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
DRLLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DRLLM_INLINE int64_t bigger(int64_t a, int64_t b) { return a > b ? a : b; }

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

DRLLM_INLINE Floats scores_of(Floats products, const Attention& a) {
  const Floats scores = products * a.scale;
  return a.softcap == 0 ? scores * kLog2e : tanh(scores / a.softcap) * (a.softcap * kLog2e);
}

// What is taken off the scores: the largest, or nothing where all so far are -inf, which less itself would be NaN.
DRLLM_INLINE float finite_or_zero(float top) { return top == -kInfinity ? 0 : top; }

// acc / l, with the head's sink; out has room for dim elements.
template <class T>
DRLLM_INLINE void finish(T* out, const float* acc, float m, float l, const float* sink, int64_t dim) {
  float weight = 1;
  if (sink) {
    const float s = *sink * kLog2e, top = m > s ? m : s;
    weight = exp2(broadcast(m - top))[0];
    l = l * weight + exp2(broadcast(s - top))[0];
  }
  const float factor = weight / l;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(acc + d) * factor);
  if (d == dim) return;
  T tail[kLanes];
  float lanes[kLanes] = {};
  for (int64_t i = d; i < dim; ++i) lanes[i - d] = acc[i];
  store(tail, load(lanes) * factor);
  for (int64_t i = d; i < dim; ++i) out[i] = tail[i - d];
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

// Whether one query a head can be done by decode_task, which reads whole vectors of keys and values.
inline bool decodes(const Attention& a) { return a.dim % kLanes == 0 && a.dim_v % kLanes == 0; }

template <class T>
DRLLM_INLINE void run_task(const Attention& a, const AttentionTask& task, float* scratch) {
  constexpr int pack = Operand<T>::pack;
  if (task.tokens > 1 || !decodes(a)) prefill_task<T>(a, task, scratch);
  else if (pack > 1 && a.dim % (pack * kLanes) == 0) decode_task<pack, T>(a, task, scratch);
  else decode_task<1, T>(a, task, scratch);
}

// The parts of one row's keys, [parts, group, D_v + 2], put together in their order.
template <class T>
DRLLM_INLINE void join_parts(const Attention& a, const AttentionTask& task, float* partial, int64_t parts) {
  const int64_t size = a.dim_v + 2;
  for (int64_t h = 0; h < a.group; ++h) {
    float* to = partial + h * size;
    for (int64_t part = 1; part < parts; ++part) {
      const float* from = to + part * a.group * size;
      const float top = to[a.dim_v] > from[a.dim_v] ? to[a.dim_v] : from[a.dim_v];
      const float safe = finite_or_zero(top);
      const float mine = exp2(broadcast(to[a.dim_v] - safe))[0], theirs = exp2(broadcast(from[a.dim_v] - safe))[0];
      for (int64_t d = 0; d < a.dim_v; ++d) to[d] = to[d] * mine + from[d] * theirs;
      to[a.dim_v] = top;
      to[a.dim_v + 1] = to[a.dim_v + 1] * mine + from[a.dim_v + 1] * theirs;
    }
    const int64_t head = task.kv_head * a.group + h;
    finish(static_cast<T*>(a.out) + (task.token * a.heads + head) * a.dim_v, to, to[a.dim_v], to[a.dim_v + 1],
           a.sinks ? a.sinks + head : nullptr, a.dim_v);
  }
}

inline int64_t scratch_size(const Attention& a, int64_t tokens) {
  const int64_t decode = kHeads * (a.dim + a.dim_v + kKeys);
  return bigger(decode, prefill_scratch_size(a, tokens * a.group));
}

inline void run_float(const Attention& a, const AttentionTask& task, float* scratch) {
  run_task<float>(a, task, scratch);
}
inline void run_bfloat16(const Attention& a, const AttentionTask& task, float* scratch) {
  run_task<BFloat16>(a, task, scratch);
}
inline void join_float(const Attention& a, const AttentionTask& task, float* partial, int64_t parts) {
  join_parts<float>(a, task, partial, parts);
}
inline void join_bfloat16(const Attention& a, const AttentionTask& task, float* partial, int64_t parts) {
  join_parts<BFloat16>(a, task, partial, parts);
}
