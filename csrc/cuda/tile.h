// Tiles of matrices in shared memory, and products that one warp takes of them: 16 rows of the left
// matrix a, columns in pairs of eight. A lane's part of a product lies as fragment d of mma.h, for
// every element type: half precision multiplies on tensor cores, single precision as it is written.
#pragma once

#include "mma.h"
#include "warp.h"

namespace refsam::cuda {

constexpr int kFragment = 16;
constexpr int kCopyBytes = 16;

__host__ __device__ constexpr int round_up(int count, int multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Elements between rows of a tile whose rows hold `columns` elements, in whole fragments: aligned,
// and eight consecutive rows begin in different banks.
template <typename T>
__host__ __device__ constexpr int tile_stride(int columns) {
  return round_up(columns, kFragment) + kCopyBytes / static_cast<int>(sizeof(T));
}

// A matrix in global memory, of which `rows` and `columns` exist; the rest is zero.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row_stride, column_stride;
  int rows, columns;

  __device__ T at(int row, int column) const {
    const bool exists = row < rows && column < columns;
    return exists ? data[row * row_stride + column * column_stride] : static_cast<T>(0.0f);
  }

  // Whether columns 2i and 2i+1 of every row can be read at once, given that they exist.
  __device__ bool has_pairs() const {
    const auto address = reinterpret_cast<uintptr_t>(data);
    return column_stride == 1 && row_stride % 2 == 0 && address % (2 * sizeof(T)) == 0;
  }
};

// Starts to copy the matrix to a tile of tile_rows x tile_columns by `threads` threads; the copy is
// there after tile_loaded().
template <typename T>
__device__ inline void load_tile(T* tile, int stride, const Matrix<T>& from, int tile_rows,
                                 int tile_columns, int threads) {
  constexpr int kChunk = kCopyBytes / sizeof(T);
  const bool in_chunks = reinterpret_cast<uintptr_t>(from.data) % kCopyBytes == 0 &&
                         from.column_stride == 1 && from.row_stride % kChunk == 0 &&
                         from.columns % kChunk == 0;
  const int step = in_chunks ? kChunk : 1;
  const int chunks = tile_columns / step;
  for (int i = static_cast<int>(threadIdx.x); i < tile_rows * chunks; i += threads) {
    const int row = i / chunks, column = i % chunks * step;
    T* to = tile + row * stride + column;
    if (in_chunks) {
      const bool exists = row < from.rows && column < from.columns;
      cp_async_16(to, exists ? from.data + row * from.row_stride + column : from.data, exists);
    } else {
      *to = from.at(row, column);
    }
  }
}

// Waits until the block's tiles are loaded.
__device__ inline void tile_loaded() {
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
}

// The lane's rows and columns of a fragment: row and row + 8, column and column + 1.
__device__ inline int fragment_row() { return lane_id() / 4; }
__device__ inline int fragment_column() { return lane_id() % 4 * 2; }

// Sixteen rows and as many columns of a tile as left operand; kTransposed: the tile has the columns
// as rows.
template <bool kTransposed, typename T>
__device__ inline void load_left(uint32_t (&fragment)[4], const T* tile, int stride) {
  const int lane = lane_id(), low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
  if constexpr (kTransposed)
    ldmatrix_x4_trans(fragment, tile + (low + third) * stride + second);
  else
    ldmatrix_x4(fragment, tile + (low + second) * stride + third);
}

// Sixteen columns of the right operand, which are rows of a tile (kTransposed: columns), as two.
template <bool kTransposed, typename T>
__device__ inline void load_right(uint32_t (&fragment)[4], const T* tile, int stride) {
  const int lane = lane_id(), low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
  if constexpr (kTransposed)
    ldmatrix_x4_trans(fragment, tile + (low + second) * stride + third);
  else
    ldmatrix_x4(fragment, tile + (low + third) * stride + second);
}

// The same from global memory, columns first_row, ... of the right operand and rows depth, ...
template <typename T>
__device__ inline void load_right(uint32_t (&fragment)[4], const Matrix<T>& from, int first_row,
                                  int depth, bool has_pairs) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + fragment_row() + i / 2 * 8;
    const int column = depth + fragment_column() + i % 2 * 8;
    if (has_pairs && row < from.rows && column + 1 < from.columns) {
      fragment[i] = *reinterpret_cast<const uint32_t*>(from.data + row * from.row_stride + column);
    } else {
      const T pair[2] = {from.at(row, column), from.at(row, column + 1)};
      fragment[i] = static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(pair[0])) |
                    static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(pair[1])) << 16;
    }
  }
}

