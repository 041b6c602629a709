// Logits to masks on a CUDA device: as bytes, as packed bits with statistics, and from bits to run
// lengths. Nothing is copied to the device and nothing waited for.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "../mask_postprocess.h"

namespace refsam::cuda {

// logits (P, 4h, 4w) float32 -> masks (P, H, W) bool, both contiguous.
void launch_mask_postprocess(const float* logits, const MaskPostprocessSizes& sizes,
                             float threshold, bool* masks, cudaStream_t stream);

// Blocks that pack a mask, and those that look for its runs.
int64_t packing_blocks(const MaskSize& size);
int64_t runs_blocks(const MaskSize& size);

struct Thresholds {
  float threshold, certain, possible;
};

// logits (P, 4h, 4w) float32, of every mask its axes -> words, mask after mask, and statistics
// (P, kStatistics). `partial` (P, most packing blocks of a mask, kStatistics) is scratch.
void launch_mask_postprocess_bits(const float* logits, const std::vector<MaskAxes>& masks,
                                  const Thresholds& limits, uint32_t* words, int32_t* partial,
                                  int64_t* statistics, cudaStream_t stream);

// words of masks of these sizes -> where runs end, mask after mask, as many of them as `capacity`
// says; counts (P) of all. `behind` (P, most runs blocks of a mask) is scratch.
void launch_mask_postprocess_runs(const uint32_t* words, const std::vector<MaskSize>& masks,
                                  int64_t capacity, int64_t* behind, int32_t* ends, int64_t* counts,
                                  cudaStream_t stream);

}  // namespace refsam::cuda
