// Attention with decomposed relative positions on a CUDA device, forward.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace refsam::cuda {

// Head dimensions that there are kernels for.
constexpr int kRelPosHeadDims[] = {32, 64, 80};
// Rows and columns of keys, together: their relative terms lie in shared memory.
constexpr int kLargestRelPosSides = 192;

// Queries of a block where attention is global.
constexpr int kRelPosQueries = 64;

// One call: sizes, and tensors of __half or __nv_bfloat16. Strides count elements; they and all
// pointers are multiples of 16 bytes.
struct RelPosAttention {
  bool is_bfloat16;
  const void* qkv;  // (images, height, width, [3, heads, head_dim]), the last dimension dense
  int64_t image_stride, row_stride, column_stride;
  const void *rel_pos_h, *rel_pos_w;  // (2 * window_height - 1, head_dim), likewise; contiguous
  const void* qkv_bias;               // ([3, heads, head_dim]) or null for zeros
  void* out;                          // (images, height, width, [heads, head_dim]), contiguous
  float* log_sum_exp;                 // (images, heads, height, width), contiguous
  int64_t images;
  int height, width, heads, head_dim;
  int window_height, window_width;  // the grid's if attention is global
  bool padding_is_key;

  // Rows and columns of the largest window's keys.
  __host__ __device__ int key_height() const {
    return padding_is_key || window_height < height ? window_height : height;
  }
  __host__ __device__ int key_width() const {
    return padding_is_key || window_width < width ? window_width : width;
  }

  // Heads of all windows, and blocks of kRelPosQueries queries in all.
  int64_t window_heads() const {
    const int64_t down = (height + window_height - 1) / window_height;
    const int64_t across = (width + window_width - 1) / window_width;
    return images * down * across * heads;
  }
  int64_t blocks() const { return window_heads() * blocks_per_window(); }
  int64_t blocks_per_window() const {
    const int64_t rows = window_height < height ? window_height : height;
    const int64_t columns = window_width < width ? window_width : width;
    return (rows * columns + kRelPosQueries - 1) / kRelPosQueries;
  }
};

// There is at least one image, the head dimension is one of kRelPosHeadDims, the sides are at most
// kLargestRelPosSides, and blocks() is below 2^31.
void launch_rel_pos_attention(const RelPosAttention& call, cudaStream_t stream);

// The same for windows of 14 x 14 with head dimension 64 or 80 (SAM's): a window's keys at once.
bool is_sam_window(const RelPosAttention& call);
void launch_rel_pos_attention_window(const RelPosAttention& call, cudaStream_t stream);

}  // namespace refsam::cuda
