// A register-blocked product of unsigned with signed bytes, summed in 32-bit integers, for the
// instruction set that the including file is compiled for.
#pragma once

#include "int8_linear.h"
#include "vector.h"

namespace refsam::cpu {
namespace {

// The tile that fits the registers: kTileRows x kTileVectors sums.
#ifdef __AVX512F__
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = kInt8Block / kLanes;
#endif
constexpr int kTileRows = kLanes < 8 ? 2 : 6;
// Vectors of a block of output channels, blocks of a tile.
constexpr int kBlockVectors = kInt8Block / kLanes;
constexpr int kTileBlocks = kTileVectors / kBlockVectors;
constexpr int kTileColumns = kTileVectors * kLanes;
constexpr int64_t kAhead = 32;
constexpr int64_t kGroupBytes = kInt8Block * kInt8Group;

// sum + the four products of the bytes `left`, unsigned, with those of each lane of `right`. The
// instructions stand as text: GCC 12 keeps sums in memory where it is given intrinsics for them.
#if defined(__AVX512VNNI__)
constexpr int kLargest = 255;  // of the unsigned bytes
REFSAM_INLINE IntVector dot(IntVector sum, int32_t left, IntVector right) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(left - IntVector{}), "v"(right));
  return sum;
}
#elif defined(REFSAM_VNNI_ENCODING)
constexpr int kLargest = 255;
REFSAM_INLINE IntVector dot(IntVector sum, int32_t left, IntVector right) {
  asm(REFSAM_VNNI_ENCODING " vpdpbusd %2, %1, %0"
      : "+x"(sum)
      : "x"(left - IntVector{}), "x"(right));
  return sum;
}
#elif defined(__AVX2__)
// Sums of two products saturate at 16 bits: with 7 bits on the left none is that large.
constexpr int kLargest = 127;
typedef int16_t ShortVector __attribute__((vector_size(32), may_alias));
REFSAM_INLINE IntVector dot(IntVector sum, int32_t left, IntVector right) {
  ShortVector pairs;
  IntVector fours;
  asm("vpmaddubsw %2, %1, %0" : "=x"(pairs) : "x"(left - IntVector{}), "x"(right));
  asm("vpmaddwd %2, %1, %0" : "=x"(fours) : "x"(pairs), "x"(ShortVector{} + 1));
  return sum + fours;
}
#else
constexpr int kLargest = 255;
REFSAM_INLINE IntVector dot(IntVector sum, int32_t left, IntVector right) {
  for (int byte = 0; byte < kInt8Group; ++byte) {
    const int32_t value = left >> 8 * byte & 255;
    sum += value * (right << (24 - 8 * byte) >> 24);
  }
  return sum;
}
#endif

// kTileRows x V sums of rows of bytes `row_stride` apart with V vectors of weights, to rows
// `sum_stride` apart. Meanwhile kAhead bytes for each group come into the second cache from
// `ahead` on. A function of its own: see multiply_tile in rel_pos_attention_simd.h.
template <int V>
__attribute__((noinline)) void multiply_bytes(const uint8_t* left, int64_t row_stride,
                                              const int8_t* right, int64_t groups,
                                              const int8_t* ahead, int32_t* sums,
                                              int64_t sum_stride) {
  IntVector sum[kTileRows][V]{};
  const int64_t block_stride = groups * kGroupBytes;
  for (int64_t group = 0; group < groups; ++group) {
    IntVector column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t block = v / kBlockVectors, within = v % kBlockVectors;
      column[v] = (IntVector)load(right + block * block_stride + within * sizeof(Vector));
    }
#pragma GCC unroll 6
    for (int row = 0; row < kTileRows; ++row) {
      int32_t bytes;
      memcpy(&bytes, left + row * row_stride, sizeof(bytes));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[row][v] = dot(sum[row][v], bytes, column[v]);
    }
    __builtin_prefetch(ahead, 0, 2);
    ahead += kAhead;
    left += kInt8Group;
    right += kGroupBytes;
  }
#pragma GCC unroll 6
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sums + row * sum_stride + v * kLanes, (Vector)sum[row][v]);
  }
}

// The same for `blocks` <= kTileBlocks of output channels, known at run time.
inline void multiply_blocks(const uint8_t* left, int64_t row_stride, const int8_t* right,
                            int64_t groups, int64_t blocks, const int8_t* ahead, int32_t* sums,
                            int64_t sum_stride) {
  if constexpr (kTileBlocks == 4) {
    if (blocks == 3)
      return multiply_bytes<3>(left, row_stride, right, groups, ahead, sums, sum_stride);
    if (blocks == 2)
      return multiply_bytes<2>(left, row_stride, right, groups, ahead, sums, sum_stride);
    if (blocks == 1)
      return multiply_bytes<1>(left, row_stride, right, groups, ahead, sums, sum_stride);
  }
  multiply_bytes<kTileVectors>(left, row_stride, right, groups, ahead, sums, sum_stride);
}

}  // namespace
}  // namespace refsam::cpu
