// Logits to masks on a CUDA device.
#pragma once

#include <cuda_runtime_api.h>

#include "../mask_postprocess.h"

namespace refsam::cuda {

// logits (P, 4h, 4w) float32 -> masks (P, H, W) bool, both contiguous.
void launch_mask_postprocess(const float* logits, const MaskPostprocessSizes& sizes,
                             float threshold, bool* masks, cudaStream_t stream);

}  // namespace refsam::cuda
