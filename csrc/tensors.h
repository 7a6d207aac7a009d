// What the kernels of every device ask of their tensors. That they lie on this device is asked by having one device:
// a kernel is called for the device of one of its tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>

HIDDEN_NAMESPACE_BEGIN(drllm_fast)  // as the types of torch that it uses are

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Python sees std::invalid_argument as ValueError; the runtime_error of STD_TORCH_CHECK would be a RuntimeError.
template <class... Parts>
void check_value(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

// The same for what Python sees as RuntimeError. STD_TORCH_CHECK would add the path of this file to the message.
template <class... Parts>
void check_type(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline bool together(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_decisions(const Tensor& decisions, const Tensor& cu_seqlens) {
  check_type(decisions.scalar_type() == ScalarType::Char, "decisions must be int8");
  check_type(cu_seqlens.scalar_type() == ScalarType::Int, "cu_seqlens must be int32");
  check_type(decisions.dim() == 1 && cu_seqlens.dim() == 1, "decisions must be [B] and cu_seqlens [B + 1]");
  check_type(together(decisions, cu_seqlens), "decisions and cu_seqlens must be on one device");
  check_value(cu_seqlens.size(0) == decisions.size(0) + 1, "cu_seqlens must have one entry more than decisions, got ",
              cu_seqlens.size(0), " and ", decisions.size(0));
}

inline void check_index(const Tensor& x, const Tensor& index) {
  check_type(x.dim() == 2 && index.dim() == 1, "x must be [T, d] and index [T'], got ", x.dim(), " and ",
                  index.dim(), " dimensions");
  check_type(index.scalar_type() == ScalarType::Long, "index must be int64");
  check_type(together(x, index), "x and index must be on one device");
}

inline void check_new_rows(const Tensor& x, const Tensor& index, const Tensor& y) {
  check_index(x, index);
  check_type(together(x, y) && y.scalar_type() == x.scalar_type(), "y must have the device and dtype of x");
  check_value(y.dim() == 2 && y.size(0) == index.size(0) && y.size(1) == x.size(1), "y must be [", index.size(0), ", ",
              x.size(1), "], one row for each entry of index");
}

inline void check_norm(const Tensor& x, const Tensor& index, const Tensor& weight, double eps) {
  check_index(x, index);
  check_type(together(x, weight) && weight.scalar_type() == x.scalar_type(),
                  "weight must have the device and dtype of x");
  check_value(weight.dim() == 1 && weight.size(0) == x.size(1), "weight must be [", x.size(1),
              "], one for each column of x");
  check_value(eps > 0 && std::isfinite(eps), "eps must be positive and finite, got ", eps);
}

// x [T, d] with each row whole in memory: x itself if it is so, whatever the distance between its rows.
inline Tensor with_whole_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

HIDDEN_NAMESPACE_END(drllm_fast)
