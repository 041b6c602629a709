// mask_postprocess on the CPU.
#include "../mask_postprocess_op.h"

#include "mask_postprocess.h"

namespace refsam::cpu {
namespace {

using torch::stable::Tensor;

struct Device {
  static void check_device(const char* name, const Tensor& tensor) {
    check(tensor.is_cpu(), name, ": wanted a CPU tensor");
  }

  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static void masks(const Tensor& logits, const MaskPostprocessSizes& sizes, float threshold,
                    bool* masks) {
    mask_postprocess(static_cast<const float*>(logits.const_data_ptr()), sizes, threshold, masks);
  }

  static void bits(const Tensor& logits, const std::vector<MaskAxes>& axes,
                   const std::vector<MaskSize>&, float threshold, float stability_offset,
                   uint32_t* words, int64_t* statistics) {
    mask_postprocess_bits(static_cast<const float*>(logits.const_data_ptr()), axes, threshold,
                          stability_offset, words, statistics);
  }

  static void runs(const Tensor& words, const std::vector<MaskSize>& sizes, int64_t capacity,
                   int32_t* ends, int64_t* counts) {
    mask_postprocess_runs(static_cast<const uint32_t*>(words.const_data_ptr()), sizes, capacity,
                          ends, counts);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cpu, m) { MaskPostprocess<Device>::define(m); }

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cpu, CPU, m) { MaskPostprocess<Device>::implement(m); }

}  // namespace refsam::cpu
