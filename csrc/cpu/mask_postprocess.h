// Logits to masks on the CPU.
#pragma once

#include "../mask_postprocess.h"

namespace refsam::cpu {

// logits (P, 4h, 4w) float32 with the given strides (in elements; the last is 1) -> masks (P, H, W) bool, contiguous.
void mask_postprocess(const float* logits, int64_t mask_stride, int64_t row_stride, const MaskPostprocessSizes& sizes,
                      float threshold, bool* masks);

}  // namespace refsam::cpu
