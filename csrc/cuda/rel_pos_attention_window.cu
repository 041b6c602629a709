// SAM's windows of 14 x 14: a block has all 196 keys and values of a window's head in shared
// memory, rounded up to 208, and a warp all scores of its 16 queries in registers, so nothing is
// scaled again. Two blocks share a window: its keys are read twice, and small batches fill the
// device.
#include <algorithm>
#include <cmath>

#include "rel_pos_attention_tile.h"

namespace refsam::cuda {
namespace {

constexpr int kSide = 14;
constexpr int kKeys = 208;
constexpr int kBlocks = 2;                       // of a window's head
constexpr int kBlockQueries = 7 * kWarpQueries;  // half of the 13 warps' worth
constexpr int kTableRows = 32;                   // 27, rounded up
constexpr int kTermsStride = 40;                 // floats, see `load_terms`
constexpr int kRowTerms = 0, kColumnTerms = 16;  // where they begin in a query's
constexpr int kTermsBytes = kWarpQueries * kTermsStride * sizeof(float);

// Bytes that a warp has to itself: first its queries, then their terms, then the results.
template <int kHeadDim>
constexpr int kScratch = std::max<int>(kTermsBytes, kWarpQueries* kTileStride<kHeadDim> * 2);

// Starts to copy all keys of the window and their values.
template <int kHeadDim, typename Element>
__device__ inline void copy_keys(Element* keys, Element* values, const Window<Element>& window) {
  constexpr int kChunks = kHeadDim / kChunk;
  const int channels = window.channels;
  for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
    const int key = i / kChunks, channel = i % kChunks * kChunk;
    const int y = key / kSide, x = key % kSide;
    const Element* from = nullptr;
    if (y < window.height && x < window.width)
      from = window.token(y, x) + channels + channel;
    else if (window.padding && y < window.key_height && x < window.key_width)
      from = window.padding + channels + channel;
    const int to = key * kTileStride<kHeadDim> + channel;
    cp_async_16(keys + to, from, from);
    cp_async_16(values + to, from ? from + channels : from, from);
  }
}

template <int kHeadDim, typename Element>
__device__ inline void make_terms(float* terms, const Queries<kHeadDim>& queries,
                                  const Element* table, const int (&position)[2], int keys,
                                  float scale) {
  float products[kTableRows / 8][4] = {};
  multiply_rows<kHeadDim>(products, queries, table);
  place_terms(terms, kTermsStride, products, 0, position, kSide, keys, 1.0f / scale);
}

// The terms of all keys, row by row. Two neighbouring keys are in one row: the side is even. The
// row behind the last one, where the keys end, is masked.
__device__ inline void load_terms(float (&scores)[kKeys / 8][4], const float* terms) {
  const int row = fragment_row(), column = fragment_column();
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    // Seven fragments are four rows, so the places of the first seven are all that registers hold.
    const int place = 8 * (n % 7) + column;
    const int y = place / kSide + n / 7 * 4, x = place % kSide;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* of_query = terms + (row + 8 * half) * kTermsStride;
      const float2 pair = *reinterpret_cast<const float2*>(of_query + kColumnTerms + x);
      const float of_row = of_query[kRowTerms + y];
      scores[n][2 * half] = of_row + pair.x;
      scores[n][2 * half + 1] = of_row + pair.y;
    }
  }
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    rel_pos_attention_window_kernel(const RelPosAttention call, float scale) {
  const auto window = locate<Element>(call, blockIdx.x / kBlocks);
  const int first = static_cast<int>(blockIdx.x % kBlocks) * kBlockQueries;
  const int end = min(first + kBlockQueries, window.tokens());
  if (first >= end) return;

  constexpr int kStride = kTileStride<kHeadDim>;
  Element* const keys = reinterpret_cast<Element*>(dynamic_shared());
  Element* const values = keys + kKeys * kStride;
  Element* const tables = values + kKeys * kStride;  // of rows, then of columns
  Element* const scratch =
      tables + 2 * kTableRows * kStride + warp_id() * (kScratch<kHeadDim> / sizeof(Element));
  float* const terms = reinterpret_cast<float*>(scratch);
  copy_keys<kHeadDim>(keys, values, window);
  copy_rows<kHeadDim>(tables, 2 * kTableRows, threadIdx.x, kThreads, [&](int i) {
    const auto* table =
        static_cast<const Element*>(i < kTableRows ? call.rel_pos_h : call.rel_pos_w);
    return i % kTableRows < 2 * kSide - 1 ? table + i % kTableRows * kHeadDim : nullptr;
  });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  for (int token = first + warp_id() * kWarpQueries; token < end; token += kWarps * kWarpQueries) {
    const int last = window.tokens() - 1;
    copy_rows<kHeadDim>(scratch, kWarpQueries, lane_id(), kWarpSize,
                        [&](int i) { return window.query(min(token + i, last)); });
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    Queries<kHeadDim> queries;
    load_queries<kHeadDim>(queries, scratch);
    __syncwarp();
    mask_terms(terms, kTermsStride);
    __syncwarp();
    int y[2], x[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = min(token + fragment_row() + 8 * half, last);
      y[half] = query / window.width;
      x[half] = query % window.width;
    }
    make_terms<kHeadDim>(terms + kRowTerms, queries, tables, y, window.key_height, scale);
    make_terms<kHeadDim>(terms + kColumnTerms, queries, tables + kTableRows * kStride, x,
                         window.key_width, scale);
    __syncwarp();
    float scores[kKeys / 8][4];
    load_terms(scores, terms);
    __syncwarp();
    multiply_rows<kHeadDim>(scores, queries, keys);
    Statistics statistics;
    float unused[2];
    exponentiate(scores, statistics, unused, scale);
    float result[kHeadDim / 8][4] = {};
    multiply_values<kHeadDim>(result, scores, values);
    store<kHeadDim>(window, token, scratch, result, statistics, scale);
    __syncwarp();
  }
}

template <typename Element, int kHeadDim>
void launch_kernel(const RelPosAttention& call, cudaStream_t stream) {
  const size_t tile_bytes = sizeof(Element) * (2 * kKeys + 2 * kTableRows) * kTileStride<kHeadDim>;
  const dim3 grid(static_cast<unsigned>(call.window_heads() * kBlocks));
  const float scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  launch(rel_pos_attention_window_kernel<Element, kHeadDim>, grid, dim3(kThreads),
         tile_bytes + kWarps * kScratch<kHeadDim>, stream, call, scale);
}

}  // namespace

bool is_sam_window(const RelPosAttention& call) {
  const bool is_sam = call.window_height == kSide && call.window_width == kSide;
  return is_sam && (call.head_dim == 64 || call.head_dim == 80);
}

void launch_rel_pos_attention_window(const RelPosAttention& call, cudaStream_t stream) {
  if (call.is_bfloat16 && call.head_dim == 64)
    launch_kernel<__nv_bfloat16, 64>(call, stream);
  else if (call.is_bfloat16)
    launch_kernel<__nv_bfloat16, 80>(call, stream);
  else if (call.head_dim == 64)
    launch_kernel<__half, 64>(call, stream);
  else
    launch_kernel<__half, 80>(call, stream);
}

}  // namespace refsam::cuda
