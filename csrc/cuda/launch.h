// How kernels are launched and get shared memory. Kernels are written against this header, device.h
// and mma.h only: the emulator (tests/csrc/cuda_emulator) has headers of the same names and guards,
// included first, with which the same sources run on a CPU.
#ifndef REFSAM_CUDA_LAUNCH_H
#define REFSAM_CUDA_LAUNCH_H

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace refsam::cuda {

// Dynamic shared memory that every device has without asking for more.
constexpr size_t kPlainSharedBytes = 48 * 1024;
// Blocks along y and z of a grid.
constexpr int64_t kLargestGrid = 65535;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Runs `kernel` on the stream with `shared_bytes` of dynamic shared memory; raises
// std::runtime_error if the device refuses the launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  if (shared_bytes > kPlainSharedBytes) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check_cuda(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared_bytes)),
               "shared memory of a kernel");
  }
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
  check_cuda(cudaGetLastError(), "launch of a kernel");
}

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char refsam_dynamic_shared[];
  return refsam_dynamic_shared;
}

}  // namespace refsam::cuda

#endif  // REFSAM_CUDA_LAUNCH_H
