// Vectors of floats for the instruction set that the including file has chosen, through the vector extensions of GCC and
// Clang. No include guard: for_each_isa.h includes it once for each instruction set, inside a namespace of its own.

constexpr int kLanes = DRLLM_LANES;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

constexpr float kInfinity = __builtin_inff();

DRLLM_INLINE Floats broadcast(float x) { return x - Floats{}; }

template <class Vector, class Element>
DRLLM_INLINE Vector load_bits(const Element* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector, class Element>
DRLLM_INLINE void store_bits(Element* to, Vector v) {
  __builtin_memcpy(to, &v, sizeof v);
}

DRLLM_INLINE Floats load(const float* from) { return load_bits<Floats>(from); }
DRLLM_INLINE Floats load(const BFloat16* from) {
  return (Floats)(__builtin_convertvector(load_bits<Halves>(from), Words) << 16);
}
DRLLM_INLINE Floats load(const Float16* from) {
#if DRLLM_LANES == 16
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_bits<Halves>(from));
#elif DRLLM_LANES == 8
  return (Floats)_mm256_cvtph_ps((__m128i)load_bits<Halves>(from));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(from[i]);
  return v;
#endif
}

DRLLM_INLINE void store(float* to, Floats v) { store_bits(to, v); }
DRLLM_INLINE void store(BFloat16* to, Floats v) {  // to the nearest, ties to even; a NaN stays one
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_bits(to, __builtin_convertvector((Words)(v == v ? rounded : (bits >> 16) | 0x40), Halves));
}

DRLLM_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

DRLLM_INLINE float sum(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

DRLLM_INLINE float maximum(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// 2^x within 2 ulp for x <= 127, 0 below -126, and NaN of NaN. Cody-Waite: 2^x = 2^n 2^f, |f| <= 1/2, and the Taylor series of 2^f,
// whose first term left out is (f ln 2)^7 / 7! < 1.2e-7 / 2.
DRLLM_INLINE Floats exp2(Floats x) {
  const Floats clamped = larger(broadcast(-126.0f), x);  // in this order a NaN stays
  const Floats shifted = clamped + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, which is then in the low bits
  const Floats f = clamped - (shifted - 12582912.0f);
  Floats power = broadcast(1.5403530393e-4f);
  power = power * f + 1.3333558146e-3f;
  power = power * f + 9.6181291076e-3f;
  power = power * f + 5.5504108665e-2f;
  power = power * f + 2.4022650696e-1f;
  power = power * f + 6.9314718056e-1f;
  power = power * f + 1.0f;
  const Floats result = (Floats)((Ints)power + ((Ints)shifted << 23));
  return x < -126.0f ? Floats{} : result;
}

constexpr float kLog2e = 1.4426950408889634f;

DRLLM_INLINE Floats tanh(Floats x) {  // 1 - 2 / (e^2x + 1), odd
  const Floats magnitude = x < 0.0f ? -x : x;
  const Floats capped = magnitude < 20.0f ? magnitude : broadcast(20.0f);
  const Floats result = 1.0f - 2.0f / (exp2(capped * (2 * kLog2e)) + 1.0f);
  return x != x ? x : (x < 0.0f ? -result : result);
}

// From the lanes of a and b end to end: every second one, from the first or from the second; and their low or high halves,
// interleaved.
template <int... i>
DRLLM_INLINE Floats even(Floats a, Floats b, Sequence<i...>) {
  return __builtin_shufflevector(a, b, 2 * i...);
}
template <int... i>
DRLLM_INLINE Floats odd(Floats a, Floats b, Sequence<i...>) {
  return __builtin_shufflevector(a, b, 2 * i + 1 ...);
}
template <int... i>
DRLLM_INLINE Floats low(Floats a, Floats b, Sequence<i...>) {
  return __builtin_shufflevector(a, b, (i % 2 * kLanes + i / 2)...);
}
template <int... i>
DRLLM_INLINE Floats high(Floats a, Floats b, Sequence<i...>) {
  return __builtin_shufflevector(a, b, (i % 2 * kLanes + kLanes / 2 + i / 2)...);
}
using Lanes = typename Counting<kLanes>::Type;

// Lane i of the result is the sum of the lanes of v[i]; v is overwritten.
DRLLM_INLINE Floats sums(Floats (&v)[kLanes]) {
  for (int count = kLanes; count > 1; count /= 2)
    for (int i = 0; i < count / 2; ++i)
      v[i] = even(v[2 * i], v[2 * i + 1], Lanes()) + odd(v[2 * i], v[2 * i + 1], Lanes());
  return v[0];
}

// v[i][j] becomes v[j][i]: each round interleaves the two halves, as a perfect shuffle of the rows does.
DRLLM_INLINE void transpose(Floats (&v)[kLanes]) {
  for (int count = kLanes; count > 1; count /= 2) {
    Floats next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = low(v[i], v[i + kLanes / 2], Lanes());
      next[2 * i + 1] = high(v[i], v[i + kLanes / 2], Lanes());
    }
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}
