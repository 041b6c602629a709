// Checks, allocation and registration of dense_attention on CUDA devices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "dense_attention.h"
#include "real_check.h"

namespace refsam::cuda {
namespace {

const int64_t* check_indices(const char* name, const Tensor& tensor, int64_t count,
                             const Tensor& like) {
  check_compact(name, tensor, {count}, like);
  check_dtype(name, tensor, ScalarType::Long);
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

// Such a tensor's elements, of the dtype of `like`.
const void* check_elements(const char* name, const Tensor& tensor,
                           const std::vector<int64_t>& shape, const Tensor& like) {
  check_compact(name, tensor, shape, like);
  check_dtype(name, tensor, like.scalar_type());
  return tensor.const_data_ptr();
}

Tensor dense_attention(const Tensor& features, const Tensor& text, const Tensor& absorbed,
                       const Tensor& lengths, const Tensor& image_index, const Tensor& weight,
                       const Tensor& bias, const Tensor& scale, const Tensor& level_weights) {
  check_rank("features", features, 4);
  check_rank("text", text, 3);
  DenseAttention call{};
  call.dtype = check_real("features", features);
  const int64_t levels = features.size(0), channels = features.size(3), words = text.size(1);
  call.images = features.size(1);
  call.pixels = features.size(2);
  call.expressions = text.size(0);
  check_range("features' levels", levels, 1, std::numeric_limits<int16_t>::max());
  check_range("features' images", call.images, 1, std::numeric_limits<int32_t>::max());
  check_range("features' channels", channels, 1, kWidestDense);
  check_range("text's words", words, 1, kMostWords);
  check_range("features' pixels", call.pixels, 0, std::numeric_limits<int32_t>::max());
  check_range("pixels of all expressions", call.pixels * call.expressions, 0,
              std::numeric_limits<int32_t>::max());
  call.levels = static_cast<int>(levels);
  call.channels = static_cast<int>(channels);
  call.words = static_cast<int>(words);
  const std::vector<int64_t> text_shape{call.expressions, words, channels};
  call.features =
      check_elements("features", features, {levels, call.images, call.pixels, channels}, features);
  call.text = check_elements("text", text, text_shape, features);
  call.absorbed = check_elements("absorbed", absorbed, text_shape, features);
  call.lengths = check_indices("lengths", lengths, call.expressions, features);
  call.image_index = check_indices("image_index", image_index, call.expressions, features);
  call.weight = check_elements("weight", weight, {channels, 2 * channels}, features);
  call.bias = check_reals("bias", bias, {channels}, features);
  call.scale = check_reals("scale", scale, {}, features);
  call.level_weights = check_reals("level_weights", level_weights, {levels}, features);
  const DeviceGuard guard(features);
  const std::vector<int64_t> shape{call.expressions, call.pixels, channels};
  Tensor dense = torch::stable::new_empty(features, shape);
  if (dense.numel() == 0) return dense;
  call.dense = dense.mutable_data_ptr();
  launch_dense_attention(call, current_stream(features));
  return dense;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cuda, m) {
  m.def(
      "dense_attention(Tensor features, Tensor text, Tensor absorbed, Tensor lengths, Tensor "
      "image_index, Tensor weight, Tensor bias, Tensor scale, Tensor level_weights) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cuda, REFSAM_CUDA_KEY, m) {
  m.impl("dense_attention", TORCH_BOX(&dense_attention));
}

}  // namespace refsam::cuda
