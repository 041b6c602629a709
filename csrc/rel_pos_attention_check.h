// The checks of rel_pos_attention's arguments, the same on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "check.h"

namespace refsam {

// Sizes of a call; a window's are the grid's if attention is global.
struct RelPosAttentionSizes {
  int64_t images, height, width, heads, head_dim, window_height, window_width;
  bool padding_is_key;
};

constexpr int64_t kLargestGridSide = int64_t{1} << 15;
constexpr int64_t kLargestHeadDim = 1024;

inline void check_shape(const char* name, const torch::stable::Tensor& tensor, int64_t rows,
                        int64_t columns) {
  check_rank(name, tensor, 2);
  check(tensor.size(0) == rows && tensor.size(1) == columns, name, ": got ", tensor.size(0), " x ",
        tensor.size(1), ", wanted ", rows, " x ", columns);
}

// qkv (B, h, w, 3*D), dense in its last dimension; tables (2*size-1, head_dim), contiguous;
// qkv_bias (3*D,) or nothing; all of qkv's dtype; num_heads a divisor of D; window_size 0 for
// global.
inline RelPosAttentionSizes check_rel_pos_attention(
    const torch::stable::Tensor& qkv, const torch::stable::Tensor& rel_pos_h,
    const torch::stable::Tensor& rel_pos_w, const std::optional<torch::stable::Tensor>& qkv_bias,
    int64_t num_heads, int64_t window_size, const std::string& pad_mode) {
  check_rank("qkv", qkv, 4);
  const int64_t height = qkv.size(1), width = qkv.size(2), channels = qkv.size(3);
  check_range("qkv's height", height, 1, kLargestGridSide);
  check_range("qkv's width", width, 1, kLargestGridSide);
  check_range("num_heads", num_heads, 1, channels);
  check(channels % (3 * num_heads) == 0, "qkv: got ", channels,
        " channels, wanted a multiple of 3 * num_heads = ", 3 * num_heads);
  const int64_t head_dim = channels / (3 * num_heads);
  check_range("qkv's head dimension", head_dim, 1, kLargestHeadDim);
  check(qkv.stride(3) == 1, "qkv: got stride ", qkv.stride(3), " of the last dimension, wanted 1");
  check_range("window_size", window_size, 0, kLargestGridSide);
  check(pad_mode == "bias" || pad_mode == "mask" || pad_mode == "none", "pad_mode: got '", pad_mode,
        "', wanted bias, mask or none");
  const int64_t window_height = window_size ? window_size : height;
  const int64_t window_width = window_size ? window_size : width;
  check(pad_mode != "none" || (height % window_height == 0 && width % window_width == 0),
        "window_size: got ", window_size, ", wanted a divisor of the grid with pad_mode 'none'");
  check_shape("rel_pos_h", rel_pos_h, 2 * window_height - 1, head_dim);
  check_shape("rel_pos_w", rel_pos_w, 2 * window_width - 1, head_dim);
  for (const auto& [name, table] :
       {std::pair{"rel_pos_h", &rel_pos_h}, {"rel_pos_w", &rel_pos_w}}) {
    check_dtype(name, *table, qkv.scalar_type());
    check_contiguous(name, *table);
  }
  if (qkv_bias) {
    check_rank("qkv_bias", *qkv_bias, 1);
    check(qkv_bias->size(0) == channels, "qkv_bias: got ", qkv_bias->size(0), " numbers, wanted ",
          channels);
    check_dtype("qkv_bias", *qkv_bias, qkv.scalar_type());
    check_contiguous("qkv_bias", *qkv_bias);
  }
  return {qkv.size(0), height,        width,        num_heads,
          head_dim,    window_height, window_width, pad_mode == "bias"};
}

}  // namespace refsam
