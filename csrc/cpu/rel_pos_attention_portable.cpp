// Compiled without flags for an instruction set: for any processor of the family.
#include "rel_pos_attention_kernels.h"

namespace refsam::cpu {

extern const RelPosAttentionKernels* const kPortableKernels = &kKernels;

}  // namespace refsam::cpu
