// A block takes 64 queries of a window's head, a warp 16 of them. Keys come in tiles of 4 rows x 16
// columns of the window, the next tile while one is worked on. So a lane needs four terms of the
// rows per query and tile, and its terms of the columns stay in registers while the tiles go down.
#include <cmath>

#include "rel_pos_attention_tile.h"

namespace refsam::cuda {
namespace {

constexpr int kQueries = kWarps * kWarpQueries;
static_assert(kQueries == kRelPosQueries);
constexpr int kTileRows = 4, kTileColumns = 16, kTileKeys = kTileRows * kTileColumns;
constexpr int kStageRows = 4 * kTileKeys;  // two tiles of keys and of values; before them, tables

// Where a tile begins in the window.
struct TilePosition {
  int row = 0, column = 0;

  __device__ void advance(int key_height) {
    row += kTileRows;
    if (row < key_height) return;
    row = 0;
    column += kTileColumns;
  }
};

// Floats between the terms of one query and the next: whole tiles, and 16 bytes of eight queries
// in different banks.
__host__ __device__ inline int row_terms_stride(int key_height) {
  return ((key_height + kTileRows - 1) / kTileRows | 1) * kTileRows;
}
__host__ __device__ inline int column_terms_stride(int key_width) {
  return (key_width + kTileColumns - 1) / kTileColumns * kTileColumns + 4;
}

// The relative terms of the warp's queries along an axis; all warps go through the stage together.
template <int kHeadDim, typename Element>
__device__ inline void make_terms(float* terms, int stride, const Queries<kHeadDim>& queries,
                                  const void* table, const int (&position)[2], int size, int keys,
                                  float scale, Element* stage) {
  const int rows = 2 * size - 1;
  mask_terms(terms, stride);
  for (int first = 0; first < rows; first += kStageRows) {
    const Element* from =
        static_cast<const Element*>(table) + static_cast<int64_t>(first) * kHeadDim;
    const int left = min(rows - first, kStageRows);
    const int count = (left + kTileKeys - 1) / kTileKeys * kTileKeys;
    __syncthreads();  // the stage is free, the warp's terms are masked
    copy_rows<kHeadDim>(stage, count, threadIdx.x, kThreads,
                        [&](int row) { return row < left ? from + row * kHeadDim : nullptr; });
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int part = 0; part < count; part += kTileKeys) {
      float products[kTileKeys / 8][4] = {};
      multiply_rows<kHeadDim>(products, queries, stage + part * kTileStride<kHeadDim>);
      place_terms(terms, stride, products, first + part, position, size, keys, 1.0f / scale);
    }
  }
}

// Starts to copy kWidth chunks of 16 bytes, from `first` on, of a tile's keys and values. All
// chunks of a thread lie in one column of the tile.
template <int kHeadDim, int kWidth, typename Element>
__device__ inline void copy_chunks(Element* keys, const Window<Element>& window,
                                   const TilePosition& position, int first) {
  constexpr int kRows = kThreads / kWidth / kTileColumns;  // of the tile at a time
  const int lane = threadIdx.x / kWidth, channel = (first + threadIdx.x % kWidth) * kChunk;
  const int x = position.column + lane % kTileColumns;
  int y = position.row + lane / kTileColumns;
  const int64_t offset = window.channels + channel;
  const Element* token = window.token(y, x) + offset;
  const Element* padding =
      window.padding && x < window.key_width ? window.padding + offset : nullptr;
  Element* to = keys + lane * kTileStride<kHeadDim> + channel;
#pragma unroll
  for (int row = 0; row < kTileRows; row += kRows, y += kRows) {
    const Element* from = y < window.key_height ? padding : nullptr;
    if (y < window.height && x < window.width) from = token;
    cp_async_16(to, from, from);
    cp_async_16(to + kTileKeys * kTileStride<kHeadDim>, from ? from + window.channels : from, from);
    token += kRows * window.row_stride;
    to += kRows * kTileColumns * kTileStride<kHeadDim>;
  }
}

// Starts to copy a tile of keys and the values behind it.
template <int kHeadDim, typename Element>
__device__ inline void copy_tile(Element* keys, const Window<Element>& window,
                                 const TilePosition& position) {
  constexpr int kChunks = kHeadDim / kChunk, kWhole = kChunks / 8 * 8;
  if constexpr (kWhole > 0) copy_chunks<kHeadDim, 8>(keys, window, position, 0);
  if constexpr (kChunks > kWhole)
    copy_chunks<kHeadDim, kChunks - kWhole>(keys, window, position, kWhole);
}

// Loads the terms of the lane's four columns of a tile, for each of its queries.
__device__ inline void load_column_terms(float (&of_columns)[2][4], const float* terms,
                                         int stride) {
  const int row = fragment_row(), column = fragment_column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float2 pair =
          *reinterpret_cast<const float2*>(terms + (row + 8 * half) * stride + 4 * i + column);
      of_columns[half][i] = pair.x;
      of_columns[half][i + 1] = pair.y;
    }
  }
}

