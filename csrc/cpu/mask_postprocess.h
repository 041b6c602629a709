// Logits to masks on the CPU.
#pragma once

#include "../mask_postprocess.h"

namespace refsam::cpu {

// logits (P, 4h, 4w) float32 -> masks (P, H, W) bool, both contiguous.
void mask_postprocess(const float* logits, const MaskPostprocessSizes& sizes, float threshold,
                      bool* masks);

}  // namespace refsam::cpu
