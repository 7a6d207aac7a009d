// The compiled kernels. Schemas, meaning and reference implementations: drllm_fast/ops.py and rows_reference.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace drllm_fast::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> active_tokens(const Tensor& decisions, const Tensor& cu_seqlens, int64_t at_least);
Tensor gather_rows(const Tensor& x, const Tensor& index);
Tensor scatter_rows(const Tensor& x, const Tensor& index, const Tensor& y);

}  // namespace drllm_fast::cpu
