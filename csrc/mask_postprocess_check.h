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

// Largest number of pixels of a packed mask: ends of runs are 32 bits.
constexpr int64_t kLargestMask = (int64_t{1} << 31) - 1;

inline void check_mask_logits(const torch::stable::Tensor& logits, int64_t image_size) {
  check_rank("logits", logits, 3);
  check_dtype("logits", logits, torch::headeronly::ScalarType::Float);
  check_contiguous("logits", logits);
  check_range("logits' height", logits.size(1), 1, kLargestSize);
  check_range("logits' width", logits.size(2), 1, kLargestSize);
  check_range("image_size", image_size, 1, kLargestSize);
}

inline MaskAxes check_mask_axes(const torch::stable::Tensor& logits, int64_t image_size,
                                const int64_t input_size[2], const int64_t output_size[2]) {
  check_range("input_size's height", input_size[0], 1, image_size);
  check_range("input_size's width", input_size[1], 1, image_size);
  check_range("output_size's height", output_size[0], 1, kLargestSize);
  check_range("output_size's width", output_size[1], 1, kLargestSize);
  return {{logits.size(1), image_size, input_size[0], output_size[0]},
          {logits.size(2), image_size, input_size[1], output_size[1]}};
}

// logits (P, 4h, 4w) float32, contiguous; image_size; input_size (height, width) within it;
// output_size (height, width).
inline MaskPostprocessSizes check_mask_postprocess(const torch::stable::Tensor& logits,
                                                   int64_t image_size,
                                                   const std::vector<int64_t>& input_size,
                                                   const std::vector<int64_t>& output_size) {
  check_mask_logits(logits, image_size);
  check(input_size.size() == 2, "input_size: got ", input_size.size(),
        " numbers, wanted 2 (height, width)");
  check(output_size.size() == 2, "output_size: got ", output_size.size(),
        " numbers, wanted 2 (height, width)");
  const MaskAxes axes = check_mask_axes(logits, image_size, input_size.data(), output_size.data());
  return {logits.size(0), axes.rows, axes.columns};
}

// (height, width) of every packed mask.
inline std::vector<MaskSize> check_mask_sizes(const std::vector<int64_t>& output_sizes) {
  check(output_sizes.size() % 2 == 0, "output_sizes: got ", output_sizes.size(),
        " numbers, wanted (height, width) of every mask");
  std::vector<MaskSize> sizes;
  for (size_t i = 0; i < output_sizes.size(); i += 2) {
    check_range("output_size's height", output_sizes[i], 1, kLargestSize);
    check_range("output_size's width", output_sizes[i + 1], 1, kLargestSize);
    sizes.push_back({output_sizes[i], output_sizes[i + 1]});
    check_range("output_size's pixels", sizes.back().height * sizes.back().width, 1, kLargestMask);
  }
  return sizes;
}

inline int64_t total_words(const std::vector<MaskSize>& sizes) {
  int64_t total = 0;
  for (const MaskSize& size : sizes) total += size.words();
  return total;
}

// words (n,) int32 of masks of these sizes, contiguous; how many ends of runs are wanted.
inline std::vector<MaskSize> check_mask_runs(const torch::stable::Tensor& words,
                                             const std::vector<int64_t>& output_sizes,
                                             int64_t capacity) {
  check_rank("words", words, 1);
  check_dtype("words", words, torch::headeronly::ScalarType::Int);
  check_contiguous("words", words);
  const std::vector<MaskSize> masks = check_mask_sizes(output_sizes);
  const int64_t wanted = total_words(masks);
  check(words.numel() == wanted, "words: got ", words.numel(), " words, wanted ", wanted);
  check(capacity >= 0, "capacity: got ", capacity, ", wanted at least 0");
  return masks;
}

// Like check_mask_postprocess, with an input and an output size for every mask.
inline std::vector<MaskAxes> check_mask_postprocess_bits(const torch::stable::Tensor& logits,
                                                         int64_t image_size,
                                                         const std::vector<int64_t>& input_sizes,
                                                         const std::vector<int64_t>& output_sizes) {
  check_mask_logits(logits, image_size);
  const size_t wanted = 2 * static_cast<size_t>(logits.size(0));
  check(input_sizes.size() == wanted, "input_sizes: got ", input_sizes.size(), " numbers, wanted ",
        wanted, " (height, width of every mask)");
  check(output_sizes.size() == wanted, "output_sizes: got ", output_sizes.size(),
        " numbers, wanted ", wanted, " (height, width of every mask)");
  check_mask_sizes(output_sizes);
  std::vector<MaskAxes> axes;
  for (size_t i = 0; i < wanted; i += 2)
    axes.push_back(check_mask_axes(logits, image_size, &input_sizes[i], &output_sizes[i]));
  return axes;
}

}  // namespace refsam
