// Checks, allocation and registration of mask_postprocess on CUDA devices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../mask_postprocess_check.h"
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

Tensor run_mask_postprocess(const Tensor& logits, int64_t image_size,
                            std::vector<int64_t> input_size, std::vector<int64_t> output_size,
                            double threshold) {
  check_on_device("logits", logits);
  const MaskPostprocessSizes sizes =
      check_mask_postprocess(logits, image_size, input_size, output_size);
  const DeviceGuard guard(logits);
  const std::vector<int64_t> shape{sizes.masks, sizes.rows.output, sizes.columns.output};
  Tensor masks = torch::stable::new_empty(logits, shape, ScalarType::Bool);
  if (sizes.masks == 0) return masks;
  launch_mask_postprocess(static_cast<const float*>(logits.const_data_ptr()), sizes,
                          static_cast<float>(threshold),
                          static_cast<bool*>(masks.mutable_data_ptr()), current_stream(logits));
  return masks;
}

std::tuple<Tensor, Tensor> run_mask_postprocess_bits(const Tensor& logits, int64_t image_size,
                                                     std::vector<int64_t> input_sizes,
                                                     std::vector<int64_t> output_sizes,
                                                     double threshold, double stability_offset) {
  check_on_device("logits", logits);
  const std::vector<MaskAxes> masks =
      check_mask_postprocess_bits(logits, image_size, input_sizes, output_sizes);
  const std::vector<MaskSize> sizes = check_mask_sizes(output_sizes);
  const DeviceGuard guard(logits);
  const int64_t count = logits.size(0);
  Tensor words = torch::stable::new_empty(logits, {total_words(sizes)}, ScalarType::Int);
  Tensor statistics = torch::stable::new_empty(logits, {count, kStatistics}, ScalarType::Long);
  if (count == 0) return {words, statistics};
  const std::vector<int64_t> parts{count, most(sizes, packing_blocks), kStatistics};
  Tensor partial = torch::stable::new_empty(logits, parts, ScalarType::Int);
  const float limit = static_cast<float>(threshold), offset = static_cast<float>(stability_offset);
  launch_mask_postprocess_bits(
      static_cast<const float*>(logits.const_data_ptr()), masks,
      {limit, limit + offset, limit - offset}, static_cast<uint32_t*>(words.mutable_data_ptr()),
      static_cast<int32_t*>(partial.mutable_data_ptr()),
      static_cast<int64_t*>(statistics.mutable_data_ptr()), current_stream(logits));
  return {words, statistics};
}

std::tuple<Tensor, Tensor> run_mask_postprocess_runs(const Tensor& words,
                                                     std::vector<int64_t> output_sizes,
                                                     int64_t capacity) {
  check_on_device("words", words);
  const std::vector<MaskSize> sizes = check_mask_runs(words, output_sizes, capacity);
  const DeviceGuard guard(words);
  const int64_t count = static_cast<int64_t>(sizes.size());
  Tensor ends = torch::stable::new_empty(words, {capacity}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(words, {count}, ScalarType::Long);
  if (count == 0) return {ends, counts};
  const std::vector<int64_t> parts{count, most(sizes, runs_blocks)};
  Tensor behind = torch::stable::new_empty(words, parts, ScalarType::Long);
  launch_mask_postprocess_runs(static_cast<const uint32_t*>(words.const_data_ptr()), sizes,
                               capacity, static_cast<int64_t*>(behind.mutable_data_ptr()),
                               static_cast<int32_t*>(ends.mutable_data_ptr()),
                               static_cast<int64_t*>(counts.mutable_data_ptr()),
                               current_stream(words));
  return {ends, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cuda, m) {
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

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cuda, REFSAM_CUDA_KEY, m) {
  m.impl("mask_postprocess", TORCH_BOX(&run_mask_postprocess));
  m.impl("mask_postprocess_bits", TORCH_BOX(&run_mask_postprocess_bits));
  m.impl("mask_postprocess_runs", TORCH_BOX(&run_mask_postprocess_runs));
}

}  // namespace refsam::cuda
