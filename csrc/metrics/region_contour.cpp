#include "region_contour.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace refsam::metrics {
namespace {

// Bit i says whether pixels[i] equals `value`, for 64 pixels.
#ifdef __SSE2__
uint64_t equal_bits(const uint8_t* pixels, uint8_t value) {
  const __m128i wanted = _mm_set1_epi8(static_cast<char>(value));
  uint64_t result = 0;
  for (int part = 0; part < 4; ++part) {
    const __m128i block = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels + 16 * part));
    const auto mask = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(block, wanted)));
    result |= static_cast<uint64_t>(mask) << (16 * part);
  }
  return result;
}
#else
uint64_t equal_bits(const uint8_t* pixels, uint8_t value) {
  uint64_t result = 0;
  for (int i = 0; i < 64; ++i) result |= static_cast<uint64_t>(pixels[i] == value) << i;
  return result;
}
#endif

// Mask of the lowest `count` bits, 1 to 64.
uint64_t low_bits(int64_t count) { return ~uint64_t{0} >> (64 - count); }

// The flags of all pixels, those that equal `value` inverted by `flip`.
BitMap pack(const Image& image, uint8_t value, uint64_t flip) {
  BitMap map(image.height, image.width);
  const int64_t whole = image.width / 64, rest = image.width % 64;
  for (int64_t y = 0; y < image.height; ++y) {
    const uint8_t* row = image.pixels + y * image.width;
    uint64_t* out = map.bits.data() + y * map.words;
    for (int64_t w = 0; w < whole; ++w) out[w] = equal_bits(row + 64 * w, value) ^ flip;
    if (rest == 0) continue;
    uint8_t tail[64] = {};
    std::memcpy(tail, row + 64 * whole, static_cast<size_t>(rest));
    out[whole] = (equal_bits(tail, value) ^ flip) & low_bits(rest);
  }
  return map;
}

// Number of set bits; most words of a mask are empty, and without the popcnt instruction, which the
// oldest x86-64 lacks, counting is slow.
int64_t popcount(uint64_t word) { return word == 0 ? 0 : std::popcount(word); }

int64_t count(const BitMap& map) {
  int64_t total = 0;
  for (const uint64_t word : map.bits) total += popcount(word);
  return total;
}

int64_t count_common(const BitMap& a, const BitMap& b) {
  int64_t total = 0;
  for (size_t i = 0; i < a.bits.size(); ++i) total += popcount(a.bits[i] & b.bits[i]);
  return total;
}

// The row moved by one pixel to the left, its last pixel kept: word w of it.
uint64_t right_neighbours(const uint64_t* row, int64_t w, int64_t words, int64_t width) {
  if (w + 1 < words) return row[w] >> 1 | row[w + 1] << 63;
  const int64_t last = (width - 1) % 64;
  return row[w] >> 1 | (row[w] & uint64_t{1} << last);
}

// Some words of a row.
struct Span {
  int64_t begin, end;
};

// The words of a row that have pixels, widened by `radius` pixels on both sides.
Span reached_words(const uint64_t* row, int64_t words, int64_t radius) {
  const auto occupied = [](uint64_t word) { return word != 0; };
  const uint64_t* first = std::find_if(row, row + words, occupied);
  if (first == row + words) return {0, 0};
  const uint64_t* last = row + words - 1;
  while (*last == 0) --last;
  const int64_t margin = (radius + 63) / 64;
  return {std::max<int64_t>(first - row - margin, 0), std::min(last - row + 1 + margin, words)};
}

// Adds to a row itself moved by `step` pixels, 1 to 63, to the left and to the right.
void widen(std::vector<uint64_t>& row, Span span, int64_t step) {
  uint64_t before = 0;
  for (int64_t w = span.begin; w < span.end; ++w) {
    const uint64_t here = row[w], after = w + 1 < span.end ? row[w + 1] : 0;
    row[w] = here | here << step | here >> step | before >> (64 - step) | after << (64 - step);
    before = here;
  }
}