template <typename T>
__device__ inline void multiply_fragments(float (&first)[4], float (&second)[4],
                                          const uint32_t (&left)[4], const uint32_t (&right)[4]) {
  mma_m16n8k16<T>(first, left, {right[0], right[1]});
  mma_m16n8k16<T>(second, left, {right[2], right[3]});
}

// One step of a product in single precision: left(row) and right(column) of one depth.
template <int kEights, typename Left, typename Right>
__device__ inline void multiply_singles(float (&sums)[kEights][4], const Left& left,
                                        const Right& right) {
  const float upper = left(fragment_row()), lower = left(fragment_row() + 8);
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    const float even = right(8 * i + fragment_column()), odd = right(8 * i + fragment_column() + 1);
    sums[i][0] += upper * even;
    sums[i][1] += upper * odd;
    sums[i][2] += lower * even;
    sums[i][3] += lower * odd;
  }
}

// sums += a b: a (16, depth) and the columns of b (8 * kEights, depth) are rows of tiles, or, where
// transposed, columns; depth in whole fragments.
template <bool kLeftTransposed, bool kRightTransposed, typename T, int kEights>
__device__ inline void multiply(float (&sums)[kEights][4], const T* a, int a_stride, const T* b,
                                int b_stride, int depth) {
  static_assert(kEights % 2 == 0);
  if constexpr (sizeof(T) == sizeof(float)) {
    for (int k = 0; k < depth; ++k)
      multiply_singles(
          sums,
          [&](int row) { return kLeftTransposed ? a[k * a_stride + row] : a[row * a_stride + k]; },
          [&](int column) {
            return kRightTransposed ? b[k * b_stride + column] : b[column * b_stride + k];
          });
  } else {
    for (int k = 0; k < depth; k += kFragment) {
      uint32_t left[4], right[4];
      load_left<kLeftTransposed>(left, kLeftTransposed ? a + k * a_stride : a + k, a_stride);
#pragma unroll
      for (int i = 0; i < kEights; i += 2) {
        load_right<kRightTransposed>(
            right, kRightTransposed ? b + k * b_stride + 8 * i : b + 8 * i * b_stride + k,
            b_stride);
        multiply_fragments<T>(sums[i], sums[i + 1], left, right);
      }
    }
  }
}

// The same for kTiles times 16 rows of a and 16 columns of b, rows first_row, ... of a matrix in
// global memory: each is read by one warp only, so shared memory would save nothing.
template <bool kLeftTransposed, typename T, int kTiles>
__device__ inline void multiply(float (&sums)[kTiles][2][4], const T* a, int a_stride,
                                const Matrix<T>& b, int first_row, int depth) {
  const auto tile = [&](int i, int k) {
    return kLeftTransposed ? a + k * a_stride + i * kFragment : a + i * kFragment * a_stride + k;
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    for (int k = 0; k < depth; ++k)
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        multiply_singles(
            sums[i], [&](int row) { return tile(i, k)[row * (kLeftTransposed ? 1 : a_stride)]; },
            [&](int column) { return b.at(first_row + column, k); });
  } else {
    const bool has_pairs = b.has_pairs();
#pragma unroll 4
    for (int k = 0; k < depth; k += kFragment) {
      uint32_t left[4], right[4];
      load_right(right, b, first_row, k, has_pairs);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        load_left<kLeftTransposed>(left, tile(i, k), a_stride);
        multiply_fragments<T>(sums[i][0], sums[i][1], left, right);
      }
    }
  }
}

// Calls visit(row, column, value) for the lane's part of 16 x 8 * kEights products.
template <int kEights, typename Visit>
__device__ inline void for_each(const float (&sums)[kEights][4], const Visit& visit) {
#pragma unroll
  for (int i = 0; i < kEights; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      visit(fragment_row() + j / 2 * 8, 8 * i + fragment_column() + j % 2, sums[i][j]);
}

}  // namespace refsam::cuda