// Scores begin as the sums of both axes' terms; two fragments are a row of the tile.
__device__ inline void begin_scores(float (&scores)[kTileKeys / 8][4], const float* row_terms,
                                    int stride, const float (&of_columns)[2][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 rows =
        *reinterpret_cast<const float4*>(row_terms + (fragment_row() + 8 * half) * stride);
    const float of_rows[kTileRows] = {rows.x, rows.y, rows.z, rows.w};
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      scores[n][2 * half] = of_rows[n / 2] + of_columns[half][n % 2 * 2];
      scores[n][2 * half + 1] = of_rows[n / 2] + of_columns[half][n % 2 * 2 + 1];
    }
  }
}

// As many as fit into the shared memory of sm_90 for a grid of 64 x 64: registers need not be
// fewer.
template <int kHeadDim>
constexpr int kMostBlocks = kHeadDim <= 64 ? 3 : 2;

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kMostBlocks<kHeadDim>)
    rel_pos_attention_kernel(const RelPosAttention call, unsigned blocks_per_window, float scale) {
  const auto window = locate<Element>(call, blockIdx.x / blocks_per_window);
  const int first = static_cast<int>(blockIdx.x % blocks_per_window) * kQueries;
  const int last = window.tokens() - 1;
  if (first > last) return;
  const int warp_first = first + warp_id() * kWarpQueries;

  constexpr int kTile = kTileKeys * kTileStride<kHeadDim>;
  const int row_stride = row_terms_stride(call.key_height());
  const int column_stride = column_terms_stride(call.key_width());
  Element* const stage = reinterpret_cast<Element*>(dynamic_shared());
  float* const row_terms = reinterpret_cast<float*>(stage + 4 * kTile) +
                           warp_id() * kWarpQueries * (row_stride + column_stride);
  float* const column_terms = row_terms + kWarpQueries * row_stride;

  // Where there are fewer queries, the last one stands in: it is computed again and not stored.
  copy_rows<kHeadDim>(stage, kQueries, threadIdx.x, kThreads,
                      [&](int i) { return window.query(min(first + i, last)); });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  Queries<kHeadDim> queries;
  load_queries<kHeadDim>(queries, stage + warp_id() * kWarpQueries * kTileStride<kHeadDim>);
  int y[2], x[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = min(warp_first + fragment_row() + 8 * half, last);
    y[half] = token / window.width;
    x[half] = token % window.width;
  }
  make_terms<kHeadDim>(row_terms, row_stride, queries, call.rel_pos_h, y, call.window_height,
                       window.key_height, scale, stage);
  make_terms<kHeadDim>(column_terms, column_stride, queries, call.rel_pos_w, x, call.window_width,
                       window.key_width, scale, stage);
  __syncthreads();  // the stage is free, the warp's terms are there

  const int tiles = (window.key_height + kTileRows - 1) / kTileRows *
                    ((window.key_width + kTileColumns - 1) / kTileColumns);
  Statistics statistics;
  float result[kHeadDim / 8][4] = {};
  float of_columns[2][4];
  TilePosition here, next;
  copy_tile<kHeadDim>(stage, window, next);
  cp_async_commit();
  for (int tile = 0; tile < tiles; ++tile, here.advance(window.key_height)) {
    const Element* const keys = stage + tile % 2 * 2 * kTile;
    next.advance(window.key_height);
    if (tile + 1 < tiles) copy_tile<kHeadDim>(stage + (tile + 1) % 2 * 2 * kTile, window, next);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (here.row == 0) load_column_terms(of_columns, column_terms + here.column, column_stride);
    float scores[kTileKeys / 8][4];
    begin_scores(scores, row_terms + here.row, row_stride, of_columns);
    multiply_rows<kHeadDim>(scores, queries, keys);
    float shrink[2];
    exponentiate(scores, statistics, shrink, scale);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) result[n][i] *= shrink[i / 2];
    }
    multiply_values<kHeadDim>(result, scores, keys + kTile);
    __syncthreads();  // before the next tile but one is copied to where this one lies
  }
  store<kHeadDim>(window, warp_first, stage + warp_id() * kWarpQueries * kTileStride<kHeadDim>,
                  result, statistics, scale);
}

template <typename Element, int kHeadDim>
void launch_kernel(const RelPosAttention& call, cudaStream_t stream) {
  const int strides = row_terms_stride(call.key_height()) + column_terms_stride(call.key_width());
  const size_t shared_bytes =
      sizeof(Element) * kStageRows * kTileStride<kHeadDim> + sizeof(float) * kQueries * strides;
  const dim3 grid(static_cast<unsigned>(call.blocks()));
  const float scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  launch(rel_pos_attention_kernel<Element, kHeadDim>, grid, dim3(kThreads), shared_bytes, stream,
         call, static_cast<unsigned>(call.blocks_per_window()), scale);
}

template <typename Element>
void launch_for_head_dim(const RelPosAttention& call, cudaStream_t stream) {
  switch (call.head_dim) {
    case 32:
      return launch_kernel<Element, 32>(call, stream);
    case 64:
      return launch_kernel<Element, 64>(call, stream);
    default:
      return launch_kernel<Element, 80>(call, stream);
  }
}

}  // namespace

void launch_rel_pos_attention(const RelPosAttention& call, cudaStream_t stream) {
  if (is_sam_window(call)) return launch_rel_pos_attention_window(call, stream);
  if (call.is_bfloat16)
    launch_for_head_dim<__nv_bfloat16>(call, stream);
  else
    launch_for_head_dim<__half>(call, stream);
}

}  // namespace refsam::cuda
