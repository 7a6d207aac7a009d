// The router's arithmetic for router.cpp. Included once for each instruction set, without include guard.

// to[d] = the mean of `count` tokens. Sums of 64 tokens at a time: a window of thousands would lose digits otherwise.
template <class T, int vectors>
DRLLM_INLINE void mean_columns(float* to, const T* tokens, int64_t stride, int64_t count) {
  Floats total[vectors] = {};
  for (int64_t first = 0; first < count; first += 64) {
    const int64_t last = first + 64 < count ? first + 64 : count;
    Floats part[vectors] = {};
    for (int64_t t = first; t < last; ++t)
      for (int j = 0; j < vectors; ++j) part[j] += load(tokens + t * stride + j * kLanes);
    for (int j = 0; j < vectors; ++j) total[j] += part[j];
  }
  for (int j = 0; j < vectors; ++j) store(to + j * kLanes, total[j] / static_cast<float>(count));
}

// to [up(d, kLanes)], zeros past d.
template <class T>
DRLLM_INLINE void mean_window(float* to, const T* tokens, int64_t stride, int64_t count, int64_t dim) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) mean_columns<T, 4>(to + d, tokens + d, stride, count);
  for (; d + kLanes <= dim; d += kLanes) mean_columns<T, 1>(to + d, tokens + d, stride, count);
  if (d == dim) return;
  store(to + d, Floats{});
  for (; d < dim; ++d) {
    float total = 0;
    for (int64_t first = 0; first < count; first += 64) {
      float part = 0;
      for (int64_t t = first; t < first + 64 && t < count; ++t) part += widen(tokens[t * stride + d]);
      total += part;
    }
    to[d] = total / static_cast<float>(count);
  }
}

DRLLM_INLINE Floats gelu(Floats x) {
  constexpr float root = 0.7978845608028654f;  // sqrt(2 / pi)
  return 0.5f * x * (1.0f + tanh(root * (x + 0.044715f * x * x * x)));
}

// inner[unit - first, window] = w1 pooled + b1, of `columns` windows and kLanes / columns hidden units at a time: as many sums
// as a vector has lanes. Each row of w1 is read once for all of those windows.
template <int columns>
DRLLM_INLINE void first_layer(float* inner, const float* pooled, int64_t width, int64_t windows, const float* w1,
                              const float* b1, int64_t dim, int64_t first, int64_t last) {
  constexpr int units = kLanes / columns;
  const int64_t dense = dim / kLanes * kLanes;
  for (int64_t unit = first; unit < last; unit += units)
    for (int64_t window = 0; window < windows; window += columns) {
      Floats c[kLanes] = {};
      const float* weights[units];  // past the last unit, and the last window, the last one is done again and not used
      const float* column[columns];
      for (int u = 0; u < units; ++u) weights[u] = w1 + (unit + u < last ? unit + u : last - 1) * dim;
      for (int w = 0; w < columns; ++w) column[w] = pooled + (window + w < windows ? window + w : windows - 1) * width;
      for (int64_t d = 0; d < dense; d += kLanes) {
        Floats right[columns];
        for (int w = 0; w < columns; ++w) right[w] = load(column[w] + d);
        for (int u = 0; u < units; ++u) {
          const Floats left = load(weights[u] + d);
          __builtin_prefetch(weights[u] + 2 * units * dim + d);  // a tenth off where the weights come from the L3 cache
          for (int w = 0; w < columns; ++w) c[u * columns + w] += left * right[w];
        }
      }
      if (dense < dim)
        for (int u = 0; u < units; ++u) {
          Floats left{};
          for (int64_t d = dense; d < dim; ++d) left[d - dense] = weights[u][d];
          for (int w = 0; w < columns; ++w) c[u * columns + w] += left * load(column[w] + dense);
        }
      float total[kLanes];
      store(total, sums(c));
      for (int u = 0; u < units && unit + u < last; ++u)
        for (int w = 0; w < columns && window + w < windows; ++w)
          inner[(unit + u - first) * windows + window + w] = total[u * columns + w] + b1[unit + u];
    }
}

constexpr int64_t kUnits = 32;  // hidden units whose GELU is taken together

// mean[unit] = the mean over windows of gelu(w1 pooled + b1), for the units from first to last.
// pooled [windows, width]; w1 [h, d], b1 [h]; scratch [kUnits * windows + kLanes].
inline void hidden_mean(float* mean, const float* pooled, int64_t width, int64_t windows, const float* w1,
                        const float* b1, int64_t dim, int64_t first, int64_t last, float* scratch) {
  for (int64_t unit = first; unit < last; unit += kUnits) {
    const int64_t end = unit + kUnits < last ? unit + kUnits : last, count = (end - unit) * windows;
    if (windows == 1) first_layer<1>(scratch, pooled, width, windows, w1, b1, dim, unit, end);
    else if (windows == 2) first_layer<2>(scratch, pooled, width, windows, w1, b1, dim, unit, end);
    else if (windows <= 4) first_layer<4>(scratch, pooled, width, windows, w1, b1, dim, unit, end);
    else first_layer<kLanes == 4 ? 4 : 8>(scratch, pooled, width, windows, w1, b1, dim, unit, end);
    store(scratch + count, Floats{});
    for (int64_t i = 0; i < count; i += kLanes) store(scratch + i, gelu(load(scratch + i)));
    for (int64_t u = unit; u < end; ++u) {
      float total = 0;
      for (int64_t w = 0; w < windows; ++w) total += scratch[(u - unit) * windows + w];
      mean[u] = total / static_cast<float>(windows);
    }
  }
}

inline int64_t hidden_scratch(int64_t windows) { return kUnits * windows + kLanes; }
inline int64_t padded(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }
inline void pool_float(float* to, const void* from, int64_t stride, int64_t count, int64_t dim) {
  mean_window(to, static_cast<const float*>(from), stride, count, dim);
}
inline void pool_bfloat16(float* to, const void* from, int64_t stride, int64_t count, int64_t dim) {
  mean_window(to, static_cast<const BFloat16*>(from), stride, count, dim);
}
inline void pool_float16(float* to, const void* from, int64_t stride, int64_t count, int64_t dim) {
  mean_window(to, static_cast<const Float16*>(from), stride, count, dim);
}
