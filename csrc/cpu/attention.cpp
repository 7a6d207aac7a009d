// ragged_attention on the CPU: how it is split into tasks, and what they are given. Kernels: attention_kernel.h. Oracle:
// drllm_fast/attention_reference.py. All input is checked before anything is allocated or written.
#include "../ops.h"
#include "../tensors.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "attention_task.h"
#include "empty.h"

#define DRLLM_KERNELS "attention_kernel.h"
#include "for_each_isa.h"

namespace drllm_fast::cpu {
namespace {

constexpr int64_t kRowsOfTask = 192;  // queries x heads of a group: keys are packed once for so many
constexpr int64_t kKeysOfTask = 512;  // of a query that is alone in its row: a long row is shared by threads
constexpr int64_t kWorkOfThread = 1 << 16;  // products that are worth waking a thread for

constexpr int64_t kNoWindow = int64_t{1} << 31;  // longer than any row, and positions less it are no overflow

struct Parts {  // of the keys of one row, for one group of heads
  AttentionTask task;
  int64_t count;
  int64_t offset;  // in the workspace
};

void check_tensor(const char* name, const Tensor& t, const Tensor& query) {
  check_type(t.scalar_type() == query.scalar_type(), "query, keys and values must have one dtype, not so ", name);
  check_value(t.dim() == 3, name, " must have 3 dimensions, got ", t.dim());
  check_value(t.is_cpu(), name, " must be on the CPU");
}

Tensor dense_rows(const Tensor& t) { return t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t); }

}  // namespace

