// Compiled without flags for an instruction set: for any processor of the family.
#include "rel_pos_attention_int8_kernels.h"

namespace refsam::cpu {

extern const RelPosAttentionInt8Kernels* const kPortableInt8AttentionKernels =
    &kInt8AttentionKernels;

}  // namespace refsam::cpu
