// A block has kRows pixels of one expression. It holds as many levels of them as fit its shared
// memory, takes all their products with the words, mixes features and attention in registers (a
// warp has whole rows), and multiplies each mixture once.
#include <algorithm>
#include <cmath>

#include "dense_attention.h"
#include "launch.h"
#include "tile.h"

namespace refsam::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMostWordsOfLane = kMostWords / kWarpSize;
// Elements of the mixture that a block holds in registers.
constexpr int kMixedElements = kThreads * 32;
// A block may have 99 KiB of shared memory on every architecture from sm_80 on.
constexpr int kMostSharedBytes = 99 * 1024;

// Bytes and elements of a block's shared memory.
template <typename T, int kRows>
struct Layout {
  int words, channels;

  __host__ __device__ int tile_columns() const { return tile_stride<T>(channels); }
  __host__ __device__ int logit_columns() const { return tile_stride<float>(words); }
  __host__ __device__ int attention_columns() const { return tile_stride<T>(words); }
  __host__ __device__ int tile_elements() const { return kRows * tile_columns(); }
  __host__ __device__ int logit_elements() const { return kRows * logit_columns(); }
  int level_bytes() const {
    return tile_elements() * static_cast<int>(sizeof(T)) +
           logit_elements() * static_cast<int>(sizeof(float));
  }
  int attention_bytes() const { return kRows * attention_columns() * static_cast<int>(sizeof(T)); }
  // Levels that are held at a time.
  int levels_at_once(int levels) const {
    return std::clamp((kMostSharedBytes - attention_bytes()) / level_bytes(), 1, levels);
  }
};

// softmax(scale * logits) over the first `length` words, times the share, is added to the lane's
// part: words lane, lane + 32, ...
__device__ inline void add_softmax(float (&attention)[kMostWordsOfLane], const float* logits,
                                   int length, float scale, float share) {
  float values[kMostWordsOfLane];
  float highest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMostWordsOfLane; ++i) {
    const int word = lane_id() + i * kWarpSize;
    values[i] = word < length ? scale * logits[word] : -INFINITY;
    highest = fmaxf(highest, values[i]);
  }
  highest = warp_max(highest);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kMostWordsOfLane; ++i) {
    values[i] = expf(values[i] - highest);
    total += values[i];
  }
  const float factor = share / warp_sum(total);
