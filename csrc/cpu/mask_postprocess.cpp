// Both resizes at once, columns first: a band of output rows needs few low-resolution rows, which
// are widened to the output's width (a gather) and stay in the cache while every output row is
// blended from four of them (contiguous).
#include "mask_postprocess.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <deque>
#include <vector>

#include "simd.h"

namespace refsam::cpu {
namespace {

constexpr int64_t kBandRows = kWordBits;  // so that a band is a word of every column

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

// One pixel of four widened rows; always the same expression, so that bytes and bits are the same.
inline __attribute__((always_inline)) float blended(float r0, float r1, float r2, float r3,
                                                    float w0, float w1, float w2, float w3) {
  return (w0 * r0 + w1 * r1) + (w2 * r2 + w3 * r3);
}

// Four widened rows, their weights -> one row of the mask
REFSAM_SIMD void blend(const float* const rows[kTaps], const float weight[kTaps], int64_t width,
                       float threshold, uint8_t* __restrict mask) {
  const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  const float w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  for (int64_t x = 0; x < width; ++x) {
    mask[x] = blended(r0[x], r1[x], r2[x], r3[x], w0, w1, w2, w3) > threshold;
  }
}

struct Thresholds {
  float threshold, certain, possible;
};

// Pixels above `certain`, above `possible`, and NaN.
struct Counts {
  int32_t certain = 0, possible = 0, nan = 0;
};

// Like blend, but the row becomes bit `bit` of the words of its columns, and pixels are counted.
REFSAM_SIMD Counts blend_bits(const float* const rows[kTaps], const float weight[kTaps],
                              int64_t width, const Thresholds& limits, int bit,
                              uint32_t* __restrict words) {
  const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  const float w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  const float threshold = limits.threshold, above = limits.certain, below = limits.possible;
  const uint32_t set = uint32_t{1} << bit;
  int32_t certain = 0, possible = 0, nan = 0;
  for (int64_t x = 0; x < width; ++x) {
    const float value = blended(r0[x], r1[x], r2[x], r3[x], w0, w1, w2, w3);
    words[x] |= value > threshold ? set : 0;
    certain += value > above;
    possible += value > below;
    nan += value != value;
  }
  return {certain, possible, nan};
}

// Shared by masks of the same sizes.
struct Resizer {
  int64_t low_width, height, width;
  TapTable rows, columns;

  explicit Resizer(const MaskAxes& axes)
      : low_width(axes.columns.low),
        height(axes.rows.output),
        width(axes.columns.output),
        rows(make_taps(axes.rows)),
        columns(make_taps(axes.columns)) {}

  // Calls use_row(y, the four widened rows that row y is blended from, their weights) for the
  // output rows [begin, end) of one mask; `widened` is scratch.
  template <typename UseRow>
  void run_band(const float* logits, int64_t begin, int64_t end, std::vector<float>& widened,
                const UseRow& use_row) const {
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
      use_row(y, lines, weight);
    }
  }
};

int64_t bands_of(int64_t height) { return (height + kBandRows - 1) / kBandRows; }

// The statistics of a band, or of a mask, in the order of kStatistics.
struct Statistics {
  int64_t area = 0, certain = 0, possible = 0;
  int64_t left = kNone, top = kNone, right = 0, bottom = 0;
  int64_t nan = 0;

  static constexpr int64_t kNone = int64_t{1} << 62;

  void add(const Counts& counts) {
    certain += counts.certain;
    possible += counts.possible;
    nan += counts.nan;
  }

  // The words of a band of rows that begins with row `first`.
  void add_words(const uint32_t* words, int64_t width, int64_t first) {
    uint32_t any = 0;
    for (int64_t x = 0; x < width; ++x) {
      if (words[x] == 0) continue;
      area += std::popcount(words[x]);
      any |= words[x];
      left = std::min(left, x);
      right = x + 1;
    }
    if (any == 0) return;
    top = first + std::countr_zero(any);
    bottom = first + kWordBits - std::countl_zero(any);
  }

  void add(const Statistics& other) {
    area += other.area;
    certain += other.certain;
    possible += other.possible;
    left = std::min(left, other.left);
    top = std::min(top, other.top);
    right = std::max(right, other.right);
    bottom = std::max(bottom, other.bottom);
    nan += other.nan;
  }

