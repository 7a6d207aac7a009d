// Rows of a packed batch, moved by routed layer path. Oracle: drllm_fast/rows_reference.py.
//
//   visit_rows        the tokens of both visits of a block, in buffers of fixed size
//   gather_rows       out[i] = x[index[i]]
//   scatter_rows      out = x, except out[index[i]] = y[i]
//   scatter_add_rows  out = x, except out[index[i]] = x[index[i]] + y[i]
//   gather_rms_norm   gathered[i] = x[index[i]],  normed[i] = weight * round(gathered[i] / sqrt(mean + eps))
//
// An index of -1 is no row; any other that is out of range stops the kernel, as torch's own indexing does. Memory is
// read and written 16 bytes at a time where pointers, strides and rows allow. Every sum has one order, so that the same
// input gives the same bits.
#include "rows.h"

#include "launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

namespace drllm_fast::cuda {
namespace {

constexpr int kThreads = 128, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxBlocks = 1 << 16;  // loops in the kernels do the rest
constexpr int64_t kVector = 16;          // bytes, the widest access there is

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned blocks(int64_t work, int64_t per_block) {
  return static_cast<unsigned>(std::min(ceil_div(work, per_block), kMaxBlocks));
}

// ---- what rows are made of

// Elements that are read and written together.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  using Value = T;
  T value[N];
};

template <class P>
constexpr int kSize = sizeof(P) / sizeof(typename P::Value);

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ inline T narrow(Sum<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return x;
}

template <class T>
__device__ inline const T* row_of(const Rows& x, int64_t row) {
  return reinterpret_cast<const T*>(static_cast<const char*>(x.data) + row * x.stride);
}

// The row that index[i] names, or -1.
__device__ inline int64_t position(const Index& index, int64_t i, int64_t rows) {
  const int64_t at = index.at[i];
  if (at < -1 || at >= rows) __trap();
  return at;
}

// ---- visit_rows

// The sum over the lanes up to this one.
__device__ inline int scan_warp(int x) {
  const int lane = threadIdx.x % kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

// Block v numbers the rows of visit v, kThreads of them at a time: how many are active before each, and how many tokens
// those have.
__global__ void __launch_bounds__(kThreads)
    scan_visits(const int8_t* decisions, const int32_t* cu_seqlens, int64_t rows, int32_t* cu_visits,
                int32_t* numbers) {
  __shared__ int warp_counts[kWarps], warp_lengths[kWarps];
  const int visit = blockIdx.x, warp = threadIdx.x / kWarp;
  cu_visits += visit * (rows + 1);
  numbers += visit * rows;
  int count = 0, total = 0;
  for (int64_t first = 0; first < rows; first += kThreads) {
    const int64_t row = first + threadIdx.x;
    const bool active = row < rows && decisions[row] > visit;
    const int length = active ? cu_seqlens[row + 1] - cu_seqlens[row] : 0;
    int rank = scan_warp(active), end = scan_warp(length);
    if (threadIdx.x % kWarp == kWarp - 1) {
      warp_counts[warp] = rank;
      warp_lengths[warp] = end;
    }
    __syncthreads();
    int chunk_count = 0, chunk_total = 0;
    for (int other = 0; other < kWarps; ++other) {
      if (other == warp) {
        rank += count + chunk_count;
        end += total + chunk_total;
      }
      chunk_count += warp_counts[other];
      chunk_total += warp_lengths[other];
    }
    if (active) {
      numbers[rank - 1] = static_cast<int32_t>(row);
      cu_visits[rank] = end;
    }
    count += chunk_count;
    total += chunk_total;
    __syncthreads();  // the next rows overwrite what the other warps may still read
  }
  if (threadIdx.x == 0) cu_visits[0] = 0;
  for (int64_t slot = count + threadIdx.x; slot < rows; slot += kThreads) {
    numbers[slot] = -1;
    cu_visits[slot + 1] = total;
  }
}

// index[v][j] = the position of the j-th token of the rows that scan_visits has numbered.
__global__ void __launch_bounds__(kThreads)
    fill_visits(const int32_t* cu_seqlens, int64_t rows, int64_t tokens, const int32_t* cu_visits,
                const int32_t* numbers, int64_t* index) {
  const int visit = blockIdx.y;
  cu_visits += visit * (rows + 1);
  numbers += visit * rows;
  index += visit * tokens;
  const int32_t total = cu_visits[rows];
  for (int64_t j = int64_t{blockIdx.x} * kThreads + threadIdx.x; j < tokens; j += int64_t{gridDim.x} * kThreads) {
    if (j >= total) {
      index[j] = -1;
      continue;
    }
    int64_t slot = 0, behind = rows;  // cu_visits[slot] <= j < cu_visits[behind]
    while (behind - slot > 1) {
      const int64_t middle = (slot + behind) / 2;
      (cu_visits[middle] <= j ? slot : behind) = middle;
    }
    index[j] = cu_seqlens[numbers[slot]] + (j - cu_visits[slot]);
  }
}

// ---- moving rows

// source[row] = the i with index[i] = row. A row that is named twice gets the last of them, whichever comes first.
__global__ void __launch_bounds__(kThreads) invert_index(Index index, int64_t rows, int64_t* source) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < index.count; i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = position(index, i, rows);
    if (row >= 0) atomicMax(reinterpret_cast<long long*>(source + row), static_cast<long long>(i));
  }
}