Tensor ragged_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& cu_seqlens,
                        const Tensor& starts, const Tensor& lengths, int64_t max_query, int64_t max_length, double scale,
                        std::optional<int64_t> window, std::optional<double> softcap, std::optional<Tensor> sinks,
                        bool packed) {
  const bool is_float = query.scalar_type() == ScalarType::Float;
  check_type(is_float || query.scalar_type() == ScalarType::BFloat16,
             "the CPU kernel of ragged_attention takes float32 and bfloat16; for other types call "
             "drllm_fast.attention_reference.ragged_attention");
  check_tensor("query", query, query);
  check_tensor("keys", keys, query);
  check_tensor("values", values, query);
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2);
  const int64_t kv_heads = keys.size(0), size = keys.size(1), dim_v = values.size(2);
  check_value(keys.size(2) == dim && values.size(0) == kv_heads && values.size(1) == size && kv_heads > 0 &&
                  heads % kv_heads == 0,
              "query must be [T, H, D], keys [H_kv, N, D] and values [H_kv, N, D_v], H a multiple of H_kv");
  check_value(max_query >= 0 && max_length >= 0, "max_query and max_length must be at least 0, got ", max_query, " and ",
              max_length);
  check_value(std::isfinite(scale), "scale must be finite, got ", scale);
  check_value(!window || *window >= 1, "window must be at least 1, got ", window.value_or(0));
  check_value(!softcap || *softcap > 0, "softcap must be above 0, got ", softcap.value_or(0));
  for (const Tensor* t : {&cu_seqlens, &starts, &lengths})
    check_type(t->scalar_type() == ScalarType::Int && t->is_cpu() && t->dim() == 1,
               "cu_seqlens, starts and lengths must be int32, of one dimension, on the CPU");
  const int64_t rows = starts.size(0);
  check_value(cu_seqlens.size(0) == rows + 1 && lengths.size(0) == rows,
              "cu_seqlens must be [R + 1], starts and lengths [R]");

  const Tensor ends = as_contiguous(cu_seqlens), at = as_contiguous(starts), held = as_contiguous(lengths);
  const int32_t* end = ends.const_data_ptr<int32_t>();
  const int32_t* start = at.const_data_ptr<int32_t>();
  const int32_t* length = held.const_data_ptr<int32_t>();
  check_value(end[0] == 0 && end[rows] == tokens, "cu_seqlens must rise from 0 to the ", tokens, " tokens of query");
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t asking = int64_t{end[row + 1]} - end[row];
    check_value(asking >= 0, "cu_seqlens must not fall, got ", end[row], " and then ", end[row + 1]);
    check_value(start[row] >= 0 && length[row] >= 0 && int64_t{start[row]} + length[row] <= size, "row ", row,
                " has keys ", start[row], " to ", int64_t{start[row]} + length[row], ", there are ", size);
    check_value(asking <= length[row], "row ", row, " asks with ", asking, " tokens and has ", length[row], " keys");
    check_value(asking <= max_query && length[row] <= max_length, "row ", row, " asks with ", asking, " tokens and has ",
                length[row], " keys; max_query is ", max_query, ", max_length ", max_length);
    check_value(!packed || (start[row] == end[row] && length[row] == asking), "packed=True, but the keys of row ", row,
                " are not those of its queries, in their place");
  }
  std::vector<float> sink_scores;
  if (sinks) {
    check_type(is_floating(*sinks), "sinks must be floating");
    check_value(sinks->dim() == 1 && sinks->size(0) == heads && sinks->is_cpu(), "sinks must be [", heads,
                "], on the CPU");
    const Tensor given = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Float));
    const float* score = given.const_data_ptr<float>();
    sink_scores.assign(score, score + heads);
  }

  Tensor out = empty({tokens, heads, dim_v}, query.scalar_type());
  if (tokens == 0 || heads == 0 || dim_v == 0) return out;
  const Tensor q = dense_rows(query), k = dense_rows(keys), v = dense_rows(values);
  Attention a;
  a.query = q.const_data_ptr();
  a.keys = k.const_data_ptr();
  a.values = v.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.sinks = sinks ? sink_scores.data() : nullptr;
  a.query_token = q.stride(0), a.query_head = q.stride(1);
  a.key_head = k.stride(0), a.key_token = k.stride(1);
  a.value_head = v.stride(0), a.value_token = v.stride(1);
  a.heads = heads, a.group = heads / kv_heads, a.dim = dim, a.dim_v = dim_v;
  // 0 stands for none, so that a soft cap that is 0 in fp32 must not become it.
  a.scale = static_cast<float>(scale);
  a.softcap = softcap ? std::max(static_cast<float>(*softcap), std::numeric_limits<float>::min()) : 0;
  a.window = std::min(window.value_or(kNoWindow), kNoWindow);

  // The order does not depend on the number of threads, and neither do the parts: a row's result is the same bit for
  // bit, whatever it shares a batch with.
  const bool splits = DRLLM_BEST(decodes)(a);
  const int64_t tokens_of_task = std::max<int64_t>(1, kRowsOfTask / a.group), part_size = a.group * (dim_v + 2);
  std::vector<AttentionTask> tasks;
  std::vector<Parts> joined;
  int64_t work = 0, workspace = 0, widest = 1;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t asking = end[row + 1] - end[row];
    if (asking == 0) continue;
    const int64_t past = length[row] - asking;
    work += asking * heads * (past + (asking + 1) / 2) * (dim + dim_v);
    widest = std::max(widest, std::min(asking, tokens_of_task));
    for (int64_t head = 0; head < kv_heads; ++head) {
      AttentionTask task{end[row], past, asking, start[row], head, 0, length[row], nullptr};
      if (asking == 1) {
        task.first_key = std::max<int64_t>(0, past + 1 - a.window);
        const int64_t parts = splits ? (task.last_key - task.first_key + kKeysOfTask - 1) / kKeysOfTask : 1;
        if (parts <= 1) {
          tasks.push_back(task);
          continue;
        }
        joined.push_back({task, parts, workspace});
        workspace += parts * part_size;
        continue;
      }
      for (int64_t first = 0; first < asking; first += tokens_of_task) {
        AttentionTask tile = task;
        tile.tokens = std::min(tokens_of_task, asking - first);
        tile.token += first;
        tile.position += first;
        tile.last_key = tile.position + tile.tokens;
        tasks.push_back(tile);
      }
    }
  }
  const std::unique_ptr<float[]> partial(new float[workspace]);
  for (const Parts& parts : joined)
    for (int64_t part = 0; part < parts.count; ++part) {
      AttentionTask task = parts.task;
      task.first_key += part * kKeysOfTask;
      task.last_key = std::min(task.first_key + kKeysOfTask, parts.task.last_key);
      task.partial = partial.get() + parts.offset + part * part_size;
      tasks.push_back(task);
    }

  const auto run = is_float ? DRLLM_BEST(run_float) : DRLLM_BEST(run_bfloat16);
  const auto join = is_float ? DRLLM_BEST(join_float) : DRLLM_BEST(join_bfloat16);
  const int64_t scratch_size = DRLLM_BEST(scratch_size)(a, widest);
  const int64_t workers = std::max<int64_t>(
      1, std::min<int64_t>({torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()), work / kWorkOfThread}));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    // Threads take the next task as they get free: rows differ in length, so that equal shares would not be equal work.
    if (first == last) return;
    const std::unique_ptr<float[]> scratch(new float[scratch_size]);
    for (int64_t i = next++; i < static_cast<int64_t>(tasks.size()); i = next++) run(a, tasks[i], scratch.get());
  });
  for (const Parts& parts : joined) join(a, parts.task, partial.get() + parts.offset, parts.count);
  return out;
}

}  // namespace drllm_fast::cpu
