// csrc/cuda/launch.h in the emulator.
#ifndef REFSAM_CUDA_LAUNCH_H
#define REFSAM_CUDA_LAUNCH_H

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "fibres.h"

namespace refsam::cuda {

constexpr size_t kPlainSharedBytes = 48 * 1024;
constexpr int64_t kLargestGrid = 65535;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  emulator::run(grid, block, shared_bytes, [&] { std::apply(kernel, values); });
}

inline char* dynamic_shared() { return emulator::dynamic_shared(); }

}  // namespace refsam::cuda

#endif  // REFSAM_CUDA_LAUNCH_H
