// Checks, allocation and registration of mask_postprocess on CUDA devices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../mask_postprocess_check.h"
#include "device.h"
#include "mask_postprocess.h"

namespace refsam::cuda {
namespace {

using torch::stable::Tensor;

Tensor run_mask_postprocess(const Tensor& logits, int64_t image_size,
                            std::vector<int64_t> input_size, std::vector<int64_t> output_size,
                            double threshold) {
  check_on_device("logits", logits);
  const MaskPostprocessSizes sizes =
      check_mask_postprocess(logits, image_size, input_size, output_size);
  const DeviceGuard guard(logits);
  const std::vector<int64_t> shape{sizes.masks, sizes.rows.output, sizes.columns.output};
  Tensor masks = torch::stable::new_empty(logits, shape, torch::headeronly::ScalarType::Bool);
  if (sizes.masks == 0) return masks;
  launch_mask_postprocess(static_cast<const float*>(logits.const_data_ptr()), sizes,
                          static_cast<float>(threshold),
                          static_cast<bool*>(masks.mutable_data_ptr()), current_stream(logits));
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cuda, m) {
  m.def(
      "mask_postprocess(Tensor logits, int image_size, int[] input_size, int[] output_size, float "
      "threshold)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cuda, REFSAM_CUDA_KEY, m) {
  m.impl("mask_postprocess", TORCH_BOX(&run_mask_postprocess));
}

}  // namespace refsam::cuda
