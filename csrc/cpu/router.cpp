// The op `router` on the CPU. Arithmetic: router_kernel.h. Oracle: drllm_fast/router_reference.py. The second layer is
// linear, so that the mean over windows is taken before it.
#include "../ops.h"
#include "../tensors.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>

#include "empty.h"

#define DRLLM_KERNELS "router_kernel.h"
#include "for_each_isa.h"

namespace drllm_fast::cpu {
namespace {

constexpr int64_t kClasses = 3;
constexpr int64_t kWorkOfThread = 1 << 18;  // products, or elements read, that are worth waking a thread for
constexpr int64_t kUnitsOfThread = 32;      // hidden units that a thread does at least

Tensor as_floats(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size()) && t.is_cpu();
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == shape.begin()[i];
  check_value(fits, "w1, b1, w2, b2 and cost must be [h, d], [h], [3, h], [3] and [3], on the CPU; not so ", name);
  check_type(is_floating(t), name, " must be floating");
  const Tensor dense = as_contiguous(t);
  return t.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
}

}  // namespace

std::tuple<Tensor, Tensor> router(const Tensor& x, const Tensor& cu_seqlens, const Tensor& w1, const Tensor& b1,
                                  const Tensor& w2, const Tensor& b2, const Tensor& cost, int64_t windows) {
  const ScalarType type = x.scalar_type();
  check_type(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
             "the CPU kernel of router takes float32, bfloat16 and float16; for other types call "
             "drllm_fast.router_reference.router");
  check_value(x.dim() == 2 && x.is_cpu(), "x must be [T, d], on the CPU");
  check_type(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.is_cpu() && cu_seqlens.dim() == 1,
             "cu_seqlens must be int32 [B + 1], on the CPU");
  check_value(cu_seqlens.size(0) >= 1, "cu_seqlens must be [B + 1], got no entry");
  check_value(windows >= 1, "windows must be at least 1, got ", windows);
  check_value(w1.dim() == 2, "w1 must be [h, d], got ", w1.dim(), " dimensions");
  const int64_t tokens = x.size(0), dim = x.size(1), rows = cu_seqlens.size(0) - 1, units = w1.size(0);
  const Tensor first = as_floats("w1", w1, {units, dim}), first_bias = as_floats("b1", b1, {units});
  const Tensor second = as_floats("w2", w2, {kClasses, units}), second_bias = as_floats("b2", b2, {kClasses});
  const Tensor price = as_floats("cost", cost, {kClasses});

  const Tensor ends = as_contiguous(cu_seqlens);
  const int32_t* end = ends.const_data_ptr<int32_t>();
  check_value(end[0] == 0 && end[rows] == tokens, "cu_seqlens must rise from 0 to the ", tokens, " tokens of x");
  for (int64_t row = 0; row < rows; ++row)
    check_value(end[row] <= end[row + 1], "cu_seqlens must not fall, got ", end[row], " and then ", end[row + 1]);

  const Tensor dense = dim <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  const char* hidden = static_cast<const char*>(dense.const_data_ptr());
  const int64_t stride = dense.stride(0), row_bytes = stride * static_cast<int64_t>(dense.element_size());
  const auto pool = type == ScalarType::Float      ? DRLLM_BEST(pool_float)
                    : type == ScalarType::BFloat16 ? DRLLM_BEST(pool_bfloat16)
                                                   : DRLLM_BEST(pool_float16);
  const auto hidden_mean = DRLLM_BEST(hidden_mean);
  const int64_t width = DRLLM_BEST(padded)(dim);

  Tensor logits = empty({rows, kClasses}, ScalarType::Float);
  Tensor decisions = empty({rows}, ScalarType::Char);
  float* logit = logits.mutable_data_ptr<float>();
  int8_t* decision = decisions.mutable_data_ptr<int8_t>();
  const float *w = first.const_data_ptr<float>(), *b = first_bias.const_data_ptr<float>(),
              *w_out = second.const_data_ptr<float>(), *b_out = second_bias.const_data_ptr<float>(),
              *priced = price.const_data_ptr<float>();

  const auto used = [&](int64_t row) { return std::min<int64_t>(windows, end[row + 1] - end[row]); };
  const auto pool_some = [&](int64_t row, float* pooled, int64_t from, int64_t to) {
    const int64_t size = used(row) ? (end[row + 1] - end[row]) / used(row) : 0;
    for (int64_t window = from; window < to; ++window)
      pool(pooled + window * width, hidden + (end[row] + window * size) * row_bytes, stride, size, dim);
  };
  const auto decide = [&](int64_t row, const float* mean) {
    float* out = logit + row * kClasses;
    for (int64_t c = 0; c < kClasses; ++c) {
      double sum = 0;
      for (int64_t unit = 0; used(row) && unit < units; ++unit) sum += double{w_out[c * units + unit]} * mean[unit];
      out[c] = (used(row) ? static_cast<float>(sum) + b_out[c] : 0.0f) - priced[c];
    }
    // Ties and NaN execute the block, as the dense model would.
    const bool skip = out[0] > out[1] && out[0] > out[2], repeat = out[2] > out[1] && out[2] > out[0];
    decision[row] = skip ? 0 : repeat ? 2 : 1;
  };

  const int64_t most = rows ? std::min<int64_t>(windows, tokens) : 0;
  const int64_t extra = DRLLM_BEST(hidden_scratch)(most);
  const int64_t work = tokens * dim + rows * most * units * dim;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), work / kWorkOfThread));
  if (threads == 1 || rows >= 4 * threads) {
    const int64_t grain = (rows + 4 * threads - 1) / (4 * threads);
    torch::stable::parallel_for(0, rows, threads == 1 ? rows : grain, [&](int64_t from, int64_t to) {
      const std::unique_ptr<float[]> scratch(new float[most * width + units + extra]);
      float *pooled = scratch.get(), *mean = pooled + most * width;
      for (int64_t row = from; row < to; ++row) {
        pool_some(row, pooled, 0, used(row));
        if (used(row)) hidden_mean(mean, pooled, width, used(row), w, b, dim, 0, units, mean + units);
        decide(row, mean);
      }
    });
    return {logits, decisions};
  }
  // Few rows: their windows, and then their hidden units, are shared among the threads.
  const std::unique_ptr<float[]> scratch(new float[most * width + units]);
  float *pooled = scratch.get(), *mean = pooled + most * width;
  for (int64_t row = 0; row < rows; ++row) {
    if (used(row)) {
      torch::stable::parallel_for(0, used(row), 1, [&](int64_t from, int64_t to) { pool_some(row, pooled, from, to); });
      torch::stable::parallel_for(0, units, kUnitsOfThread, [&](int64_t from, int64_t to) {
        const std::unique_ptr<float[]> own(new float[extra]);
        hidden_mean(mean, pooled, width, used(row), w, b, dim, from, to, own.get());
      });
    }
    decide(row, mean);
  }
  return {logits, decisions};
}

}  // namespace drllm_fast::cpu
