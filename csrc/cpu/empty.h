// Tensors on the CPU without a trip through the dispatcher: torch::stable::new_empty and contiguous look their op up by name
// at each call, which takes about 1 us.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

namespace drllm_fast::cpu {

inline torch::stable::Tensor empty(std::initializer_list<int64_t> shape, torch::headeronly::ScalarType type) {
  int64_t strides[8], step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= shape.begin()[i]) strides[i] = step;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides, code,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace drllm_fast::cpu
