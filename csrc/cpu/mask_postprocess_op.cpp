// Checks, allocation and registration of mask_postprocess on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../mask_postprocess_check.h"
#include "mask_postprocess.h"

namespace refsam::cpu {
namespace {

using torch::stable::Tensor;

Tensor run_mask_postprocess(const Tensor& logits, int64_t image_size,
                            std::vector<int64_t> input_size, std::vector<int64_t> output_size,
                            double threshold) {
  check(logits.is_cpu(), "logits: wanted a CPU tensor");
  const MaskPostprocessSizes sizes =
      check_mask_postprocess(logits, image_size, input_size, output_size);
  const std::vector<int64_t> shape{sizes.masks, sizes.rows.output, sizes.columns.output};
  Tensor masks = torch::stable::new_empty(logits, shape, torch::headeronly::ScalarType::Bool);
  if (sizes.masks > 0) {
    mask_postprocess(static_cast<const float*>(logits.const_data_ptr()), sizes,
                     static_cast<float>(threshold), static_cast<bool*>(masks.mutable_data_ptr()));
  }
  return masks;
}

std::tuple<Tensor, Tensor> run_mask_postprocess_bits(const Tensor& logits, int64_t image_size,
                                                     std::vector<int64_t> input_sizes,
                                                     std::vector<int64_t> output_sizes,
                                                     double threshold, double stability_offset) {
  check(logits.is_cpu(), "logits: wanted a CPU tensor");
  const std::vector<MaskAxes> masks =
      check_mask_postprocess_bits(logits, image_size, input_sizes, output_sizes);
  const int64_t count = logits.size(0);
  Tensor words = torch::stable::new_empty(logits, {total_words(check_mask_sizes(output_sizes))},
                                          torch::headeronly::ScalarType::Int);
  Tensor statistics =
      torch::stable::new_empty(logits, {count, kStatistics}, torch::headeronly::ScalarType::Long);
  if (count > 0) {
    mask_postprocess_bits(static_cast<const float*>(logits.const_data_ptr()), masks,
                          static_cast<float>(threshold), static_cast<float>(stability_offset),
                          static_cast<uint32_t*>(words.mutable_data_ptr()),
                          static_cast<int64_t*>(statistics.mutable_data_ptr()));
  }
  return {words, statistics};
}

std::tuple<Tensor, Tensor> run_mask_postprocess_runs(const Tensor& words,
                                                     std::vector<int64_t> output_sizes,
                                                     int64_t capacity) {
  check(words.is_cpu(), "words: wanted a CPU tensor");
  const std::vector<MaskSize> masks = check_mask_runs(words, output_sizes, capacity);
  Tensor ends = torch::stable::new_empty(words, {capacity}, torch::headeronly::ScalarType::Int);
  Tensor counts = torch::stable::new_empty(words, {static_cast<int64_t>(masks.size())},
                                           torch::headeronly::ScalarType::Long);
  if (!masks.empty()) {
    mask_postprocess_runs(static_cast<const uint32_t*>(words.const_data_ptr()), masks, capacity,
                          static_cast<int32_t*>(ends.mutable_data_ptr()),
                          static_cast<int64_t*>(counts.mutable_data_ptr()));
  }
  return {ends, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cpu, m) {
  m.def(
      "mask_postprocess(Tensor logits, int image_size, int[] input_size, int[] output_size, float "
      "threshold)"
      " -> Tensor");
  m.def(
      "mask_postprocess_bits(Tensor logits, int image_size, int[] input_sizes, int[] output_sizes, "
      "float threshold, float stability_offset) -> (Tensor, Tensor)");
  m.def(
      "mask_postprocess_runs(Tensor words, int[] output_sizes, int capacity) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cpu, CPU, m) {
  m.impl("mask_postprocess", TORCH_BOX(&run_mask_postprocess));
  m.impl("mask_postprocess_bits", TORCH_BOX(&run_mask_postprocess_bits));
  m.impl("mask_postprocess_runs", TORCH_BOX(&run_mask_postprocess_runs));
}

}  // namespace refsam::cpu
