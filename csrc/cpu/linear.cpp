// pack_linear and packed_linear on the CPU: how they are split into tasks. Kernels: linear_kernel.h. Oracle:
// drllm_fast/linear_reference.py. All input is checked before anything is allocated or written.
#include "../ops.h"
#include "../tensors.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "empty.h"

namespace drllm_fast::cpu {

struct Linear {
  const void* x;
  const void* panels;
  const float* bias;  // null for none
  void* out;
  int64_t x_row, depth, features;
  bool widens;  // x is not of floats
};

}  // namespace drllm_fast::cpu

#define DRLLM_KERNELS "linear_kernel.h"
#include "for_each_isa.h"

namespace drllm_fast::cpu {
namespace {

constexpr int64_t kWorkOfThread = 1 << 16;  // products that are worth waking a thread for

void check_dtype(const Tensor& t) {
  check_type(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
             "packed_linear takes float32 and bfloat16 on the CPU");
}

int64_t workers_for(int64_t tasks, int64_t work) {
  return std::max<int64_t>(1, std::min<int64_t>({torch::stable::get_num_threads(), tasks, work / kWorkOfThread}));
}

}  // namespace

Tensor pack_linear(const Tensor& weight) {
  check_dtype(weight);
  check_value(weight.dim() == 2 && weight.is_cpu(), "weight must be [N, K], on the CPU");
  const Tensor w = with_whole_rows(weight);
  const int64_t features = w.size(0), depth = w.size(1), columns = DRLLM_BEST(columns_of_panel)();
  const int64_t panels = (features + columns - 1) / columns;
  Tensor out = empty({panels, depth, columns}, w.scalar_type());
  const bool is_float = w.scalar_type() == ScalarType::Float;
  const auto pack = is_float ? DRLLM_BEST(pack_panel_float) : DRLLM_BEST(pack_panel_bfloat16);
  const void* from = w.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const int64_t stride = w.stride(0);
  torch::stable::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) pack(to, from, stride, features, depth, p);
  });
  return out;
}

Tensor packed_linear(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias, int64_t features) {
  check_dtype(x);
  check_type(panels.scalar_type() == x.scalar_type(), "x and panels must have one dtype");
  check_value(x.dim() == 2 && panels.dim() == 3 && x.is_cpu() && panels.is_cpu(),
              "x must be [T, K] and panels [P, K, C], on the CPU");
  check_value(panels.is_contiguous(), "panels must be as pack_linear made them");
  const int64_t rows = x.size(0), depth = x.size(1), columns = DRLLM_BEST(columns_of_panel)();
  const int64_t count = panels.size(0);
  check_value(panels.size(1) == depth, "x has ", depth, " columns, panels were packed for ", panels.size(1));
  check_value(panels.size(2) == columns, "panels of ", panels.size(2), " columns were packed for another instruction set; ",
              "this one has ", columns);
  check_value(features >= 0 && (features + columns - 1) / columns == count, "features must be what weight had, got ",
              features, " for ", count, " panels of ", columns);
  std::vector<float> bias_values;
  if (bias) {
    check_type(is_floating(*bias), "bias must be floating");
    check_value(bias->dim() == 1 && bias->size(0) == features && bias->is_cpu(), "bias must be [", features,
                "], on the CPU");
    const Tensor given = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
    const float* value = given.const_data_ptr<float>();
    bias_values.assign(value, value + features);
  }
  Tensor out = empty({rows, features}, x.scalar_type());
  if (rows == 0 || features == 0) return out;
  const Tensor whole = with_whole_rows(x);
  const Linear l{whole.const_data_ptr(), panels.const_data_ptr(), bias ? bias_values.data() : nullptr,
                 out.mutable_data_ptr(), whole.stride(0), depth, features, x.scalar_type() != ScalarType::Float};

  const bool is_float = x.scalar_type() == ScalarType::Float;
  const auto run = is_float ? DRLLM_BEST(linear_float) : DRLLM_BEST(linear_bfloat16);
  const int64_t chunk = DRLLM_BEST(rows_of_chunk)(), chunks = (rows + chunk - 1) / chunk;
  // Several tasks for each thread, for threads are not equally fast.
  const int64_t threads = workers_for(chunks * count, rows * depth * features);
  const int64_t panels_of_task = std::clamp<int64_t>(count * chunks / (threads * 8), 1, count);
  const int64_t groups = (count + panels_of_task - 1) / panels_of_task, tasks = chunks * groups;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    if (first == last) return;
    const std::unique_ptr<float[]> scratch(new float[DRLLM_BEST(linear_scratch_size)(l.widens ? depth : 0)]);
    int64_t widened = -1;
    for (int64_t i = next++; i < tasks; i = next++) {
      const int64_t c = i / groups, panel = i % groups * panels_of_task;
      const int64_t row = c * chunk, here = std::min(chunk, rows - row);
      if (l.widens && widened != c) DRLLM_BEST(widen_rows_bfloat16)(l, row, here, scratch.get());
      widened = c;
      run(l, row, here, panel, std::min(panel + panels_of_task, count), scratch.get());
    }
  });
  return out;
}

}  // namespace drllm_fast::cpu
