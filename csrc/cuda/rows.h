// Launchers of the row kernels, on plain memory of the device. What they compute: drllm_fast/rows_reference.py.
// They read nothing back and wait for nothing, so that a graph can capture them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace drllm_fast::cuda {

enum class Type { kFloat, kDouble, kBFloat16, kHalf };

// Rows [count, d], each of them whole in memory, `stride` bytes apart.
struct Rows {
  const void* data;
  int64_t count, stride;
};

// index [count], each entry of which is -1 or the number of a row.
struct Index {
  const int64_t* at;
  int64_t count;
};

// decisions [rows], cu_seqlens [rows + 1] -> index [2, tokens], cu_visits [2, rows + 1], numbers [2, rows]
void visit_rows(const int8_t* decisions, const int32_t* cu_seqlens, int64_t rows, int64_t tokens, int64_t* index,
                int32_t* cu_visits, int32_t* numbers, cudaStream_t stream);

// x, index -> out [index.count, bytes]
void gather_rows(Rows x, Index index, int64_t bytes, void* out, cudaStream_t stream);

// x, index, y -> out [x.count, bytes]; source [x.count] is memory to work in.
void scatter_rows(Rows x, Index index, Rows y, int64_t bytes, void* out, int64_t* source, cudaStream_t stream);

// x, index, y -> out [x.count, columns]; source [x.count] is memory to work in.
void scatter_add_rows(Type type, Rows x, Index index, Rows y, int64_t columns, void* out, int64_t* source,
                      cudaStream_t stream);

// x, index, weight [columns] -> gathered and normed [index.count, columns]
void gather_rms_norm(Type type, Rows x, Index index, const void* weight, int64_t columns, double eps, void* gathered,
                     void* normed, cudaStream_t stream);

}  // namespace drllm_fast::cuda
