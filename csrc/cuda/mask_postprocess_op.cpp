// mask_postprocess on CUDA devices.
#include "../mask_postprocess_op.h"

#include <algorithm>

#include "device.h"
#include "mask_postprocess.h"

namespace refsam::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The largest number of blocks that one of the masks takes.
int64_t most(const std::vector<MaskSize>& sizes, int64_t (*blocks)(const MaskSize&)) {
  int64_t most = 0;
  for (const MaskSize& size : sizes) most = std::max(most, blocks(size));
  return most;
}

struct Device {
  using Guard = DeviceGuard;

  static void check_device(const char* name, const Tensor& tensor) {
    check_on_device(name, tensor);
  }

  static void masks(const Tensor& logits, const MaskPostprocessSizes& sizes, float threshold,
                    bool* masks) {
    launch_mask_postprocess(static_cast<const float*>(logits.const_data_ptr()), sizes, threshold,
                            masks, current_stream(logits));
  }

  static void bits(const Tensor& logits, const std::vector<MaskAxes>& axes,
                   const std::vector<MaskSize>& sizes, float threshold, float stability_offset,
                   uint32_t* words, int64_t* statistics) {
    const int64_t count = static_cast<int64_t>(sizes.size());
    const std::vector<int64_t> parts{count, most(sizes, packing_blocks), kStatistics};
    Tensor partial = torch::stable::new_empty(logits, parts, ScalarType::Int);
    launch_mask_postprocess_bits(
        static_cast<const float*>(logits.const_data_ptr()), axes,
        {threshold, threshold + stability_offset, threshold - stability_offset}, words,
        static_cast<int32_t*>(partial.mutable_data_ptr()), statistics, current_stream(logits));
  }

  static void runs(const Tensor& words, const std::vector<MaskSize>& sizes, int64_t capacity,
                   int32_t* ends, int64_t* counts) {
    const std::vector<int64_t> parts{static_cast<int64_t>(sizes.size()), most(sizes, runs_blocks)};
    Tensor behind = torch::stable::new_empty(words, parts, ScalarType::Long);
    launch_mask_postprocess_runs(static_cast<const uint32_t*>(words.const_data_ptr()), sizes,
                                 capacity, static_cast<int64_t*>(behind.mutable_data_ptr()), ends,
                                 counts, current_stream(words));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cuda, m) { MaskPostprocess<Device>::define(m); }

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cuda, REFSAM_CUDA_KEY, m) {
  MaskPostprocess<Device>::implement(m);
}

}  // namespace refsam::cuda
