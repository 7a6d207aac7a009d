// What the row kernels of the CPU share: how rows lie in memory, and which of them an index names.
#pragma once

#include "../ops.h"
#include "../tensors.h"

#include <algorithm>
#include <vector>

HIDDEN_NAMESPACE_BEGIN(drllm_fast, cpu)  // as the types of torch that it holds are

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

// The rows of x [T, d].
struct Rows {
  explicit Rows(const Tensor& x)
      : owner(with_whole_rows(x)),
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
