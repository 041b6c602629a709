// Checks, allocation and registration of rel_pos_attention on CUDA devices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../rel_pos_attention_check.h"
#include "../string_argument.h"
#include "device.h"
#include "rel_pos_attention.h"

namespace refsam::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignedBytes = 16;
constexpr int64_t kAlignedElements = 8;

// The tensor's memory, from which 16 bytes are copied at a time.
const void* aligned_data(const char* name, const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  check(reinterpret_cast<uintptr_t>(data) % kAlignedBytes == 0, name,
        ": got memory that does not begin at a multiple of ", kAlignedBytes, " bytes");
  return data;
}

void check_strides(const Tensor& qkv) {
  for (int64_t dimension = 0; dimension < 3; ++dimension)
    check(qkv.stride(dimension) % kAlignedElements == 0, "qkv: got stride ", qkv.stride(dimension),
          " of dimension ", dimension, ", wanted a multiple of ", kAlignedElements);
}

RelPosAttention describe(const Tensor& qkv, const Tensor& rel_pos_h, const Tensor& rel_pos_w,
                         const std::optional<Tensor>& qkv_bias, int64_t num_heads,
                         int64_t window_size, const std::string& pad_mode) {
  const RelPosAttentionSizes sizes = check_rel_pos_attention(qkv, rel_pos_h, rel_pos_w, qkv_bias,
                                                             num_heads, window_size, pad_mode);
  const ScalarType dtype = qkv.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "qkv: got dtype ",
        torch::headeronly::toString(dtype), ", wanted Half or BFloat16");
  check(std::count(std::begin(kRelPosHeadDims), std::end(kRelPosHeadDims), sizes.head_dim) == 1,
        "qkv: got head dimension ", sizes.head_dim, ", wanted 32, 64 or 80");
  check_on_device("qkv", qkv);
  check_on_device("rel_pos_h", rel_pos_h, qkv);
  check_on_device("rel_pos_w", rel_pos_w, qkv);
  if (qkv_bias) check_on_device("qkv_bias", *qkv_bias, qkv);
  check_strides(qkv);
  RelPosAttention call{};
  call.is_bfloat16 = dtype == ScalarType::BFloat16;
  call.qkv = aligned_data("qkv", qkv);
  call.image_stride = qkv.stride(0);
  call.row_stride = qkv.stride(1);
  call.column_stride = qkv.stride(2);
  call.rel_pos_h = aligned_data("rel_pos_h", rel_pos_h);
  call.rel_pos_w = aligned_data("rel_pos_w", rel_pos_w);
  call.qkv_bias = qkv_bias ? aligned_data("qkv_bias", *qkv_bias) : nullptr;
  call.images = sizes.images;
  call.height = static_cast<int>(sizes.height);
  call.width = static_cast<int>(sizes.width);
  call.heads = static_cast<int>(sizes.heads);
  call.head_dim = static_cast<int>(sizes.head_dim);
  call.window_height = static_cast<int>(sizes.window_height);
  call.window_width = static_cast<int>(sizes.window_width);
  call.padding_is_key = sizes.padding_is_key;
  check_range("a window's rows and columns of keys, together", call.key_height() + call.key_width(),
              2, kLargestRelPosSides);
  check(call.blocks() <= std::numeric_limits<int32_t>::max(), "qkv: got ", call.images,
        " images, more than one launch can take");
  return call;
}

std::tuple<Tensor, Tensor> forward(const Tensor& qkv, const Tensor& rel_pos_h,
                                   const Tensor& rel_pos_w, std::optional<Tensor> qkv_bias,
                                   int64_t num_heads, int64_t window_size, StringHandle pad_mode) {
  RelPosAttention call =
      describe(qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, take_string(pad_mode));
  const DeviceGuard guard(qkv);
  const std::vector<int64_t> out_shape{call.images, call.height, call.width, qkv.size(3) / 3};
  const std::vector<int64_t> statistic_shape{call.images, call.heads, call.height, call.width};
  Tensor out = torch::stable::new_empty(qkv, out_shape);
  Tensor log_sum_exp = torch::stable::new_empty(qkv, statistic_shape, ScalarType::Float);
  if (call.images == 0) return {out, log_sum_exp};
  call.out = out.mutable_data_ptr();
  call.log_sum_exp = static_cast<float*>(log_sum_exp.mutable_data_ptr());
  launch_rel_pos_attention(call, current_stream(qkv));
  return {out, log_sum_exp};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cuda, m) {
  m.def(
      "rel_pos_attention(Tensor qkv, Tensor rel_pos_h, Tensor rel_pos_w, Tensor? qkv_bias, int "
      "num_heads, int window_size, str pad_mode) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cuda, REFSAM_CUDA_KEY, m) {
  m.impl("rel_pos_attention", TORCH_BOX(&forward));
}

}  // namespace refsam::cuda
