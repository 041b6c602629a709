// Logits to masks on the CPU: as bytes, as packed bits with statistics, and from bits to run
// lengths and their characters.
#pragma once

#include <vector>

#include "../mask_postprocess.h"

namespace refsam::cpu {

// logits (P, 4h, 4w) float32 -> masks (P, H, W) bool, both contiguous.
void mask_postprocess(const float* logits, const MaskPostprocessSizes& sizes, float threshold,
                      bool* masks);

// logits (P, 4h, 4w) float32, of every mask its axes -> words, mask after mask, and statistics
// (P, kStatistics).
void mask_postprocess_bits(const float* logits, const std::vector<MaskAxes>& masks, float threshold,
                           float stability_offset, uint32_t* words, int64_t* statistics);

// words of masks of these sizes -> where runs end, mask after mask, as many of them as `capacity`
// says; counts (P) of all.
void mask_postprocess_runs(const uint32_t* words, const std::vector<MaskSize>& masks,
                           int64_t capacity, int32_t* ends, int64_t* counts);

// Characters that a number of a run length takes at most: differences have 33 bits.
constexpr int64_t kMostCharacters = 7;

// Where runs end, mask after mask, `counts` of each -> COCO's characters of every mask, and how
// many they are. Those of a mask begin kMostCharacters times the number of runs before it behind
// `text`.
void mask_postprocess_characters(const int32_t* ends, const std::vector<int64_t>& counts,
                                 const std::vector<MaskSize>& masks, uint8_t* text,
                                 int64_t* lengths);

}  // namespace refsam::cpu
