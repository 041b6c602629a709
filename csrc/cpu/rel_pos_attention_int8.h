// rel_pos_attention with products of queries and keys in 8-bit integers: its kernels of each
// instruction set. Plain data only, as in rel_pos_attention.h.
#pragma once

#include "rel_pos_attention.h"

namespace refsam::cpu {

// See RelPosAttentionKernels; the calls' log_sum_exp is null.
struct RelPosAttentionInt8Kernels {
  int64_t (*scratch)(const RelPosAttention& call);
  void (*run)(const RelPosAttention& call, int64_t begin, int64_t end, char* scratch);
};

// Each is null if the library was built for another processor family.
extern const RelPosAttentionInt8Kernels* const kPortableInt8AttentionKernels;
extern const RelPosAttentionInt8Kernels* const kAvx2Int8AttentionKernels;
extern const RelPosAttentionInt8Kernels* const kAvxVnniInt8AttentionKernels;
extern const RelPosAttentionInt8Kernels* const kAvx512VlInt8AttentionKernels;
extern const RelPosAttentionInt8Kernels* const kAvx512VnniInt8AttentionKernels;
extern const RelPosAttentionInt8Kernels* const kAvx512Bf16Int8AttentionKernels;

}  // namespace refsam::cpu
