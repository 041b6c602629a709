// The kernels of mask_postprocess for the instruction set that the including file is compiled for.
//
// kLanes columns are made at a time. The low-resolution rows that the band needs are widened to
// them first, which fits the first cache; then every output row is blended from a few of these.
// Where these rows are all clearly above or below the thresholds, nothing is blended.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "mask_postprocess_band.h"
#include "vector.h"

namespace refsam::cpu {
namespace {

constexpr int64_t kWord = 32;  // rows
// How far rounding may move a blended value, relative to the largest of what it is blended from.
constexpr float kRounding = 4e-6f;

// a if one of them is NaN.
REFSAM_INLINE Vector lower(Vector a, Vector b) {
#ifdef __AVX2__
  asm("vminps %1, %2, %0" : "=v"(b) : "v"(a), "v"(b));
  return b;
#else
  return b < a ? b : a;
#endif
}

// Whether every lane of a comparison holds.
REFSAM_INLINE bool every(IntVector truth) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)truth) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)truth) == 0xff;
#else
  int32_t all = -1;
  for (int lane = 0; lane < kLanes; ++lane) all &= truth[lane];
  return all != 0;
#endif
}

// Lane i of the result is lane index[i].
REFSAM_INLINE Vector permuted(Vector from, IntVector index) {
#ifdef __AVX2__
  Vector result;
  asm("vpermps %2, %1, %0" : "=v"(result) : "v"(index), "v"(from));
  return result;
#else
  Vector result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = from[index[lane]];
  return result;
#endif
}

// Columns x to x + kLanes of the low-resolution rows from `begin` to `end`, kLanes floats a row.
REFSAM_INLINE void widen(const MaskBand& band, int64_t x, int64_t begin, int64_t end, float* tile) {
  const MaskTaps& taps = band.columns;
  const int64_t base = smaller(taps.index[0][x], band.low_width - kLanes);
  const bool is_near = base >= 0 && taps.index[taps.count - 1][x + kLanes - 1] - base < kLanes;
  for (int tap = 0; tap < taps.count; ++tap) {
    const int32_t* index = taps.index[tap] + x;
    const Vector weight = load(taps.weight[tap] + x);
    IntVector near;
    memcpy(&near, index, sizeof(near));
    near -= static_cast<int32_t>(base);
    for (int64_t row = begin; row < end; ++row) {
      const float* from = band.logits + row * band.low_width;
      float* to = tile + (row - begin) * kLanes;
      Vector taken;
      if (is_near) {
        taken = permuted(load(from + base), near);
      } else {
        for (int lane = 0; lane < kLanes; ++lane) taken[lane] = from[index[lane]];
      }
      store(to, tap == 0 ? weight * taken : load(to) + weight * taken);
    }
  }
}

// Row y of a tile that begins with the low-resolution row `low`; always the same expression, so
// that bytes and bits are the same.
template <int kCount>
REFSAM_INLINE Vector blended(const MaskTaps& rows, int64_t y, const float* tile, int64_t low) {
  Vector sum = load(tile + (rows.index[0][y] - low) * kLanes) * rows.weight[0][y];
  for (int tap = 1; tap < kCount; ++tap) {
    sum += load(tile + (rows.index[tap][y] - low) * kLanes) * rows.weight[tap][y];
  }
  return sum;
}

// On which side of all thresholds every pixel of some rows is.
enum class Side { kMixed, kBelow, kAbove };

struct Outlook {
  Side side;
  bool is_finite;
};

// The outlook of the tile's rows from which the output rows `begin` to `end` are blended: their
// weights are positive and sum to 1.
REFSAM_INLINE Outlook outlook_of(const MaskTaps& rows, int64_t begin, int64_t end,
                                 const float* tile, int64_t low, const MaskThresholds& limits) {
  const float* row = tile + (rows.index[0][begin] - low) * kLanes;
  const float* behind = tile + (rows.index[rows.count - 1][end - 1] - low + 1) * kLanes;
  Vector least = load(row), most = least, poison = Vector{};
  for (; row < behind; row += kLanes) {
    const Vector value = load(row);
    least = lower(least, value);
    most = larger(most, value);
    poison += value - value;  // NaN unless it is finite
  }
  const bool is_finite = every(poison == poison);
  const Vector largest = larger(most, -least);
  const Vector above = limits.certain + kRounding * largest;
  const Vector below = limits.possible - kRounding * largest;
  if (is_finite && every(least > above)) return {Side::kAbove, true};
  if (is_finite && every(most < below)) return {Side::kBelow, true};
  return {Side::kMixed, is_finite};
}

// Lanes that stand for a column.
REFSAM_INLINE IntVector valid_lanes(int64_t x, int64_t width) {
  IntVector valid;
  for (int lane = 0; lane < kLanes; ++lane) valid[lane] = x + lane < width ? -1 : 0;
  return valid;
}

// Calls use(x, tile, the tile's first row) for every kLanes columns of the band.
template <class Use>
REFSAM_INLINE void for_each_tile(const MaskBand& band, float* tile, const Use& use) {
  const int64_t low = band.rows.index[0][band.first];
  const int64_t high = band.rows.index[band.rows.count - 1][band.last - 1] + 1;
  for (int64_t x = 0; x < band.width; x += kLanes) {
    widen(band, x, low, high, tile);
    use(x, tile, low);
  }
}

