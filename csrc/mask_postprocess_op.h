// Checks, allocation and registration of mask_postprocess, the same on every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "mask_postprocess_check.h"

namespace refsam {

// The operator on one device. `Device` computes with plain sizes and pointers:
//   check_device(name, tensor)   an error where the tensor lies elsewhere
//   Guard(tensor)                makes the tensor's device the current one
//   masks, bits, runs            write results; there is at least one mask
// The first argument of these three is the tensor that the operator was given.
template <class Device>
class MaskPostprocess {
 public:
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;
  using Sizes = std::vector<int64_t>;

  static Tensor masks(const Tensor& logits, int64_t image_size, Sizes input_size, Sizes output_size,
                      double threshold) {
    Device::check_device("logits", logits);
    const MaskPostprocessSizes sizes =
        check_mask_postprocess(logits, image_size, input_size, output_size);
    const typename Device::Guard guard(logits);
    const Sizes shape{sizes.masks, sizes.rows.output, sizes.columns.output};
    Tensor masks = torch::stable::new_empty(logits, shape, ScalarType::Bool);
    if (sizes.masks > 0) {
      Device::masks(logits, sizes, static_cast<float>(threshold),
                    static_cast<bool*>(masks.mutable_data_ptr()));
    }
    return masks;
  }

  static std::tuple<Tensor, Tensor> bits(const Tensor& logits, int64_t image_size,
                                         Sizes input_sizes, Sizes output_sizes, double threshold,
                                         double stability_offset) {
    Device::check_device("logits", logits);
    const std::vector<MaskAxes> axes =
        check_mask_postprocess_bits(logits, image_size, input_sizes, output_sizes);
    const std::vector<MaskSize> sizes = check_mask_sizes(output_sizes);
    const typename Device::Guard guard(logits);
    const int64_t count = logits.size(0);
    Tensor words = torch::stable::new_empty(logits, {total_words(sizes)}, ScalarType::Int);
    Tensor statistics = torch::stable::new_empty(logits, {count, kStatistics}, ScalarType::Long);
    if (count > 0) {
      Device::bits(logits, axes, sizes, static_cast<float>(threshold),
                   static_cast<float>(stability_offset),
                   static_cast<uint32_t*>(words.mutable_data_ptr()),
                   static_cast<int64_t*>(statistics.mutable_data_ptr()));
    }
    return {words, statistics};
  }

  static std::tuple<Tensor, Tensor> runs(const Tensor& words, Sizes output_sizes,
                                         int64_t capacity) {
    Device::check_device("words", words);
    const std::vector<MaskSize> sizes = check_mask_runs(words, output_sizes, capacity);
    const typename Device::Guard guard(words);
    const int64_t count = static_cast<int64_t>(sizes.size());
    Tensor ends = torch::stable::new_empty(words, {capacity}, ScalarType::Int);
    Tensor counts = torch::stable::new_empty(words, {count}, ScalarType::Long);
    if (count > 0) {
      Device::runs(words, sizes, capacity, static_cast<int32_t*>(ends.mutable_data_ptr()),
                   static_cast<int64_t*>(counts.mutable_data_ptr()));
    }
    return {ends, counts};
  }

  template <class Library>
  static void define(Library& m) {
    m.def(
        "mask_postprocess(Tensor logits, int image_size, int[] input_size, int[] output_size, "
        "float threshold) -> Tensor");
    m.def(
        "mask_postprocess_bits(Tensor logits, int image_size, int[] input_sizes, int[] "
        "output_sizes, float threshold, float stability_offset) -> (Tensor, Tensor)");
    m.def(
        "mask_postprocess_runs(Tensor words, int[] output_sizes, int capacity) -> (Tensor, "
        "Tensor)");
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("mask_postprocess", TORCH_BOX(&MaskPostprocess::masks));
    m.impl("mask_postprocess_bits", TORCH_BOX(&MaskPostprocess::bits));
    m.impl("mask_postprocess_runs", TORCH_BOX(&MaskPostprocess::runs));
  }
};

}  // namespace refsam
