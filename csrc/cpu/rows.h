// What the row kernels of the CPU share: their checks, and how rows lie in memory.
#pragma once

#include "../ops.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <vector>

HIDDEN_NAMESPACE_BEGIN(drllm_fast, cpu)  // as the types of torch that it holds are

using torch::headeronly::ScalarType;

// Python sees std::invalid_argument as ValueError; the runtime_error of STD_TORCH_CHECK would be a RuntimeError.
template <class... Parts>
void check_value(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

inline void check_index(const Tensor& x, const Tensor& index) {
  STD_TORCH_CHECK(x.dim() == 2 && index.dim() == 1, "x must be [T, d] and index [T'], got ", x.dim(), " and ",
                  index.dim(), " dimensions");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, "index must be int64");
  STD_TORCH_CHECK(x.is_cpu() && index.is_cpu(), "x and index must be on the CPU");
}

inline void check_new_rows(const Tensor& x, const Tensor& index, const Tensor& y) {
  STD_TORCH_CHECK(y.is_cpu() && y.scalar_type() == x.scalar_type(), "y must have the device and dtype of x");
  check_value(y.dim() == 2 && y.size(0) == index.size(0) && y.size(1) == x.size(1), "y must be [", index.size(0), ", ",
              x.size(1), "], one row for each entry of index");
}

// index, each entry of which is a row of x or -1.
struct Positions {
  Positions(const Tensor& x, const Tensor& index)
      : owner(torch::stable::contiguous(index)), at(owner.const_data_ptr<int64_t>()), count(owner.size(0)) {
    for (int64_t i = 0; i < count; ++i)
      check_value(-1 <= at[i] && at[i] < x.size(0), "index[", i, "] is ", at[i], ", x has ", x.size(0), " rows");
  }

  int64_t operator[](int64_t i) const { return at[i]; }

  // The i with index[i] = row for each row of x, or -1. Where rows are replaced by it, each is written once; a clone
  // that is then overwritten is written mostly twice.
  std::vector<int64_t> inverse(int64_t rows) const {
    std::vector<int64_t> source(rows, -1);
    for (int64_t i = 0; i < count; ++i) {
      if (at[i] < 0) continue;
      int64_t& first = source[at[i]];
      check_value(first < 0, "index must not name a row twice, got ", at[i], " at ", first, " and ", i);
      first = i;
    }
    return source;
  }

  Tensor owner;
  const int64_t* at;
  int64_t count;
};

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

// f(first, last) over parts of 0 .. rows on as many threads as pay, for rows of so many bytes.
template <class F>
void parallel_rows(int64_t rows, int64_t bytes, const F& f) {
  constexpr int64_t kBytesPerTask = int64_t{1} << 17;  // what one thread copies at least
  if (bytes > 0) torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kBytesPerTask / bytes), f);
}

HIDDEN_NAMESPACE_END(drllm_fast, cpu)
