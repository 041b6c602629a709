// Compiled with the flags that build.py has for the name's ending.
#ifdef __AVX2__
#include "rel_pos_attention_kernels.h"
#else
#include "rel_pos_attention.h"
#endif

namespace refsam::cpu {

#ifdef __AVX2__
extern const RelPosAttentionKernels* const kAvx2Kernels = &kKernels;
#else
extern const RelPosAttentionKernels* const kAvx2Kernels = nullptr;
#endif

}  // namespace refsam::cpu
