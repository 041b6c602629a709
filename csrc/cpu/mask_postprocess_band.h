// A band of a mask on the CPU: what the operator and the kernels of each instruction set share.
// Plain data only, as in rel_pos_attention.h.
#pragma once

#include <stdint.h>

namespace refsam::cpu {

constexpr int64_t kBandRows = 64;   // rows that are computed at a time: two words of every column
constexpr int64_t kMostLanes = 16;  // tables of columns are padded to a multiple of it
constexpr int64_t kStatisticsNone = int64_t{1} << 62;

// The `count` input positions of every output position of an axis, ascending, and their weights,
// one array for each tap. A table of columns repeats the last position behind it.
struct MaskTaps {
  int count;
  const int32_t* index[4];
  const float* weight[4];
};

// The rows from `first` to `last`, of which a word holds 32, of a mask.
struct MaskBand {
  const float* logits;  // low-resolution rows, contiguous
  int64_t low_width, width;
  MaskTaps rows, columns;
  int64_t first, last;
};

struct MaskThresholds {
  float threshold, certain, possible;
};

// The statistics of a band or a mask, in the order of kStatistics; left and top are
// kStatisticsNone where it is empty.
struct MaskStatistics {
  int64_t area, certain, possible, left, top, right, bottom, nan;
};

// The kernels for one instruction set. `scratch` has kMostLanes floats for every low-resolution row
// of the band, aligned to 64 bytes.
struct MaskKernels {
  // The band's bytes; `mask` is the byte of row 0.
  void (*bytes)(const MaskBand& band, float threshold, uint8_t* mask, float* scratch);
  // The band's words of every column, which are `stride` words apart, and its statistics.
  MaskStatistics (*bits)(const MaskBand& band, const MaskThresholds& limits, uint32_t* words,
                         int64_t stride, float* scratch);
};

// Each is null if the library was built for another processor family.
extern const MaskKernels* const kPortableMaskKernels;
extern const MaskKernels* const kAvx2MaskKernels;
extern const MaskKernels* const kAvx512MaskKernels;

}  // namespace refsam::cpu
