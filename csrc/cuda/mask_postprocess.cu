// One thread makes four neighbouring pixels of a row, each from 4 x 4 low-resolution pixels.
// Nothing of full size but the mask itself is written; the low-resolution logits stay in the L2
// cache.
#include <algorithm>

#include "launch.h"
#include "mask_postprocess.h"

namespace refsam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPixels = 4;

__global__ void mask_postprocess_kernel(const float* __restrict__ logits,  // (P, 4h, 4w)
                                        MaskPostprocessSizes sizes, float threshold,
                                        uint8_t* __restrict__ masks) {  // (P, H, W)
  const int64_t height = sizes.rows.output, width = sizes.columns.output;
  const int64_t left = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPixels;
  if (left >= width) return;
  Taps columns[kPixels];
  for (int pixel = 0; pixel < kPixels; ++pixel) {
    const int64_t x = left + pixel < width ? left + pixel : width - 1;
    columns[pixel] = two_resize_taps(x, sizes.columns);
  }
  for (int64_t row = blockIdx.y; row < sizes.masks * height; row += gridDim.y) {
    const float* mask = logits + row / height * (sizes.rows.low * sizes.columns.low);
    const Taps rows = two_resize_taps(row % height, sizes.rows);
    float values[kPixels] = {};
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      const float* line = mask + rows.index[i] * sizes.columns.low;
#pragma unroll
      for (int pixel = 0; pixel < kPixels; ++pixel) {
        const Taps& taps = columns[pixel];
        float value = 0.0f;
#pragma unroll
        for (int j = 0; j < kTaps; ++j) value += taps.weight[j] * __ldg(line + taps.index[j]);
        values[pixel] += rows.weight[i] * value;
      }
    }
    uint8_t* target = masks + row * width + left;
    if (width % kPixels == 0) {
      *reinterpret_cast<uchar4*>(target) =
          make_uchar4(values[0] > threshold, values[1] > threshold, values[2] > threshold,
                      values[3] > threshold);
    } else {
      for (int pixel = 0; pixel < kPixels && left + pixel < width; ++pixel)
        target[pixel] = values[pixel] > threshold;
    }
  }
}

}  // namespace

void launch_mask_postprocess(const float* logits, const MaskPostprocessSizes& sizes,
                             float threshold, bool* masks, cudaStream_t stream) {
  constexpr int64_t per_block = kThreads * kPixels;
  const int64_t rows = sizes.masks * sizes.rows.output;
  const dim3 grid((sizes.columns.output + per_block - 1) / per_block, std::min(rows, kLargestGrid));
  launch(mask_postprocess_kernel, grid, kThreads, 0, stream, logits, sizes, threshold,
         reinterpret_cast<uint8_t*>(masks));
}

}  // namespace refsam::cuda