// All pixels within the disk of a boundary pixel; bits behind the last column may be set.
BitMap dilate(const BitMap& boundary, const std::vector<int64_t>& reach) {
  const auto radius = static_cast<int64_t>(reach.size()) - 1;
  BitMap result(boundary.height, boundary.width);
  std::vector<uint64_t> row(static_cast<size_t>(boundary.words));
  for (int64_t y = 0; y < boundary.height; ++y) {
    const uint64_t* bits = boundary.bits.data() + y * boundary.words;
    const Span span = reached_words(bits, boundary.words, radius);
    if (span.begin == span.end) continue;
    std::copy(bits + span.begin, bits + span.end, row.begin() + span.begin);
    int64_t half = 0;
    // From the disk's narrow ends to its centre, so that the row only ever grows.
    for (int64_t d = radius; d >= 0; --d) {
      while (half < reach[d]) {
        // A longer step would leave gaps.
        const int64_t step = std::min<int64_t>({reach[d] - half, 2 * half + 1, 63});
        widen(row, span, step);
        half += step;
      }
      for (const int64_t target : {y - d, y + d}) {
        if (target < 0 || target >= boundary.height) continue;
        uint64_t* out = result.bits.data() + target * boundary.words;
        for (int64_t w = span.begin; w < span.end; ++w) out[w] |= row[w];
      }
    }
  }
  return result;
}

}  // namespace

BitMap where_equal(const Image& image, uint8_t value) { return pack(image, value, 0); }

BitMap where_unequal(const Image& image, uint8_t value) { return pack(image, value, ~uint64_t{0}); }

void clear_where(BitMap& map, const BitMap& other) {
  for (size_t i = 0; i < map.bits.size(); ++i) map.bits[i] &= ~other.bits[i];
}

Region make_region(BitMap mask) {
  const int64_t area = count(mask);
  return {std::move(mask), area};
}

Contour make_contour(const BitMap& mask, const std::vector<int64_t>& reach) {
  BitMap boundary(mask.height, mask.width);
  for (int64_t y = 0; y < mask.height; ++y) {
    const uint64_t* row = mask.bits.data() + y * mask.words;
    const uint64_t* below = y + 1 < mask.height ? row + mask.words : row;
    for (int64_t w = 0; w < mask.words; ++w) {
      const uint64_t right = right_neighbours(row, w, mask.words, mask.width);
      const uint64_t diagonal = right_neighbours(below, w, mask.words, mask.width);
      boundary.bits[y * mask.words + w] =
          (row[w] ^ right) | (row[w] ^ below[w]) | (row[w] ^ diagonal);
    }
  }
  const int64_t length = count(boundary);
  BitMap surroundings = dilate(boundary, reach);
  return {std::move(boundary), std::move(surroundings), length};
}

std::vector<int64_t> disk_reach(int64_t radius) {
  std::vector<int64_t> reach(static_cast<size_t>(radius) + 1);
  int64_t half = radius;
  for (int64_t y = 0; y <= radius; ++y) {
    while (half * half + y * y > radius * radius) --half;
    reach[y] = half;
  }
  return reach;
}

double region_similarity(const Region& prediction, const Region& truth) {
  const int64_t common = count_common(prediction.mask, truth.mask);
  const int64_t together = prediction.area + truth.area - common;
  return together == 0 ? 1.0 : static_cast<double>(common) / static_cast<double>(together);
}

double contour_accuracy(const Contour& prediction, const Contour& truth) {
  if (prediction.length == 0 || truth.length == 0) {
    return prediction.length == truth.length ? 1.0 : 0.0;
  }
  const auto share_near = [](const Contour& one, const Contour& other) {
    return static_cast<double>(count_common(one.boundary, other.surroundings)) /
           static_cast<double>(one.length);
  };
  const double precision = share_near(prediction, truth), recall = share_near(truth, prediction);
  const double sum = precision + recall;
  return sum == 0.0 ? 0.0 : 2 * precision * recall / sum;
}

}  // namespace refsam::metrics