  void write(int64_t* target) const {
    const bool empty = area == 0;
    const int64_t values[kStatistics] = {
        area, certain, possible, empty ? 0 : left, empty ? 0 : top, right, bottom, nan};
    std::copy(values, values + kStatistics, target);
  }
};

// A band of a mask to be packed: its resizer, and where mask, words and rows lie.
struct BandTask {
  const Resizer* resizer;
  const float* logits;
  uint32_t* words;  // the band's word of the first column
  int64_t mask, first, last;
};

Statistics pack_band(const BandTask& task, const Thresholds& limits, std::vector<float>& widened,
                     std::vector<uint32_t>& line) {
  const Resizer& resizer = *task.resizer;
  const int64_t width = resizer.width, stride = MaskSize{resizer.height, width}.column_words();
  line.assign(width, 0);
  Statistics statistics;
  resizer.run_band(task.logits, task.first, task.last, widened,
                   [&](int64_t y, const float* const lines[kTaps], const float weight[kTaps]) {
                     const int bit = static_cast<int>(y - task.first);
                     statistics.add(blend_bits(lines, weight, width, limits, bit, line.data()));
                   });
  for (int64_t x = 0; x < width; ++x) task.words[x * stride] = line[x];
  statistics.add_words(line.data(), width, task.first);
  return statistics;
}

bool same(const ResizeAxis& a, const ResizeAxis& b) {
  return a.low == b.low && a.image == b.image && a.cropped == b.cropped && a.output == b.output;
}

// One resizer for masks of the same sizes that follow one another.
std::vector<const Resizer*> make_resizers(const std::vector<MaskAxes>& masks,
                                          std::deque<Resizer>& owner) {
  std::vector<const Resizer*> resizers;
  for (size_t i = 0; i < masks.size(); ++i) {
    if (i == 0 || !same(masks[i].rows, masks[i - 1].rows) ||
        !same(masks[i].columns, masks[i - 1].columns))
      owner.emplace_back(masks[i]);
    resizers.push_back(&owner.back());
  }
  return resizers;
}

// Calls use(changes, position) for every word of a packed mask: the bits that differ from the pixel
// before, and the first pixel's place in column-major order.
template <typename Use>
void for_each_word(const uint32_t* words, const MaskSize& size, const Use& use) {
  const int64_t column_words = size.column_words();
  uint32_t carry = 0;
  for (int64_t x = 0; x < size.width; ++x) {
    for (int64_t j = 0; j < column_words; ++j) {
      const uint32_t word = *words++;
      const int bits = static_cast<int>(std::min(kWordBits, size.height - j * kWordBits));
      const uint32_t valid = ~uint32_t{0} >> (kWordBits - bits);
      use((word ^ (word << 1 | carry)) & valid, x * size.height + j * kWordBits);
      carry = word >> (bits - 1) & 1;
    }
  }
}

}  // namespace

void mask_postprocess(const float* logits, const MaskPostprocessSizes& sizes, float threshold,
                      bool* masks) {
  const Resizer resizer({sizes.rows, sizes.columns});
  const int64_t low_pixels = sizes.rows.low * sizes.columns.low;
  const int64_t bands = bands_of(resizer.height), width = resizer.width;
  torch::stable::parallel_for(0, sizes.masks * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> widened;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t mask = task / bands, first = task % bands * kBandRows;
      const int64_t last = std::min(first + kBandRows, resizer.height);
      uint8_t* bytes = reinterpret_cast<uint8_t*>(masks) + mask * resizer.height * width;
      resizer.run_band(logits + mask * low_pixels, first, last, widened,
                       [&](int64_t y, const float* const lines[kTaps], const float weight[kTaps]) {
                         blend(lines, weight, width, threshold, bytes + y * width);
                       });
    }
  });
}

void mask_postprocess_bits(const float* logits, const std::vector<MaskAxes>& masks, float threshold,
                           float stability_offset, uint32_t* words, int64_t* statistics) {
  const Thresholds limits{threshold, threshold + stability_offset, threshold - stability_offset};
  std::deque<Resizer> owner;
  const std::vector<const Resizer*> resizers = make_resizers(masks, owner);
  std::vector<BandTask> tasks;
  for (size_t mask = 0; mask < masks.size(); ++mask) {
    const MaskSize size = masks[mask].size();
    for (int64_t band = 0; band < bands_of(size.height); ++band) {
      const int64_t first = band * kBandRows;
      tasks.push_back({resizers[mask], logits, words + band, static_cast<int64_t>(mask), first,
                       std::min(first + kBandRows, size.height)});
    }
    logits += masks[mask].rows.low * masks[mask].columns.low;
    words += size.words();
  }
  std::vector<Statistics> found(tasks.size());
  torch::stable::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> widened;
    std::vector<uint32_t> line;
    for (int64_t i = begin; i < end; ++i) found[i] = pack_band(tasks[i], limits, widened, line);
  });
  std::vector<Statistics> totals(masks.size());
  for (size_t i = 0; i < tasks.size(); ++i) totals[tasks[i].mask].add(found[i]);
  for (size_t i = 0; i < totals.size(); ++i) totals[i].write(statistics + i * kStatistics);
}

void mask_postprocess_runs(const uint32_t* words, const std::vector<MaskSize>& masks,
                           int64_t capacity, int32_t* ends, int64_t* counts) {
  std::vector<int64_t> begins(masks.size(), 0), offsets(masks.size(), 0);
  for (size_t i = 1; i < masks.size(); ++i) begins[i] = begins[i - 1] + masks[i - 1].words();
  const int64_t number = static_cast<int64_t>(masks.size());
  torch::stable::parallel_for(0, number, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t count = 0;
      for_each_word(words + begins[i], masks[i],
                    [&](uint32_t changes, int64_t) { count += std::popcount(changes); });
      counts[i] = count;
    }
  });
  for (int64_t i = 1; i < number; ++i) offsets[i] = offsets[i - 1] + counts[i - 1];
  torch::stable::parallel_for(0, number, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t place = offsets[i];
      for_each_word(words + begins[i], masks[i], [&](uint32_t changes, int64_t position) {
        for (; changes != 0 && place < capacity; changes &= changes - 1)
          ends[place++] = static_cast<int32_t>(position + std::countr_zero(changes));
      });
    }
  });
}

}  // namespace refsam::cpu
