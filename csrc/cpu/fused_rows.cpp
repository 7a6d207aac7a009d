// Rows that are moved and computed on in one pass: scatter_add_rows, gather_rms_norm.
//
//   out = x, except out[index[i]] = x[index[i]] + y[i]
//   gathered[i] = x[index[i]],  normed[i] = weight * round(gathered[i] / sqrt(mean(gathered[i]^2) + eps))
//
// Sums in float, or double where x is; round is to the dtype of x. Oracle: drllm_fast/rows_reference.py.
#include "rows.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <type_traits>

namespace drllm_fast::cpu {
namespace {

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(T()) for the C++ type of x.
template <class F>
void with_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16());
    case ScalarType::Half: return f(torch::headeronly::Half());
    default: check_type(false, "x must be float32, bfloat16, float16, float64");
  }
}

template <class T>
void add(T* out, const T* x, const T* y, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c)
    out[c] = static_cast<T>(static_cast<Sum<T>>(x[c]) + static_cast<Sum<T>>(y[c]));
}

// In as many running sums as make the compiler use vectors: it may not reorder one sum.
template <class T>
Sum<T> sum_of_squares(const T* x, int64_t columns) {
  constexpr int64_t kLanes = 16;
  Sum<T> lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const auto value = static_cast<Sum<T>>(x[c + lane]);
      lanes[lane] += value * value;
    }
  for (; c < columns; ++c) lanes[c % kLanes] += static_cast<Sum<T>>(x[c]) * static_cast<Sum<T>>(x[c]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

template <class T>
void scale(T* out, const T* x, const T* weight, Sum<T> by, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    const T unit = static_cast<T>(static_cast<Sum<T>>(x[c]) * by);
    out[c] = static_cast<T>(static_cast<Sum<T>>(weight[c]) * static_cast<Sum<T>>(unit));
  }
}

}  // namespace

Tensor scatter_add_rows(const Tensor& x, const Tensor& index, const Tensor& y) {
  check_new_rows(x, index, y);
  const std::vector<int64_t> source = Positions(x, index).inverse(x.size(0));
  const Rows old_rows(x), new_rows(y);
  Tensor out;
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
    char* const to = static_cast<char*>(out.mutable_data_ptr());
    parallel_rows(x.size(0), old_rows.bytes, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        char* const at = to + row * old_rows.bytes;
        if (source[row] < 0)
          std::memcpy(at, old_rows[row], old_rows.bytes);
        else
          add(reinterpret_cast<T*>(at), reinterpret_cast<const T*>(old_rows[row]),
              reinterpret_cast<const T*>(new_rows[source[row]]), x.size(1));
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> gather_rms_norm(const Tensor& x, const Tensor& index, const Tensor& weight, double eps) {
  check_norm(x, index, weight, eps);
  const Positions at(x, index);
  const Rows from(x);
  const Tensor weights = torch::stable::contiguous(weight);
  const int64_t columns = x.size(1);
  Tensor gathered, normed;
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    gathered = torch::stable::new_empty(x, {at.count, columns});
    normed = torch::stable::new_empty(x, {at.count, columns});
    T* const copies = static_cast<T*>(gathered.mutable_data_ptr());
    T* const units = static_cast<T*>(normed.mutable_data_ptr());
    const T* const w = static_cast<const T*>(weights.const_data_ptr());
    parallel_rows(at.count, 2 * from.bytes, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        T* const copy = copies + i * columns;
        T* const unit = units + i * columns;
        if (at[i] < 0) {
          std::memset(copy, 0, from.bytes);
          std::memset(unit, 0, from.bytes);
          continue;
        }
        std::memcpy(copy, from[at[i]], from.bytes);
        const Sum<T> mean = sum_of_squares(copy, columns) / static_cast<Sum<T>>(columns);
        scale(unit, copy, w, 1 / std::sqrt(mean + static_cast<Sum<T>>(eps)), columns);
      }
    });
  });
  return {gathered, normed};
}

}  // namespace drllm_fast::cpu