struct Gathered {
  Rows x;
  Index index;
  template <class T>
  __device__ const T* row(int64_t i) const {
    const int64_t at = position(index, i, x.count);
    return at < 0 ? nullptr : row_of<T>(x, at);
  }
};

struct Scattered {
  Rows x, y;
  const int64_t* source;
  template <class T>
  __device__ const T* row(int64_t i) const {
    return source[i] < 0 ? row_of<T>(x, i) : row_of<T>(y, source[i]);
  }
};

// out[i] = from.row(i), or zeros where that is null. A block is blockDim.y rows of blockDim.x threads each.
template <class T, class From>
__global__ void __launch_bounds__(kThreads) copy_rows(From from, int64_t rows, int64_t width, T* out) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; i < rows; i += int64_t{gridDim.x} * blockDim.y) {
    const T* const row = from.template row<T>(i);
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) out[i * width + c] = row == nullptr ? T{} : row[c];
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads) add_rows(Rows x, Rows y, const int64_t* source, int64_t width, P* out) {
  using T = typename P::Value;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; i < x.count; i += int64_t{gridDim.x} * blockDim.y) {
    const P* const old_row = row_of<P>(x, i);
    const P* const new_row = source[i] < 0 ? nullptr : row_of<P>(y, source[i]);
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      P sum = old_row[c];
      if (new_row != nullptr) {
        const P other = new_row[c];
#pragma unroll
        for (int k = 0; k < kSize<P>; ++k) sum.value[k] = narrow<T>(widen(sum.value[k]) + widen(other.value[k]));
      }
      out[i * width + c] = sum;
    }
  }
}

// ---- gather_rms_norm

// The sum of x over the block, for every thread of it.
template <class S>
__device__ inline S sum_over_block(S x) {
  __shared__ S warp_sums[kWarps];
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) x += warp_sums[warp];
  __syncthreads();  // the next row overwrites what the other warps may still read
  return x;
}

// One block a row: it is read twice, the second time from a cache.
template <class P>
__global__ void __launch_bounds__(kThreads)
    norm_rows(Rows x, Index index, const P* weight, int64_t width, double eps, P* gathered, P* normed) {
  using T = typename P::Value;
  for (int64_t i = blockIdx.x; i < index.count; i += gridDim.x) {
    const int64_t at = position(index, i, x.count);
    P* const copy = gathered + i * width;
    P* const unit = normed + i * width;
    if (at < 0) {
      for (int64_t c = threadIdx.x; c < width; c += blockDim.x) copy[c] = unit[c] = P{};
      continue;
    }
    const P* const row = row_of<P>(x, at);
    Sum<T> squares = 0;
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      const P pack = row[c];
      copy[c] = pack;
#pragma unroll
      for (int k = 0; k < kSize<P>; ++k) squares += widen(pack.value[k]) * widen(pack.value[k]);
    }
    const Sum<T> mean = sum_over_block(squares) / static_cast<Sum<T>>(width * kSize<P>);
    const Sum<T> scale = 1 / sqrt(mean + static_cast<Sum<T>>(eps));
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      P pack = row[c];
      const P by = weight[c];
#pragma unroll
      for (int k = 0; k < kSize<P>; ++k) {
        const T rounded = narrow<T>(widen(pack.value[k]) * scale);
        pack.value[k] = narrow<T>(widen(by.value[k]) * widen(rounded));
      }
      unit[c] = pack;
    }
  }
}

// ---- launchers

// The most bytes, up to 16, by which all addresses and distances can be divided.
int64_t access(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> distances) {
  int64_t all = kVector;
  for (const void* pointer : pointers) all |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer));
  for (int64_t distance : distances) all |= distance;
  return all & -all;
}

