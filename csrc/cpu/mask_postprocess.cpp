// Both resizes at once, in bands of rows that a thread computes with the kernels of the best
// instruction set; and from bits to run lengths.
#include "mask_postprocess.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <deque>
#include <vector>

#include "instruction_set.h"
#include "mask_postprocess_band.h"
#include "scratch.h"

namespace refsam::cpu {
namespace {

static_assert(kBandRows % kWordBits == 0 && sizeof(MaskStatistics) == kStatistics * 8);

// REFSAM_CPU_INSTRUCTION_SET is read here: the operator is the same on every device.
const MaskKernels& choose_kernels() {
  const char* name = std::getenv("REFSAM_CPU_INSTRUCTION_SET");
  switch (choose_instruction_set(name ? name : "")) {
    case kAvx512Bf16:
    case kAvx512Vnni:
    case kAvx512:
      return *kAvx512MaskKernels;
    case kAvx512Vl:
    case kAvxVnni:
    case kAvx2:
      return *kAvx2MaskKernels;
    default:
      return *kPortableMaskKernels;
  }
}

// The taps of every output position of an axis, those of the same input position in one.
class TapTable {
 public:
  explicit TapTable(const ResizeAxis& axis) {
    const int64_t size = (axis.output + kMostLanes - 1) / kMostLanes * kMostLanes;
    for (int tap = 0; tap < kTaps; ++tap) {
      index_[tap].resize(size);
      weight_[tap].resize(size);
    }
    for (int64_t position = 0; position < size; ++position)
      add(position, two_resize_taps(std::min(position, axis.output - 1), axis));
  }

  MaskTaps view() const {
    MaskTaps taps{count_, {}, {}};
    for (int tap = 0; tap < kTaps; ++tap) {
      taps.index[tap] = index_[tap].data();
      taps.weight[tap] = weight_[tap].data();
    }
    return taps;
  }

 private:
  void add(int64_t position, const Taps& taps) {
    int count = 0;
    for (int tap = 0; tap < kTaps; ++tap) {
      if (taps.weight[tap] == 0) continue;
      int place = 0;
      while (place < count && index_[place][position] < taps.index[tap]) ++place;
      if (place == count || index_[place][position] != taps.index[tap]) {
        for (int moved = count++; moved > place; --moved) {
          index_[moved][position] = index_[moved - 1][position];
          weight_[moved][position] = weight_[moved - 1][position];
        }
        index_[place][position] = taps.index[tap];
        weight_[place][position] = 0;
      }
      weight_[place][position] += taps.weight[tap];
    }
    count_ = std::max(count_, count);
    for (; count < kTaps; ++count) {
      index_[count][position] = index_[count - 1][position];
      weight_[count][position] = 0;
    }
  }

  std::vector<int32_t> index_[kTaps];
  std::vector<float> weight_[kTaps];
  int count_ = 1;
};

int64_t bands_of(int64_t height) { return (height + kBandRows - 1) / kBandRows; }

// Shared by masks of the same sizes.
struct Resizer {
  TapTable rows, columns;
  MaskBand all;  // of a mask without logits

  explicit Resizer(const MaskAxes& axes)
      : rows(axes.rows),
        columns(axes.columns),
        all{nullptr, axes.columns.low, axes.columns.output, rows.view(), columns.view(),
            0,       axes.rows.output} {}

