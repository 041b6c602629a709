// Reductions over the lanes of a warp and the warps of a block, always in the same order, so that a
// result has the same bits in every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace refsam::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A thread's lane and warp in a one-dimensional block.
__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

struct Min {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// The reduction of `value` over groups of kLanes neighbouring lanes (a power of two), in all of
// them.
template <int kLanes = kWarpSize, typename T, typename Operation>
__device__ inline T warp_reduce(T value, Operation operation) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    value = operation(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

template <int kLanes = kWarpSize, typename T>
__device__ inline T warp_sum(T value) {
  return warp_reduce<kLanes>(value, Sum{});
}

template <int kLanes = kWarpSize, typename T>
__device__ inline T warp_max(T value) {
  return warp_reduce<kLanes>(value, Max{});
}

template <int kLanes = kWarpSize, typename T>
__device__ inline T warp_min(T value) {
  return warp_reduce<kLanes>(value, Min{});
}

// The reduction of `value` over a block of kWarps whole warps, in all threads. `shared` holds
// kWarps values; the block may use it again after its next __syncthreads().
template <int kWarps, typename T, typename Operation>
__device__ inline T block_reduce(T value, T* shared, Operation operation) {
  value = warp_reduce(value, operation);
  if (lane_id() == 0) shared[warp_id()] = value;
  __syncthreads();
  T result = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) result = operation(result, shared[warp]);
  return result;
}

template <int kWarps, typename T>
__device__ inline T block_sum(T value, T* shared) {
  return block_reduce<kWarps>(value, shared, Sum{});
}

template <int kWarps, typename T>
__device__ inline T block_max(T value, T* shared) {
  return block_reduce<kWarps>(value, shared, Max{});
}

}  // namespace refsam::cuda
