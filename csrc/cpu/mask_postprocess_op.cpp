// mask_postprocess on the CPU.
#include "../mask_postprocess_op.h"

#include "mask_postprocess.h"

namespace refsam::cpu {
namespace {

using torch::headeronly::ScalarType;
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

// Text (n,) and the lengths (P,) of its parts; see mask_postprocess.h.
std::tuple<Tensor, Tensor> characters(const Tensor& ends, std::vector<int64_t> counts,
                                      std::vector<int64_t> sizes) {
  Device::check_device("ends", ends);
  check_rank("ends", ends, 1);
  check_dtype("ends", ends, ScalarType::Int);
  check_contiguous("ends", ends);
  const std::vector<MaskSize> masks = check_mask_sizes(sizes);
  check(counts.size() == masks.size(), "counts: got ", counts.size(), ", wanted one for each of ",
        masks.size(), " masks");
  int64_t total = 0;
  for (const int64_t count : counts) {
    check_range("counts", count, 0, ends.numel() - total);
    total += count;
  }
  const int64_t runs = total + static_cast<int64_t>(masks.size());
  Tensor text = torch::stable::new_empty(ends, {kMostCharacters * runs}, ScalarType::Byte);
  Tensor lengths =
      torch::stable::new_empty(ends, {static_cast<int64_t>(masks.size())}, ScalarType::Long);
  if (!masks.empty()) {
    mask_postprocess_characters(static_cast<const int32_t*>(ends.const_data_ptr()), counts, masks,
                                static_cast<uint8_t*>(text.mutable_data_ptr()),
                                static_cast<int64_t*>(lengths.mutable_data_ptr()));
  }
  return {text, lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cpu, m) {
  MaskPostprocess<Device>::define(m);
  m.def("mask_postprocess_characters(Tensor ends, int[] counts, int[] sizes) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cpu, CPU, m) {
  MaskPostprocess<Device>::implement(m);
  m.impl("mask_postprocess_characters", TORCH_BOX(&characters));
}

}  // namespace refsam::cpu
