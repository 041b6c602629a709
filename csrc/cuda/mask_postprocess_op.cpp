// Checks, allocation and registration of mask_postprocess on CUDA devices.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../mask_postprocess_check.h"
#include "mask_postprocess.h"

namespace refsam::cuda {
namespace {

using torch::stable::Tensor;

Tensor run_mask_postprocess(const Tensor& logits, int64_t image_size,
                            std::vector<int64_t> input_size, std::vector<int64_t> output_size,
                            double threshold) {
  check(logits.is_cuda(), "logits: wanted a CUDA tensor");
  const MaskPostprocessSizes sizes =
      check_mask_postprocess(logits, image_size, input_size, output_size);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const std::vector<int64_t> shape{sizes.masks, sizes.rows.output, sizes.columns.output};
  Tensor masks = torch::stable::new_empty(logits, shape, torch::headeronly::ScalarType::Bool);
  if (sizes.masks == 0) return masks;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream));
  launch_mask_postprocess(
      static_cast<const float*>(logits.const_data_ptr()), sizes, static_cast<float>(threshold),
      static_cast<bool*>(masks.mutable_data_ptr()), static_cast<cudaStream_t>(stream));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cuda, m) {
  m.def(
      "mask_postprocess(Tensor logits, int image_size, int[] input_size, int[] output_size, float "
      "threshold)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cuda, CUDA, m) {
  m.impl("mask_postprocess", TORCH_BOX(&run_mask_postprocess));
}

}  // namespace refsam::cuda