// As many threads a row as it has elements, up to a block: the next power of two.
dim3 block_of_rows(int64_t width) {
  unsigned threads = 1;
  while (threads < kThreads && threads < width) threads *= 2;
  return dim3(threads, kThreads / threads);
}

template <class From>
void copy(From from, int64_t rows, int64_t bytes, int64_t unit, void* out, cudaStream_t stream) {
  if (rows == 0 || bytes == 0) return;
  const auto with = [&](auto element) {
    using T = decltype(element);
    const int64_t width = bytes / static_cast<int64_t>(sizeof(T));
    const dim3 block = block_of_rows(width);
    launch(copy_rows<T, From>, blocks(rows, block.y), block, stream, from, rows, width, static_cast<T*>(out));
  };
  switch (unit) {
    case 16: return with(Pack<uint32_t, 4>());
    case 8: return with(Pack<uint32_t, 2>());
    case 4: return with(uint32_t());
    case 2: return with(uint16_t());
    default: return with(uint8_t());
  }
}

void invert(Index index, int64_t rows, int64_t* source, cudaStream_t stream) {
  if (rows > 0) check(cudaMemsetAsync(source, 0xff, rows * sizeof(int64_t), stream));  // all -1
  if (index.count > 0) launch(invert_index, blocks(index.count, kThreads), kThreads, stream, index, rows, source);
}

// f(Pack<T, N>()) for the type, with N as many as 16 bytes hold if they can be moved at once, or 1.
template <class F>
void with_pack(Type type, int64_t unit, const F& f) {
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    if (unit == kVector) return f(Pack<T, kVector / sizeof(T)>());
    return f(Pack<T, 1>());
  };
  switch (type) {
    case Type::kFloat: return with(float());
    case Type::kDouble: return with(double());
    case Type::kBFloat16: return with(__nv_bfloat16());
    case Type::kHalf: return with(__half());
  }
}

int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

}  // namespace

void visit_rows(const int8_t* decisions, const int32_t* cu_seqlens, int64_t rows, int64_t tokens, int64_t* index,
                int32_t* cu_visits, int32_t* numbers, cudaStream_t stream) {
  launch(scan_visits, 2, kThreads, stream, decisions, cu_seqlens, rows, cu_visits, numbers);
  if (tokens > 0)
    launch(fill_visits, dim3(blocks(tokens, kThreads), 2), kThreads, stream, cu_seqlens, rows, tokens, cu_visits,
           numbers, index);
}

void gather_rows(Rows x, Index index, int64_t bytes, void* out, cudaStream_t stream) {
  copy(Gathered{x, index}, index.count, bytes, access({x.data, out}, {x.stride, bytes}), out, stream);
}

void scatter_rows(Rows x, Index index, Rows y, int64_t bytes, void* out, int64_t* source, cudaStream_t stream) {
  invert(index, x.count, source, stream);
  copy(Scattered{x, y, source}, x.count, bytes, access({x.data, y.data, out}, {x.stride, y.stride, bytes}), out,
       stream);
}

void scatter_add_rows(Type type, Rows x, Index index, Rows y, int64_t columns, void* out, int64_t* source,
                      cudaStream_t stream) {
  invert(index, x.count, source, stream);
  if (x.count == 0 || columns == 0) return;
  const int64_t unit = access({x.data, y.data, out}, {x.stride, y.stride, columns * size_of(type)});
  with_pack(type, unit, [&](auto pack) {
    using P = decltype(pack);
    const int64_t width = columns / kSize<P>;
    const dim3 block = block_of_rows(width);
    launch(add_rows<P>, blocks(x.count, block.y), block, stream, x, y, source, width, static_cast<P*>(out));
  });
}

void gather_rms_norm(Type type, Rows x, Index index, const void* weight, int64_t columns, double eps, void* gathered,
                     void* normed, cudaStream_t stream) {
  if (index.count == 0 || columns == 0) return;
  const int64_t unit = access({x.data, weight, gathered, normed}, {x.stride, columns * size_of(type)});
  with_pack(type, unit, [&](auto pack) {
    using P = decltype(pack);
    const int64_t width = columns / kSize<P>;
    const auto threads = static_cast<unsigned>(std::min<int64_t>(kThreads, ceil_div(width, kWarp) * kWarp));
    launch(norm_rows<P>, blocks(index.count, 1), threads, stream, x, index, static_cast<const P*>(weight), width, eps,
           static_cast<P*>(gathered), static_cast<P*>(normed));
  });
}

}  // namespace drllm_fast::cuda
