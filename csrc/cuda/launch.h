// How a kernel is launched: the one place that only nvcc can read. Another compiler takes `emulation::launch` from the
// cuda_runtime.h that it finds (tests/cuda_emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace drllm_fast::cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, const Arguments&... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, block, 0, stream>>>(arguments...);
#else
  emulation::launch(kernel, grid, block, stream, arguments...);
#endif
  check(cudaGetLastError());
}

}  // namespace drllm_fast::cuda
