// Shared by the attention kernels, on the tiles of tile.h: where a window's tokens lie, copies of
// them, products whose left operand stays in registers, relative terms, the online softmax.
//
// A warp works on 16 queries; a lane has its part of two of them, rows lane / 4 and lane / 4 + 8 of
// a fragment. Scores are kept as q k + terms, the terms divided by the scale of q k: scale and
// log2(e) are multiplied in when a score is exponentiated.
#pragma once

#include <cmath>

#include "launch.h"
#include "rel_pos_attention.h"
#include "tile.h"

namespace refsam::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWarpQueries = kFragment;
constexpr int kChunk = kCopyBytes / sizeof(uint16_t);  // elements that a copy takes
constexpr float kLog2E = 1.4426950408889634f;

template <int kHeadDim>
constexpr int kTileStride = tile_stride<uint16_t>(kHeadDim);

// A head of a window.
template <typename Element>
struct Window {
  const Element* queries;  // the first token's; its key and value lie `channels` and twice that on
  const Element* padding;  // likewise of padding tokens, or null for zeros
  Element* out;            // the first token's, side by side with those of `grid_width` tokens
  float* log_sum_exp;
  int64_t row_stride, column_stride;
  int channels, grid_width;
  int height, width;          // real tokens
  int key_height, key_width;  // with padding tokens

  __device__ int tokens() const { return height * width; }

  __device__ const Element* token(int y, int x) const {
    return queries + y * row_stride + x * column_stride;
  }

  __device__ const Element* query(int index) const {
    const int y = index / width;
    return token(y, index - y * width);
  }

  // The token's place among all tokens of the grid, counted from the window's first.
  __device__ int64_t place(int index) const {
    const int y = index / width;
    return static_cast<int64_t>(y) * grid_width + (index - y * width);
  }
};

// The head of a window with this index: heads go first, then windows, then images.
template <typename Element>
__device__ inline Window<Element> locate(const RelPosAttention& call, unsigned index) {
  const unsigned across = (call.width + call.window_width - 1) / call.window_width;
  const unsigned down = (call.height + call.window_height - 1) / call.window_height;
  const int head = static_cast<int>(index % call.heads);
  const unsigned place = index / call.heads;
  const int left = static_cast<int>(place % across) * call.window_width;
  const int top = static_cast<int>(place / across % down) * call.window_height;
  const int64_t image = place / across / down;
  const int64_t token = static_cast<int64_t>(top) * call.width + left;
  const int64_t plane = static_cast<int64_t>(call.height) * call.width;
  Window<Element> window;
  window.channels = call.heads * call.head_dim;
  window.grid_width = call.width;
  window.row_stride = call.row_stride;
  window.column_stride = call.column_stride;
  window.queries = static_cast<const Element*>(call.qkv) + image * call.image_stride +
                   top * call.row_stride + left * call.column_stride + head * call.head_dim;
  window.padding =
      call.qkv_bias ? static_cast<const Element*>(call.qkv_bias) + head * call.head_dim : nullptr;
  window.out = static_cast<Element*>(call.out) + (image * plane + token) * window.channels +
               head * call.head_dim;
  window.log_sum_exp = call.log_sum_exp + (image * call.heads + head) * plane + token;
  window.height = min(call.height - top, call.window_height);
  window.width = min(call.width - left, call.window_width);
  window.key_height = call.padding_is_key ? call.window_height : window.height;
  window.key_width = call.padding_is_key ? call.window_width : window.width;
  return window;
}

// Starts to copy `count` rows of channels, row i from source(i), zeros where that is null. The
// copies are divided among `threads` threads.
template <int kHeadDim, typename Element, typename Source>
__device__ inline void copy_rows(Element* rows, int count, int thread, int threads,
                                 const Source& source) {
  constexpr int kChunks = kHeadDim / kChunk;
  for (int i = thread; i < count * kChunks; i += threads) {
    const int row = i / kChunks, channel = i % kChunks * kChunk;
    const Element* from = source(row);
    cp_async_16(rows + row * kTileStride<kHeadDim> + channel, from ? from + channel : from, from);
  }
}

// Sixteen queries as left operands, one for every 16 channels.
template <int kHeadDim>
using Queries = uint32_t[kHeadDim / kFragment][4];

template <int kHeadDim, typename Element>
__device__ inline void load_queries(Queries<kHeadDim>& queries, const Element* rows) {
#pragma unroll
  for (int step = 0; step < kHeadDim / kFragment; ++step)
    load_left<false>(queries[step], rows + kFragment * step, kTileStride<kHeadDim>);
}

// products (16, 8 * kColumns) += queries times rows transposed.
template <int kHeadDim, typename Element, int kColumns>
__device__ inline void multiply_rows(float (&products)[kColumns][4],
                                     const Queries<kHeadDim>& queries, const Element* rows) {
  static_assert(kColumns % 2 == 0);
  constexpr int kStride = kTileStride<kHeadDim>;
#pragma unroll
  for (int step = 0; step < kHeadDim / kFragment; ++step) {
#pragma unroll
    for (int column = 0; column < kColumns; column += 2) {
      uint32_t right[4];
      load_right<false>(right, rows + 8 * column * kStride + kFragment * step, kStride);
      multiply_fragments<Element>(products[column], products[column + 1], queries[step], right);
    }
  }
}

