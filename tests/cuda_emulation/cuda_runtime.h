// CUDA on the host, as much of it as the kernels use: each CUDA thread of a block is a thread of its own, and blocks run
// one after another. So a C++ compiler's sanitizers see a kernel's memory accesses and its races.
#pragma once

#include <math.h>  // overloads of sqrt and its like outside std, as in CUDA
#include <pthread.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define CUDART_VERSION 0

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

inline dim3 blockDim, gridDim;
inline thread_local dim3 threadIdx, blockIdx;

namespace emulation {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxGridY = 65535;

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  Barrier(const Barrier&) = delete;
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  explicit Warp(unsigned threads) : threads(threads), barrier(threads) {}
  unsigned threads;
  Barrier barrier;
  uint64_t slot[kWarp] = {};  // what its lanes hand to each other
};

inline Barrier* block_barrier;
inline thread_local Warp* warp;
inline thread_local unsigned lane;
inline cudaError_t last_error = cudaSuccess;

// The x of another lane of the warp. All lanes must come here.
template <class T>
T from_lane(unsigned mask, T x, unsigned source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu || warp->threads != kWarp || source >= kWarp) {
    std::fprintf(stderr, "emulation: a shuffle needs a whole warp\n");
    std::abort();
  }
  std::memcpy(&warp->slot[lane], &x, sizeof(T));
  warp->barrier.wait();
  std::memcpy(&x, &warp->slot[source], sizeof(T));
  warp->barrier.wait();
  return x;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t, const Arguments&... arguments) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > kMaxGridY) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  blockDim = block;
  gridDim = grid;
  Barrier all(threads);
  block_barrier = &all;
  std::vector<std::unique_ptr<Warp>> warps;
  for (unsigned first = 0; first < threads; first += kWarp)
    warps.push_back(std::make_unique<Warp>(threads - first < kWarp ? threads - first : kWarp));
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < threads; ++thread)
    running.emplace_back([&, thread] {
      warp = warps[thread / kWarp].get();
      lane = thread % kWarp;
      threadIdx = dim3(thread % block.x, thread / block.x % block.y, thread / block.x / block.y);
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
          for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, z);
            kernel(arguments...);
            all.wait();  // shared memory is static: one block has it at a time
          }
    });
  for (std::thread& thread : running) thread.join();
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier->wait(); }

template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta) {
  return emulation::from_lane(mask, x, emulation::lane < delta ? emulation::lane : emulation::lane - delta);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, unsigned lane_mask) {
  return emulation::from_lane(mask, x, emulation::lane ^ lane_mask);
}

inline long long atomicMax(long long* at, long long x) {
  long long old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < x && !__atomic_compare_exchange_n(at, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

[[noreturn]] inline void __trap() {
  std::fprintf(stderr, "emulation: trap\n");
  std::abort();
}

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
