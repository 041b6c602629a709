// Both resizes at once, columns first: a band of output rows needs few low-resolution rows, which
// are widened to the output's width (a gather) and stay in the cache while every output row is
// blended from four of them (contiguous).
#include "mask_postprocess.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "simd.h"

namespace refsam::cpu {
namespace {

constexpr int64_t kBandRows = 32;

// The taps of every output position of an axis, one array per tap.
struct TapTable {
  std::vector<int32_t> index[kTaps];
  std::vector<float> weight[kTaps];
};

TapTable make_taps(const ResizeAxis& axis) {
  TapTable table;
  for (int tap = 0; tap < kTaps; ++tap) {
    table.index[tap].resize(axis.output);
    table.weight[tap].resize(axis.output);
  }
  for (int64_t position = 0; position < axis.output; ++position) {
    const Taps taps = two_resize_taps(position, axis);
    for (int tap = 0; tap < kTaps; ++tap) {
      table.index[tap][position] = taps.index[tap];
      table.weight[tap][position] = taps.weight[tap];
    }
  }
  return table;
}

// row (low) -> widened (width)
REFSAM_SIMD void widen(const float* __restrict row, const TapTable& taps, int64_t width,
                       float* __restrict widened) {
  const int32_t *i0 = taps.index[0].data(), *i1 = taps.index[1].data();
  const int32_t *i2 = taps.index[2].data(), *i3 = taps.index[3].data();
  const float *w0 = taps.weight[0].data(), *w1 = taps.weight[1].data();
  const float *w2 = taps.weight[2].data(), *w3 = taps.weight[3].data();
  for (int64_t x = 0; x < width; ++x) {
    widened[x] =
        (w0[x] * row[i0[x]] + w1[x] * row[i1[x]]) + (w2[x] * row[i2[x]] + w3[x] * row[i3[x]]);
  }
}

// Four widened rows, their weights -> one row of the mask
REFSAM_SIMD void blend(const float* const rows[kTaps], const float weight[kTaps], int64_t width,
                       float threshold, uint8_t* __restrict mask) {
  const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  const float w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  for (int64_t x = 0; x < width; ++x) {
    mask[x] = (w0 * r0[x] + w1 * r1[x]) + (w2 * r2[x] + w3 * r3[x]) > threshold;
  }
}

// Everything about a call that is the same for all its masks.
struct Resizer {
  int64_t low_width, height, width;
  float threshold;
  TapTable rows, columns;

  // Output rows [begin, end) of one mask; `widened` is scratch.
  void run_band(const float* logits, int64_t begin, int64_t end, std::vector<float>& widened,
                uint8_t* mask) const {
    // Positions grow with the row, so the first tap of the first row and the last tap of the last
    // row bound the band.
    const int64_t low = rows.index[0][begin];
    const int64_t high = rows.index[kTaps - 1][end - 1] + 1;
    widened.resize((high - low) * width);
    for (int64_t row = low; row < high; ++row) {
      widen(logits + row * low_width, columns, width, widened.data() + (row - low) * width);
    }
    for (int64_t y = begin; y < end; ++y) {
      const float* lines[kTaps];
      float weight[kTaps];
      for (int tap = 0; tap < kTaps; ++tap) {
        lines[tap] = widened.data() + (rows.index[tap][y] - low) * width;
        weight[tap] = rows.weight[tap][y];
      }
      blend(lines, weight, width, threshold, mask + y * width);
    }
  }
};

}  // namespace

void mask_postprocess(const float* logits, const MaskPostprocessSizes& sizes, float threshold,
                      bool* masks) {
  const Resizer resizer{sizes.columns.low, sizes.rows.output,     sizes.columns.output,
                        threshold,         make_taps(sizes.rows), make_taps(sizes.columns)};
  const int64_t low_pixels = sizes.rows.low * sizes.columns.low;
  const int64_t bands = (resizer.height + kBandRows - 1) / kBandRows;
  torch::stable::parallel_for(0, sizes.masks * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> widened;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t mask = task / bands, first = task % bands * kBandRows;
      const int64_t last = std::min(first + kBandRows, resizer.height);
      uint8_t* bytes = reinterpret_cast<uint8_t*>(masks) + mask * resizer.height * resizer.width;
      resizer.run_band(logits + mask * low_pixels, first, last, widened, bytes);
    }
  });
}

}  // namespace refsam::cpu
