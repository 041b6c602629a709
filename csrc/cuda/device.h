// Shared by every *_op.cpp for CUDA: the check of a tensor's device, the guard, the stream,
// and the dispatch key of registrations. The emulator replaces this header (see launch.h).
#ifndef REFSAM_CUDA_DEVICE_H
#define REFSAM_CUDA_DEVICE_H

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../check.h"

// STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cuda, REFSAM_CUDA_KEY, m)
#define REFSAM_CUDA_KEY CUDA

namespace refsam::cuda {

inline void check_on_device(const char* name, const torch::stable::Tensor& tensor) {
  check(tensor.is_cuda(), name, ": got a tensor of another device, wanted a CUDA tensor");
}

// Like check_on_device, and on the device of the first tensor, `like`.
inline void check_on_device(const char* name, const torch::stable::Tensor& tensor,
                            const torch::stable::Tensor& like) {
  check_on_device(name, tensor);
  check(tensor.get_device_index() == like.get_device_index(), name,
        ": got a tensor of CUDA device ", tensor.get_device_index(), ", wanted ",
        like.get_device_index(), " as the first one's");
}

// Makes the tensor's device the current one until the end of the block.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace refsam::cuda

#endif  // REFSAM_CUDA_DEVICE_H