#pragma unroll
  for (int i = 0; i < kMostWordsOfLane; ++i) attention[i] += factor * values[i];
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    dense_attention_kernel(DenseAttention call, int levels_at_once) {
  constexpr int kTiles = kRows / kFragment;
  constexpr int kRowsOfWarp = kRows / kWarps;
  constexpr int kColumnsOfLane = kMixedElements / kRows / kWarpSize;
  const Layout<T, kRows> layout{call.words, call.channels};
  const int tiles_of_image = static_cast<int>((call.pixels + kRows - 1) / kRows);
  const int64_t expression = blockIdx.x / tiles_of_image;
  const int64_t first = static_cast<int64_t>(blockIdx.x % tiles_of_image) * kRows;
  const int left = static_cast<int>(min(call.pixels - first, static_cast<int64_t>(kRows)));
  const int length = static_cast<int>(call.lengths[expression]);
  const float scale = call.scale[0];
  const int64_t first_word = expression * call.words * call.channels;
  const Matrix<T> text{static_cast<const T*>(call.text) + first_word, call.channels, 1, length,
                       call.channels};
  T* tiles = reinterpret_cast<T*>(dynamic_shared());  // (levels_at_once, kRows, tile_columns)
  T* operand = tiles + levels_at_once * layout.tile_elements();  // (kRows, attention_columns)
  // (levels_at_once, kRows, logit_columns)
  float* logits = reinterpret_cast<float*>(operand + kRows * layout.attention_columns());

  float mixed[kRowsOfWarp][kColumnsOfLane] = {};
  float attention[kRowsOfWarp][kMostWordsOfLane] = {};
  float total_share = 0.0f;
  for (int start = 0; start < call.levels; start += levels_at_once) {
    const int levels = min(levels_at_once, call.levels - start);
    for (int level = 0; level < levels; ++level) {
      const int64_t image = (start + level) * call.images + call.image_index[expression];
      const T* pixels =
          static_cast<const T*>(call.features) + (image * call.pixels + first) * call.channels;
      load_tile(tiles + level * layout.tile_elements(), layout.tile_columns(),
                Matrix<T>{pixels, call.channels, 1, left, call.channels}, kRows,
                round_up(call.channels, kFragment), kThreads);
    }
    tile_loaded();
    const int strips = (call.words + kFragment - 1) / kFragment;
    for (int unit = warp_id(); unit < levels * kTiles * strips; unit += kWarps) {
      const int level = unit / (kTiles * strips), strip = unit % strips;
      const int row = unit / strips % kTiles * kFragment;
      float sums[1][2][4] = {};
      multiply<false>(sums, tiles + level * layout.tile_elements() + row * layout.tile_columns(),
                      layout.tile_columns(), text, strip * kFragment,
                      round_up(call.channels, kFragment));
      float* target = logits + level * layout.logit_elements() + row * layout.logit_columns() +
                      strip * kFragment;
      for_each(sums[0],
               [&](int i, int j, float sum) { target[i * layout.logit_columns() + j] = sum; });
    }
    __syncthreads();
    for (int level = 0; level < levels; ++level) {
      const float share = call.level_weights[start + level];
      total_share += share;
#pragma unroll
      for (int i = 0; i < kRowsOfWarp; ++i) {
        const int row = level * kRows + warp_id() + i * kWarps;
        add_softmax(attention[i], logits + row * layout.logit_columns(), length, scale, share);
        const T* values = tiles + row * layout.tile_columns();
#pragma unroll
        for (int j = 0; j < kColumnsOfLane; ++j) {
          const int column = lane_id() + j * kWarpSize;
          if (column < call.channels) mixed[i][j] += share * static_cast<float>(values[column]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kRowsOfWarp; ++i) {
    const int row = warp_id() + i * kWarps;
#pragma unroll
    for (int j = 0; j < kColumnsOfLane; ++j) {
      const int column = lane_id() + j * kWarpSize;
      if (column < call.channels)
        tiles[row * layout.tile_columns() + column] = static_cast<T>(mixed[i][j]);
    }
#pragma unroll
    for (int j = 0; j < kMostWordsOfLane; ++j) {
      const int word = lane_id() + j * kWarpSize;
      if (word < round_up(call.words, kFragment))
        operand[row * layout.attention_columns() + word] = static_cast<T>(attention[i][j]);
    }
  }
  __syncthreads();
  const Matrix<T> own{static_cast<const T*>(call.weight), 2 * call.channels, 1, call.channels,
                      call.channels};
  const Matrix<T> absorbed{static_cast<const T*>(call.absorbed) + first_word, 1, call.channels,
                           call.channels, length};
  T* dense = static_cast<T*>(call.dense) + (expression * call.pixels + first) * call.channels;
  for (int strip = warp_id() * kFragment; strip < call.channels; strip += kWarps * kFragment) {
    float sums[kTiles][2][4] = {};
    multiply<false>(sums, tiles, layout.tile_columns(), own, strip,
                    round_up(call.channels, kFragment));
    multiply<false>(sums, operand, layout.attention_columns(), absorbed, strip,
                    round_up(call.words, kFragment));
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      for_each(sums[i], [&](int row, int column, float sum) {
        row += i * kFragment;
        column += strip;
        if (row >= left || column >= call.channels) return;
        const int64_t place = static_cast<int64_t>(row) * call.channels + column;
        dense[place] = static_cast<T>(sum + total_share * call.bias[column]);
      });
  }
}

template <typename T, int kRows>
void launch_rows(const DenseAttention& call, cudaStream_t stream) {
  const Layout<T, kRows> layout{call.words, call.channels};
  const int at_once = layout.levels_at_once(call.levels);
  const size_t shared = layout.attention_bytes() + at_once * layout.level_bytes();
  const int64_t tiles = (call.pixels + kRows - 1) / kRows;
  launch(dense_attention_kernel<T, kRows>, dim3(static_cast<unsigned>(call.expressions * tiles)),
         dim3(kThreads), shared, stream, call, at_once);
}

}  // namespace

void launch_dense_attention(const DenseAttention& call, cudaStream_t stream) {
  with_element(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (call.channels <= kMixedElements / 32)
      launch_rows<T, 32>(call, stream);
    else
      launch_rows<T, 16>(call, stream);
  });
}

}  // namespace refsam::cuda