template <typename Element>
__device__ inline uint32_t pack(float low, float high) {
  union {
    __half2 half;
    __nv_bfloat162 bfloat16;
    uint32_t bits;
  } packed{};
  if constexpr (std::is_same_v<Element, __half>)
    packed.half = __floats2half2_rn(low, high);
  else
    packed.bfloat16 = __floats2bfloat162_rn(low, high);
  return packed.bits;
}

// result (16, kHeadDim) += weights (16, 8 * kColumns) times the rows of `values`; the weights are
// rounded to Element.
template <int kHeadDim, typename Element, int kColumns>
__device__ inline void multiply_values(float (&result)[kHeadDim / 8][4],
                                       const float (&weights)[kColumns][4], const Element* values) {
  constexpr int kStride = kTileStride<kHeadDim>;
#pragma unroll
  for (int step = 0; step < kColumns / 2; ++step) {
    const float (&low)[4] = weights[2 * step], (&high)[4] = weights[2 * step + 1];
    const uint32_t left[4] = {pack<Element>(low[0], low[1]), pack<Element>(low[2], low[3]),
                              pack<Element>(high[0], high[1]), pack<Element>(high[2], high[3])};
#pragma unroll
    for (int column = 0; column < kHeadDim / 8; column += 2) {
      uint32_t right[4];
      load_right<true>(right, values + kFragment * step * kStride + 8 * column, kStride);
      multiply_fragments<Element>(result[column], result[column + 1], left, right);
    }
  }
}

// Sets (16, stride) relative terms of a warp to minus infinity, which masks positions without a
// key.
__device__ inline void mask_terms(float* terms, int stride) {
  for (int i = lane_id(); i < kWarpQueries * stride; i += kWarpSize) terms[i] = -INFINITY;
}

// Puts products of the warp's queries with table rows from `first` on where their keys are: row i
// is for the key at position - i + size - 1 of the axis. `terms` is (16, stride).
template <int kColumns>
__device__ inline void place_terms(float* terms, int stride, const float (&products)[kColumns][4],
                                   int first, const int (&position)[2], int size, int keys,
                                   float factor) {
  const int row = fragment_row(), column = fragment_column();
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = position[i / 2] + size - 1 - (first + 8 * n + column + i % 2);
      if (0 <= key && key < keys) terms[(row + i / 2 * 8) * stride + key] = products[n][i] * factor;
    }
  }
}

// Greatest score and sum of weights of a lane's two queries; the sum is the lane's part of it.
struct Statistics {
  float greatest[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};
};

__device__ inline float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// Turns scores into weights relative to the greatest score so far; what was summed with an earlier
// greatest is to be multiplied by `shrink`.
template <int kColumns>
__device__ inline void exponentiate(float (&scores)[kColumns][4], Statistics& statistics,
                                    float (&shrink)[2], float scale) {
  const float factor = scale * kLog2E;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float greatest = statistics.greatest[half];
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      greatest = fmaxf(greatest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    greatest = warp_max<4>(greatest);
    shrink[half] = fast_exp2((statistics.greatest[half] - greatest) * factor);
    statistics.greatest[half] = greatest;
    float total = statistics.total[half] * shrink[half];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = fast_exp2(scores[n][i] * factor - greatest * factor);
        total += scores[n][i];
      }
    }
    statistics.total[half] = total;
  }
}

// Writes the results of the warp's queries from token `first` on and the logarithms of their sums,
// by way of 16 rows of shared memory.
template <int kHeadDim, typename Element>
__device__ inline void store(const Window<Element>& window, int first, Element* rows,
                             const float (&result)[kHeadDim / 8][4], const Statistics& statistics,
                             float scale) {
  const int row = fragment_row(), column = fragment_column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = warp_sum<4>(statistics.total[half]);
    const float factor = 1.0f / total;
    const int token = first + row + 8 * half;
    uint32_t* to =
        reinterpret_cast<uint32_t*>(rows + (row + 8 * half) * kTileStride<kHeadDim> + column);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
      to[4 * n] = pack<Element>(result[n][2 * half] * factor, result[n][2 * half + 1] * factor);
    if (column == 0 && token < window.tokens())
      window.log_sum_exp[window.place(token)] = statistics.greatest[half] * scale + logf(total);
  }
  __syncwarp();
  constexpr int kChunks = kHeadDim / kChunk;
  for (int i = lane_id(); i < kWarpQueries * kChunks; i += kWarpSize) {
    const int token = first + i / kChunks, channel = i % kChunks * kChunk;
    if (token < window.tokens())
      *reinterpret_cast<uint4*>(window.out + window.place(token) * window.channels + channel) =
          *reinterpret_cast<const uint4*>(rows + i / kChunks * kTileStride<kHeadDim> + channel);
  }
}

}  // namespace refsam::cuda
