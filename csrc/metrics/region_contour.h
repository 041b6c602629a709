// Region similarity J and contour accuracy F on masks of one bit per pixel. No Python here.
#pragma once

#include <cstdint>
#include <vector>

namespace refsam::metrics {

// A map of flags, one bit per pixel: pixel (y, x) is bit x % 64 of word y * words + x / 64. The
// bits behind the last column are 0.
struct BitMap {
  BitMap(int64_t height, int64_t width)
      : height(height), width(width), words((width + 63) / 64), bits(height * words) {}

  int64_t height, width, words;
  std::vector<uint64_t> bits;
};

// Pixels of an image (height, width), uint8, row after row.
struct Image {
  const uint8_t* pixels;
  int64_t height, width;
};

// A mask with its area in pixels.
struct Region {
  BitMap mask;
  int64_t area;
};

// The boundary of a mask, everything within the disk of one of its pixels, and its length in
// pixels.
struct Contour {
  BitMap boundary, surroundings;
  int64_t length;
};

// Pixels that equal `value`.
BitMap where_equal(const Image& image, uint8_t value);

// Pixels that do not equal `value`.
BitMap where_unequal(const Image& image, uint8_t value);

// Clears the flags that are set in `other`, a map of the same size.
void clear_where(BitMap& map, const BitMap& other);

Region make_region(BitMap mask);

// Boundary pixels are unlike their right, lower or lower right neighbour; past the image's edge
// lies a copy of its last column and row. This is _seg2bmap of davis2017. `reach` is the disk's.
Contour make_contour(const BitMap& mask, const std::vector<int64_t>& reach);

// Half widths of the rows 0..radius of the disk x^2 + y^2 <= radius^2.
std::vector<int64_t> disk_reach(int64_t radius);

// J: intersection over union; 1 if both are empty.
double region_similarity(const Region& prediction, const Region& truth);

// F: harmonic mean of the shares of boundary pixels that have a partner within the disk.
double contour_accuracy(const Contour& prediction, const Contour& truth);

}  // namespace refsam::metrics
