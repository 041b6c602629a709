// csrc/cuda/device.h in the emulator: the operators are registered for the CPU's tensors.
#ifndef REFSAM_CUDA_DEVICE_H
#define REFSAM_CUDA_DEVICE_H

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

#define REFSAM_CUDA_KEY CPU

namespace refsam::cuda {

inline void check_on_device(const char* name, const torch::stable::Tensor& tensor) {
  check(tensor.is_cpu(), name, ": got a tensor of another device, wanted a CPU tensor");
}

inline void check_on_device(const char* name, const torch::stable::Tensor& tensor,
                            const torch::stable::Tensor&) {
  check_on_device(name, tensor);
}

struct DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor&) {}
};

inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

}  // namespace refsam::cuda

#endif  // REFSAM_CUDA_DEVICE_H
