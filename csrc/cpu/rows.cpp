// Rows of a packed batch, moved by routed layer path: active_tokens, visit_rows, gather_rows, scatter_rows.
// Oracle: drllm_fast/rows_reference.py. Every kernel checks all of its input before it allocates or writes anything.
#include "rows.h"

#include <cstring>

namespace drllm_fast::cpu {
namespace {

// decisions [B] and cu_seqlens [B + 1]: which rows there are, and where their tokens lie.
struct Batch {
  Batch(const Tensor& decisions, const Tensor& cu_seqlens) {
    check_decisions(decisions, cu_seqlens);
    rows = decisions.size(0);
    decided = torch::stable::contiguous(decisions);
    offsets = torch::stable::contiguous(cu_seqlens);
    decision = decided.const_data_ptr<int8_t>();
    begin = offsets.const_data_ptr<int32_t>();
    check_value(begin[0] == 0, "cu_seqlens must start at 0, got ", begin[0]);
    for (int64_t row = 0; row < rows; ++row)
      check_value(begin[row] <= begin[row + 1], "cu_seqlens must not fall, got ", begin[row], " and then ",
                  begin[row + 1]);
  }

  // f(row) for every row with decision[row] >= at_least.
  template <class F>
  void each_active(int64_t at_least, const F& f) const {
    for (int64_t row = 0; row < rows; ++row)
      if (decision[row] >= at_least) f(row);
  }

  int64_t rows;
  Tensor decided, offsets;
  const int8_t* decision;
  const int32_t* begin;
};

// to[row] = source(row), a pointer to `bytes` bytes, or null for zeros. Sources that are neighbours in memory, as the
// tokens of a row are, are copied at once: 10 % faster than one by one (rows of 1,152 bytes on an AMD EPYC).
template <class Source>
void copy_rows(char* to, int64_t count, int64_t bytes, const Source& source) {
  parallel_rows(count, bytes, [&](int64_t first, int64_t last) {
    while (first < last) {
      const char* from = source(first);
      const int64_t step = from == nullptr ? 0 : bytes;
      int64_t end = first + 1;
      while (end < last && source(end) == from + (end - first) * step) ++end;
      if (from == nullptr)
        std::memset(to + first * bytes, 0, (end - first) * bytes);
      else
        std::memcpy(to + first * bytes, from, (end - first) * bytes);
      first = end;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> active_tokens(const Tensor& decisions, const Tensor& cu_seqlens, int64_t at_least) {
  const Batch batch(decisions, cu_seqlens);
  int64_t active_rows = 0, active_count = 0;
  batch.each_active(at_least, [&](int64_t row) {
    ++active_rows;
    active_count += batch.begin[row + 1] - batch.begin[row];
  });

  Tensor index = torch::stable::new_empty(decisions, {active_count}, ScalarType::Long);
  Tensor cu_active = torch::stable::new_empty(decisions, {active_rows + 1}, ScalarType::Int);
  int64_t* position = index.mutable_data_ptr<int64_t>();
  int32_t* end = cu_active.mutable_data_ptr<int32_t>();
  *end = 0;
  batch.each_active(at_least, [&](int64_t row) {
    for (int64_t token = batch.begin[row]; token < batch.begin[row + 1]; ++token) *position++ = token;
    const int32_t before = *end;
    *++end = before + (batch.begin[row + 1] - batch.begin[row]);
  });
  return {index, cu_active};
}

std::tuple<Tensor, Tensor, Tensor> visit_rows(const Tensor& decisions, const Tensor& cu_seqlens, int64_t tokens) {
  const Batch batch(decisions, cu_seqlens);
  check_value(tokens >= batch.begin[batch.rows], "tokens must be at least cu_seqlens[-1], got ", tokens, " and ",
              batch.begin[batch.rows]);

  Tensor index = torch::stable::new_empty(decisions, {2, tokens}, ScalarType::Long);
  Tensor cu_visits = torch::stable::new_empty(decisions, {2, batch.rows + 1}, ScalarType::Int);
  Tensor rows = torch::stable::new_empty(decisions, {2, batch.rows}, ScalarType::Int);
  for (int64_t visit = 0; visit < 2; ++visit) {
    int64_t* position = index.mutable_data_ptr<int64_t>() + visit * tokens;
    int64_t* const last_position = position + tokens;
    int32_t* end = cu_visits.mutable_data_ptr<int32_t>() + visit * (batch.rows + 1);
    int32_t* const last_end = end + batch.rows + 1;
    int32_t* number = rows.mutable_data_ptr<int32_t>() + visit * batch.rows;
    int32_t* const last_number = number + batch.rows;
    int32_t total = 0;
    *end++ = 0;
    batch.each_active(visit + 1, [&](int64_t row) {
      for (int64_t token = batch.begin[row]; token < batch.begin[row + 1]; ++token) *position++ = token;
      total += batch.begin[row + 1] - batch.begin[row];
      *end++ = total;
      *number++ = static_cast<int32_t>(row);
    });
    std::fill(position, last_position, -1);
    std::fill(end, last_end, total);
    std::fill(number, last_number, -1);
  }
  return {index, cu_visits, rows};
}

Tensor gather_rows(const Tensor& x, const Tensor& index) {
  check_index(x, index);
  const Positions at(x, index);
  const Rows from(x);
  Tensor out = torch::stable::new_empty(x, {at.count, x.size(1)});
  copy_rows(static_cast<char*>(out.mutable_data_ptr()), at.count, from.bytes,
            [&](int64_t i) { return at[i] < 0 ? nullptr : from[at[i]]; });
  return out;
}

Tensor scatter_rows(const Tensor& x, const Tensor& index, const Tensor& y) {
  check_new_rows(x, index, y);
  const std::vector<int64_t> source = Positions(x, index).inverse(x.size(0));
  const Rows old_rows(x), new_rows(y);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  copy_rows(static_cast<char*>(out.mutable_data_ptr()), x.size(0), old_rows.bytes,
            [&](int64_t row) { return source[row] < 0 ? old_rows[row] : new_rows[source[row]]; });
  return out;
}

}  // namespace drllm_fast::cpu
