// The checks of mask_postprocess's arguments, the same on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "check.h"
#include "mask_postprocess.h"

namespace refsam {

// Largest size along an axis: up to here a float holds every position.
constexpr int64_t kLargestSize = int64_t{1} << 22;

// logits (P, 4h, 4w) float32, contiguous; image_size; input_size (height, width) within it;
// output_size (height, width).
inline MaskPostprocessSizes check_mask_postprocess(const torch::stable::Tensor& logits,
                                                   int64_t image_size,
                                                   const std::vector<int64_t>& input_size,
                                                   const std::vector<int64_t>& output_size) {
  check_rank("logits", logits, 3);
  check_dtype("logits", logits, torch::headeronly::ScalarType::Float);
  check_contiguous("logits", logits);
  check_range("logits' height", logits.size(1), 1, kLargestSize);
  check_range("logits' width", logits.size(2), 1, kLargestSize);
  check_range("image_size", image_size, 1, kLargestSize);
  check(input_size.size() == 2, "input_size: got ", input_size.size(),
        " numbers, wanted 2 (height, width)");
  check(output_size.size() == 2, "output_size: got ", output_size.size(),
        " numbers, wanted 2 (height, width)");
  check_range("input_size's height", input_size[0], 1, image_size);
  check_range("input_size's width", input_size[1], 1, image_size);
  check_range("output_size's height", output_size[0], 1, kLargestSize);
  check_range("output_size's width", output_size[1], 1, kLargestSize);
  return {logits.size(0),
          {logits.size(1), image_size, input_size[0], output_size[0]},
          {logits.size(2), image_size, input_size[1], output_size[1]}};
}

}  // namespace refsam