  MaskBand band(const float* logits, int64_t number) const {
    MaskBand band = all;
    band.logits = logits;
    band.first = number * kBandRows;
    band.last = std::min(band.first + kBandRows, all.last);
    return band;
  }
};

// Low-resolution rows from which no band needs more.
int64_t most_rows(const std::vector<MaskAxes>& masks) {
  int64_t most = 0;
  for (const MaskAxes& mask : masks) most = std::max(most, mask.rows.low);
  return most;
}

Scratch scratch_of(int64_t rows) {
  return allocate(rows * kMostLanes * static_cast<int64_t>(sizeof(float)));
}

float* floats(const Scratch& scratch) { return reinterpret_cast<float*>(scratch.get()); }

void add(const MaskStatistics& band, MaskStatistics& mask) {
  mask.area += band.area;
  mask.certain += band.certain;
  mask.possible += band.possible;
  mask.left = std::min(mask.left, band.left);
  mask.top = std::min(mask.top, band.top);
  mask.right = std::max(mask.right, band.right);
  mask.bottom = std::max(mask.bottom, band.bottom);
  mask.nan += band.nan;
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

// A band of a mask to be packed.
struct BandTask {
  MaskBand band;
  uint32_t* words;  // the band's first word of the first column
  int64_t stride;
  size_t mask;
};

std::vector<BandTask> make_tasks(const float* logits, const std::vector<MaskAxes>& masks,
                                 const std::vector<const Resizer*>& resizers, uint32_t* words) {
  std::vector<BandTask> tasks;
  for (size_t mask = 0; mask < masks.size(); ++mask) {
    const MaskSize size = masks[mask].size();
    for (int64_t band = 0; band < bands_of(size.height); ++band)
      tasks.push_back({resizers[mask]->band(logits, band), words + band * (kBandRows / kWordBits),
                       size.column_words(), mask});
    logits += masks[mask].rows.low * masks[mask].columns.low;
    words += size.words();
  }
  return tasks;
}

// Where the runs of a packed mask end, one after another.
void find_ends(const uint32_t* words, const MaskSize& size, std::vector<int32_t>& ends) {
  const int64_t column_words = size.column_words();
  const int last_bits = static_cast<int>(size.height - (column_words - 1) * kWordBits);
  uint32_t carry = 0;  // the pixel before
  for (int64_t x = 0; x < size.width; ++x) {
    int64_t position = x * size.height;
    for (int64_t j = 0; j < column_words; ++j, position += kWordBits) {
      const uint32_t word = *words++;
      const int bits = j + 1 < column_words ? static_cast<int>(kWordBits) : last_bits;
      uint32_t changes = (word ^ (word << 1 | carry)) & ~uint32_t{0} >> (kWordBits - bits);
      carry = word >> (bits - 1) & 1;
      for (; changes != 0; changes &= changes - 1)
        ends.push_back(static_cast<int32_t>(position + std::countr_zero(changes)));
    }
  }
}

// One number of COCO's format, whose bits come in fives, the lowest first; returns what is behind
// it.
uint8_t* write_number(int64_t number, uint8_t* text) {
  for (bool more = true; more;) {
    const int64_t bits = number & 31;
    number >>= 5;
    more = number != (bits & 16 ? -1 : 0);
    *text++ = static_cast<uint8_t>(bits + (more ? 32 : 0) + 48);
  }
  return text;
}

}  // namespace

void mask_postprocess(const float* logits, const MaskPostprocessSizes& sizes, float threshold,
                      bool* masks) {
  const MaskKernels& kernels = choose_kernels();
  const Resizer resizer({sizes.rows, sizes.columns});
  const int64_t low_pixels = sizes.rows.low * sizes.columns.low;
  const int64_t bands = bands_of(sizes.rows.output);
  const int64_t pixels = sizes.rows.output * sizes.columns.output;
  torch::stable::parallel_for(0, sizes.masks * bands, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = scratch_of(sizes.rows.low);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t mask = task / bands;
      kernels.bytes(resizer.band(logits + mask * low_pixels, task % bands), threshold,
                    reinterpret_cast<uint8_t*>(masks) + mask * pixels, floats(scratch));
    }
  });
}

void mask_postprocess_bits(const float* logits, const std::vector<MaskAxes>& masks, float threshold,
                           float stability_offset, uint32_t* words, int64_t* statistics) {
  const MaskKernels& kernels = choose_kernels();
  const MaskThresholds limits{threshold, threshold + stability_offset,
                              threshold - stability_offset};
  std::deque<Resizer> owner;
  const std::vector<BandTask> tasks = make_tasks(logits, masks, make_resizers(masks, owner), words);
  std::vector<MaskStatistics> found(tasks.size());
  torch::stable::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = scratch_of(most_rows(masks));
    for (int64_t i = begin; i < end; ++i)
      found[i] =
          kernels.bits(tasks[i].band, limits, tasks[i].words, tasks[i].stride, floats(scratch));
  });
  MaskStatistics* totals = reinterpret_cast<MaskStatistics*>(statistics);
  for (size_t i = 0; i < masks.size(); ++i)
    totals[i] = {0, 0, 0, kStatisticsNone, kStatisticsNone, 0, 0, 0};
  for (size_t i = 0; i < tasks.size(); ++i) add(found[i], totals[tasks[i].mask]);
  for (size_t i = 0; i < masks.size(); ++i)
    if (totals[i].area == 0) totals[i].left = totals[i].top = 0;
}

void mask_postprocess_runs(const uint32_t* words, const std::vector<MaskSize>& masks,
                           int64_t capacity, int32_t* ends, int64_t* counts) {
  std::vector<int64_t> begins(masks.size(), 0);
  for (size_t i = 1; i < masks.size(); ++i) begins[i] = begins[i - 1] + masks[i - 1].words();
  std::vector<std::vector<int32_t>> found(masks.size());
  torch::stable::parallel_for(0, masks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) find_ends(words + begins[i], masks[i], found[i]);
  });
  int64_t place = 0;
  for (size_t i = 0; i < masks.size(); ++i) {
    counts[i] = static_cast<int64_t>(found[i].size());
    const int64_t copied = std::min(counts[i], capacity - place);
    std::copy_n(found[i].data(), copied, ends + place);
    place += copied;
  }
}

void mask_postprocess_characters(const int32_t* ends, const std::vector<int64_t>& counts,
                                 const std::vector<MaskSize>& masks, uint8_t* text,
                                 int64_t* lengths) {
  std::vector<int64_t> begins(masks.size(), 0);
  for (size_t i = 1; i < masks.size(); ++i) begins[i] = begins[i - 1] + counts[i - 1];
  torch::stable::parallel_for(0, masks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* const first = text + kMostCharacters * (begins[i] + i);
      uint8_t* place = first;
      int64_t before = 0, lengths_before[2] = {0, 0};  // of the last two runs, the older one first
      for (int64_t run = 0; run <= counts[i]; ++run) {
        const int64_t bound =
            run < counts[i] ? ends[begins[i] + run] : masks[i].height * masks[i].width;
        const int64_t length = bound - before;
        place = write_number(run > 2 ? length - lengths_before[0] : length, place);
        before = bound;
        lengths_before[0] = lengths_before[1];
        lengths_before[1] = length;
      }
      lengths[i] = place - first;
    }
  });
}

}  // namespace refsam::cpu
