// Shared by the CPU and the CUDA implementation of mask_postprocess: its sizes, and the weights of
// SAM's two bilinear resizes (low resolution -> image_size -> crop -> output), which along one axis
// are four taps per output pixel.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define REFSAM_HOST_DEVICE __host__ __device__
#else
#define REFSAM_HOST_DEVICE
#endif

namespace refsam {

constexpr int kTaps = 4;

// One axis of the two resizes: `low` pixels are resized to `image`, of which the first `cropped`
// are resized to `output`.
struct ResizeAxis {
  int64_t low, image, cropped, output;
};

struct Taps {
  int32_t index[kTaps];
  float weight[kTaps];
};

struct BilinearSource {
  int32_t first, second;
  float share;  // of `second`
};

// A product that is rounded before it is added to something, by every compiler.
REFSAM_HOST_DEVICE inline float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Where output pixel `position` of a bilinear resize (half-pixel centres) lies in its input. In
// float, as ATen does it: exact positions would differ from F.interpolate by up to 6e-5 pixels at
// size 1024.
REFSAM_HOST_DEVICE inline BilinearSource bilinear_source(int64_t position, int64_t input,
                                                         int64_t output) {
  const float scale = static_cast<float>(input) / static_cast<float>(output);
  const float source = rounded_product(scale, static_cast<float>(position) + 0.5f) - 0.5f;
  const float clamped = source > 0.0f ? source : 0.0f;
  const int32_t last = static_cast<int32_t>(input) - 1;
  int32_t first = static_cast<int32_t>(clamped);
  first = first < last ? first : last;
  const float share = clamped - static_cast<float>(first);
  return {first, first < last ? first + 1 : first, share < 1.0f ? share : 1.0f};
}

// The low-resolution pixels that output pixel `position` is made of.
REFSAM_HOST_DEVICE inline Taps two_resize_taps(int64_t position, const ResizeAxis& axis) {
  const BilinearSource outer = bilinear_source(position, axis.cropped, axis.output);
  const BilinearSource near = bilinear_source(outer.first, axis.low, axis.image);
  const BilinearSource far = bilinear_source(outer.second, axis.low, axis.image);
  const float stay = 1.0f - outer.share;
  return {{near.first, near.second, far.first, far.second},
          {stay * (1.0f - near.share), stay * near.share, outer.share * (1.0f - far.share),
           outer.share * far.share}};
}

struct MaskPostprocessSizes {
  int64_t masks;
  ResizeAxis rows, columns;
};

// Packed masks: columns one after another, of each ceil(height / kWordBits) words, the lowest bit
// on top, bits below the last row 0.
constexpr int64_t kWordBits = 32;
// area, certain, possible, left, top, right, bottom, nan: refsam_kernels/mask_postprocess/layout.py
// says what they are.
constexpr int64_t kStatistics = 8;

struct MaskSize {
  int64_t height, width;

  REFSAM_HOST_DEVICE int64_t column_words() const { return (height + kWordBits - 1) / kWordBits; }
  REFSAM_HOST_DEVICE int64_t words() const { return width * column_words(); }
};

struct MaskAxes {
  ResizeAxis rows, columns;

  MaskSize size() const { return {rows.output, columns.output}; }
};

}  // namespace refsam