template <int kCount>
void bytes_of(const MaskBand& band, float threshold, uint8_t* mask, float* scratch) {
  const MaskThresholds limits{threshold, threshold, threshold};
  for_each_tile(band, scratch, [&](int64_t x, const float* tile, int64_t low) REFSAM_INLINE_LAMBDA {
    const size_t count = static_cast<size_t>(smaller(kLanes, band.width - x));
    const Side side = outlook_of(band.rows, band.first, band.last, tile, low, limits).side;
    uint8_t* to = mask + band.first * band.width + x;
    for (int64_t y = band.first; y < band.last; ++y, to += band.width) {
      if (side != Side::kMixed) {
        memset(to, side == Side::kAbove, count);
        continue;
      }
      const IntVector truth = blended<kCount>(band.rows, y, tile, low) > threshold;
      const ByteVector inside = __builtin_convertvector(-truth, ByteVector);
      if (count == kLanes) {
        memcpy(to, &inside, kLanes);
      } else {
        memcpy(to, &inside, count);
      }
    }
  });
}

// Pixels of each lane above `certain`, above `possible`, and NaN.
struct LaneCounts {
  IntVector certain, possible, nan;
};

// The words of the rows from `begin` to `end`; pixels of valid lanes are counted.
template <int kCount, bool kMayBeNan>
REFSAM_INLINE IntVector blended_words(const MaskTaps& rows, int64_t begin, int64_t end,
                                      const float* tile, int64_t low, const MaskThresholds& limits,
                                      IntVector valid, LaneCounts& counts) {
  IntVector words{}, certain{}, possible{}, nan{};
  for (int64_t y = begin; y < end; ++y) {
    const Vector value = blended<kCount>(rows, y, tile, low);
    const int32_t bit = static_cast<int32_t>(uint32_t{1} << (y - begin));
    words |= (value > limits.threshold) & bit;
    certain -= value > limits.certain;
    possible -= value > limits.possible;
    if (kMayBeNan) nan -= value != value;
  }
  counts.certain += certain & valid;
  counts.possible += possible & valid;
  counts.nan += nan & valid;
  return words & valid;
}

REFSAM_INLINE int64_t sum_of(IntVector vector) {
  int64_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += vector[lane];
  return sum;
}

// Adds the words of columns x to x + kLanes, whose first row is `first`.
REFSAM_INLINE void describe(const uint32_t* words, int64_t x, int64_t first,
                            MaskStatistics& found) {
  uint32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (words[lane] == 0) continue;
    found.area += __builtin_popcount(words[lane]);
    any |= words[lane];
    found.left = smaller(found.left, x + lane);
    found.right = -smaller(-found.right, -(x + lane + 1));
  }
  if (any == 0) return;
  found.top = smaller(found.top, first + __builtin_ctz(any));
  found.bottom = -smaller(-found.bottom, -(first + kWord - __builtin_clz(any)));
}

template <int kCount>
MaskStatistics bits_of(const MaskBand& band, const MaskThresholds& limits, uint32_t* words,
                       int64_t stride, float* scratch) {
  MaskStatistics found{0, 0, 0, kStatisticsNone, kStatisticsNone, 0, 0, 0};
  LaneCounts counts{};
  for_each_tile(band, scratch, [&](int64_t x, const float* tile, int64_t low) REFSAM_INLINE_LAMBDA {
    const IntVector valid = valid_lanes(x, band.width);
    const int64_t columns = smaller(kLanes, band.width - x);
    for (int64_t begin = band.first; begin < band.last; begin += kWord) {
      const int64_t end = smaller(begin + kWord, band.last);
      const Outlook outlook = outlook_of(band.rows, begin, end, tile, low, limits);
      IntVector made{};
      if (outlook.side == Side::kAbove) {
        const IntVector rows = valid & static_cast<int32_t>(end - begin);
        counts.certain += rows;
        counts.possible += rows;
        made = valid & static_cast<int32_t>(~uint32_t{0} >> (kWord - (end - begin)));
      } else if (outlook.side == Side::kMixed) {
        made = outlook.is_finite ? blended_words<kCount, false>(band.rows, begin, end, tile, low,
                                                                limits, valid, counts)
                                 : blended_words<kCount, true>(band.rows, begin, end, tile, low,
                                                               limits, valid, counts);
      }
      uint32_t column[kLanes];
      memcpy(column, &made, sizeof(column));
      uint32_t* to = words + x * stride + (begin - band.first) / kWord;
      for (int64_t lane = 0; lane < columns; ++lane) to[lane * stride] = column[lane];
      if (outlook.side != Side::kBelow) describe(column, x, begin, found);
    }
  });
  found.certain = sum_of(counts.certain);
  found.possible = sum_of(counts.possible);
  found.nan = sum_of(counts.nan);
  return found;
}

void bytes(const MaskBand& band, float threshold, uint8_t* mask, float* scratch) {
  constexpr decltype(&bytes_of<1>) kOfCount[] = {bytes_of<1>, bytes_of<2>, bytes_of<3>,
                                                 bytes_of<4>};
  kOfCount[band.rows.count - 1](band, threshold, mask, scratch);
}

MaskStatistics bits(const MaskBand& band, const MaskThresholds& limits, uint32_t* words,
                    int64_t stride, float* scratch) {
  constexpr decltype(&bits_of<1>) kOfCount[] = {bits_of<1>, bits_of<2>, bits_of<3>, bits_of<4>};
  return kOfCount[band.rows.count - 1](band, limits, words, stride, scratch);
}

const MaskKernels kMaskKernels{bytes, bits};

}  // namespace
}  // namespace refsam::cpu
