// The compiled kernels. Schemas and meaning: drllm_fast/rows_ops.py, router_ops.py,
// attention_ops.py and linear_ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace drllm_fast::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> active_tokens(const Tensor& decisions, const Tensor& cu_seqlens, int64_t at_least);
std::tuple<Tensor, Tensor, Tensor> visit_rows(const Tensor& decisions, const Tensor& cu_seqlens, int64_t tokens);
Tensor gather_rows(const Tensor& x, const Tensor& index);
Tensor scatter_rows(const Tensor& x, const Tensor& index, const Tensor& y);
std::tuple<Tensor, Tensor> router(const Tensor& x, const Tensor& cu_seqlens, const Tensor& w1, const Tensor& b1,
                                  const Tensor& w2, const Tensor& b2, const Tensor& cost, int64_t windows);
Tensor ragged_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& cu_seqlens,
                        const Tensor& starts, const Tensor& lengths, int64_t max_query, int64_t max_length, double scale,
                        std::optional<int64_t> window, std::optional<double> softcap, std::optional<Tensor> sinks,
                        bool packed);
Tensor pack_linear(const Tensor& weight);
Tensor packed_linear(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias, int64_t features);
Tensor scatter_add_rows(const Tensor& x, const Tensor& index, const Tensor& y);
std::tuple<Tensor, Tensor> gather_rms_norm(const Tensor& x, const Tensor& index, const Tensor& weight, double eps);

}  // namespace drllm_fast::cpu
