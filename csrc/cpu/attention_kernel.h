// Attention with online softmax (Milakov and Gimelshein, arXiv 1805.02867), for attention.cpp. Included once for each
// instruction set, without include guard.
//
// Scores are kept in units of log 2, so that the softmax takes powers of 2. For each query: m, the largest score so far;
// l, the sum of 2^(s - m); and acc, the values weighted so.

#if defined(DRLLM_DOT_BF16)
// bf16 is multiplied as it is, two products at a time, into fp32.
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

DRLLM_INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
DRLLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DRLLM_INLINE int64_t bigger(int64_t a, int64_t b) { return a > b ? a : b; }

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

#include "attention_decode.h"
#include "attention_prefill.h"

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
