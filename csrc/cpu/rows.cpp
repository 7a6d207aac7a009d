// Rows of a packed batch, moved by routed layer path: active_tokens, gather_rows, scatter_rows.
// Oracle: drllm_fast/rows_reference.py. Every kernel checks all of its input before it allocates or writes anything.
#include "../ops.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace drllm_fast::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kBytesPerTask = int64_t{1} << 17;  // what one thread copies at least

// Python sees std::invalid_argument as ValueError; the runtime_error of STD_TORCH_CHECK would be a RuntimeError.
template <class... Parts>
void check_value(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

void check_index(const Tensor& x, const Tensor& index) {
  STD_TORCH_CHECK(x.dim() == 2 && index.dim() == 1, "x must be [T, d] and index [T'], got ", x.dim(), " and ",
                  index.dim(), " dimensions");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, "index must be int64");
  STD_TORCH_CHECK(x.is_cpu() && index.is_cpu(), "x and index must be on the CPU");
}

void check_position(const int64_t* at, int64_t i, int64_t rows) {
  check_value(0 <= at[i] && at[i] < rows, "index[", i, "] is ", at[i], ", x has ", rows, " rows");
}

// Rows that lie whole in memory are read where they are, whatever the distance between them.
struct Rows {
  explicit Rows(const Tensor& x)
      : owner(x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x)),
        data(static_cast<const char*>(owner.const_data_ptr())),
        stride(owner.stride(0) * static_cast<int64_t>(owner.element_size())),
        bytes(owner.size(1) * static_cast<int64_t>(owner.element_size())) {}

  const char* operator[](int64_t row) const { return data + row * stride; }

  Tensor owner;
  const char* data;
  int64_t stride, bytes;
};

// to[row] = source(row), a pointer to `bytes` bytes. Sources that are neighbours in memory, as the tokens of a row are,
// are copied at once: 10 % faster than one by one (rows of 1,152 bytes on an AMD EPYC).
template <class Source>
void copy_rows(char* to, int64_t count, int64_t bytes, const Source& source) {
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes));
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const char* from = source(first);
      int64_t end = first + 1;
      while (end < last && source(end) == from + (end - first) * bytes) ++end;
      std::memcpy(to + first * bytes, from, (end - first) * bytes);
      first = end;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> active_tokens(const Tensor& decisions, const Tensor& cu_seqlens, int64_t at_least) {
  STD_TORCH_CHECK(decisions.scalar_type() == ScalarType::Char, "decisions must be int8");
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int, "cu_seqlens must be int32");
  STD_TORCH_CHECK(decisions.dim() == 1 && cu_seqlens.dim() == 1, "decisions must be [B] and cu_seqlens [B + 1]");
  STD_TORCH_CHECK(decisions.is_cpu() && cu_seqlens.is_cpu(), "decisions and cu_seqlens must be on the CPU");
  const int64_t rows = decisions.size(0);
  check_value(cu_seqlens.size(0) == rows + 1, "cu_seqlens must have one entry more than decisions, got ",
              cu_seqlens.size(0), " and ", rows);

  const Tensor decided = torch::stable::contiguous(decisions);
  const Tensor offsets = torch::stable::contiguous(cu_seqlens);
  const int8_t* decision = decided.const_data_ptr<int8_t>();
  const int32_t* begin = offsets.const_data_ptr<int32_t>();
  check_value(begin[0] == 0, "cu_seqlens must start at 0, got ", begin[0]);
  int64_t active_rows = 0, active_count = 0;
  for (int64_t row = 0; row < rows; ++row) {
    check_value(begin[row] <= begin[row + 1], "cu_seqlens must not fall, got ", begin[row], " and then ",
                begin[row + 1]);
    if (decision[row] >= at_least) {
      ++active_rows;
      active_count += begin[row + 1] - begin[row];
    }
  }

  Tensor index = torch::stable::new_empty(decisions, {active_count}, ScalarType::Long);
  Tensor cu_active = torch::stable::new_empty(decisions, {active_rows + 1}, ScalarType::Int);
  int64_t* position = index.mutable_data_ptr<int64_t>();
  int32_t* end = cu_active.mutable_data_ptr<int32_t>();
  *end = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (decision[row] < at_least) continue;
    for (int64_t token = begin[row]; token < begin[row + 1]; ++token) *position++ = token;
    const int32_t before = *end;
    *++end = before + (begin[row + 1] - begin[row]);
  }
  return {index, cu_active};
}

Tensor gather_rows(const Tensor& x, const Tensor& index) {
  check_index(x, index);
  const Tensor positions = torch::stable::contiguous(index);
  const int64_t* at = positions.const_data_ptr<int64_t>();
  const int64_t count = index.size(0), rows = x.size(0);
  for (int64_t i = 0; i < count; ++i) check_position(at, i, rows);

  const Rows from(x);
  Tensor out = torch::stable::new_empty(x, {count, x.size(1)});
  copy_rows(static_cast<char*>(out.mutable_data_ptr()), count, from.bytes, [&](int64_t i) { return from[at[i]]; });
  return out;
}

Tensor scatter_rows(const Tensor& x, const Tensor& index, const Tensor& y) {
  check_index(x, index);
  STD_TORCH_CHECK(y.is_cpu() && y.scalar_type() == x.scalar_type(), "y must have the device and dtype of x");
  const int64_t count = index.size(0), rows = x.size(0);
  check_value(y.dim() == 2 && y.size(0) == count && y.size(1) == x.size(1), "y must be [", count, ", ", x.size(1),
              "], one row for each entry of index");

  // Where each row comes from, so that every row is written once; a clone that is then overwritten writes most of
  // them twice.
  const Tensor positions = torch::stable::contiguous(index);
  const int64_t* at = positions.const_data_ptr<int64_t>();
  std::vector<int64_t> source(rows, -1);
  for (int64_t i = 0; i < count; ++i) {
    check_position(at, i, rows);
    check_value(source[at[i]] < 0, "index must not name a row twice, got ", at[i], " at ", source[at[i]], " and ", i);
    source[at[i]] = i;
  }

  const Rows old_rows(x), new_rows(y);
  Tensor out = torch::stable::new_empty(x, {rows, x.size(1)});
  copy_rows(static_cast<char*>(out.mutable_data_ptr()), rows, old_rows.bytes,
            [&](int64_t row) { return source[row] < 0 ? old_rows[row] : new_rows[source[row]]; });
  return out;
}

}  // namespace drllm_fast::cpu
