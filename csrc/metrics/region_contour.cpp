#include "region_contour.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#if defined(__SSE2__) && !defined(REFSAM_PORTABLE)
#include <emmintrin.h>
#endif

namespace refsam::metrics {
namespace {

// Bit i says whether pixels[i] equals `value`, for 64 pixels.
#if defined(__SSE2__) && !defined(REFSAM_PORTABLE)
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

// Whether the row has a pixel in the columns first..last.
bool any_between(const uint64_t* row, int64_t first, int64_t last) {
  const int64_t begin = first / 64, end = last / 64;
  const uint64_t head = ~uint64_t{0} << first % 64, tail = low_bits(last % 64 + 1);
  if (begin == end) return (row[begin] & head & tail) != 0;
  if ((row[begin] & head) != 0 || (row[end] & tail) != 0) return true;
  return std::any_of(row + begin + 1, row + end, [](uint64_t word) { return word != 0; });
}

// Whether the contour has a pixel within the disk around (y, x).
bool is_near(const Contour& contour, int64_t y, int64_t x, const std::vector<int64_t>& reach) {
  const BitMap& map = contour.boundary;
  const auto radius = static_cast<int64_t>(reach.size()) - 1;
  const auto row_is_near = [&](int64_t row, int64_t half) {
    return row >= 0 && row < map.height && contour.occupied[row] != 0 &&
           any_between(map.bits.data() + row * map.words, std::max<int64_t>(x - half, 0),
                       std::min(x + half, map.width - 1));
  };
  // Rows from the centre on: most pixels find their partner close by.
  for (int64_t d = 0; d <= radius; ++d) {
    if (row_is_near(y - d, reach[d]) || row_is_near(y + d, reach[d])) return true;
  }
  return false;
}

// The rows y - radius to y + radius of a contour, united.
void unite_rows(const Contour& contour, int64_t y, int64_t radius, std::vector<uint64_t>& united) {
  const BitMap& map = contour.boundary;
  std::fill(united.begin(), united.end(), uint64_t{0});
  const int64_t last = std::min(y + radius, map.height - 1);
  for (int64_t row = std::max<int64_t>(y - radius, 0); row <= last; ++row) {
    if (contour.occupied[row] == 0) continue;
    const uint64_t* bits = map.bits.data() + row * map.words;
    for (int64_t w = 0; w < map.words; ++w) united[w] |= bits[w];
  }
}

// Number of pixels of `from` that have a pixel of `to` within the disk.
int64_t count_near(const Contour& from, const Contour& to, const std::vector<int64_t>& reach) {
  const BitMap& map = from.boundary;
  const auto radius = static_cast<int64_t>(reach.size()) - 1;
  std::vector<uint64_t> band(static_cast<size_t>(map.words));
  int64_t total = 0;
  for (int64_t y = 0; y < map.height; ++y) {
    if (from.occupied[y] == 0) continue;
    unite_rows(to, y, radius, band);
    for (int64_t w = 0; w < map.words; ++w) {
      const uint64_t pixels = map.bits[y * map.words + w];
      uint64_t alone = pixels & ~to.boundary.bits[y * map.words + w];
      total += popcount(pixels) - popcount(alone);
      for (; alone != 0; alone &= alone - 1) {
        const int64_t x = 64 * w + std::countr_zero(alone);
        // Where even the square around the pixel is empty, the disk is too.
        const bool possible = any_between(band.data(), std::max<int64_t>(x - radius, 0),
                                          std::min(x + radius, map.width - 1));
        total += possible && is_near(to, y, x, reach) ? 1 : 0;
      }
    }
  }
  return total;
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

Contour make_contour(const BitMap& mask) {
  Contour contour{BitMap(mask.height, mask.width), 0,
                  std::vector<uint8_t>(static_cast<size_t>(mask.height))};
  for (int64_t y = 0; y < mask.height; ++y) {
    const uint64_t* row = mask.bits.data() + y * mask.words;
    const uint64_t* below = y + 1 < mask.height ? row + mask.words : row;
    uint64_t any = 0;
    for (int64_t w = 0; w < mask.words; ++w) {
      const uint64_t right = right_neighbours(row, w, mask.words, mask.width);
      const uint64_t diagonal = right_neighbours(below, w, mask.words, mask.width);
      const uint64_t found = (row[w] ^ right) | (row[w] ^ below[w]) | (row[w] ^ diagonal);
      contour.boundary.bits[y * mask.words + w] = found;
      contour.length += popcount(found);
      any |= found;
    }
    contour.occupied[y] = any != 0;
  }
  return contour;
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

double contour_accuracy(const Contour& prediction, const Contour& truth,
                        const std::vector<int64_t>& reach) {
  if (prediction.length == 0 || truth.length == 0) {
    return prediction.length == truth.length ? 1.0 : 0.0;
  }
  const double precision = static_cast<double>(count_near(prediction, truth, reach)) /
                           static_cast<double>(prediction.length);
  const double recall =
      static_cast<double>(count_near(truth, prediction, reach)) / static_cast<double>(truth.length);
  const double sum = precision + recall;
  return sum == 0.0 ? 0.0 : 2 * precision * recall / sum;
}

}  // namespace refsam::metrics
