// Compiled with the flags that build.py has for the name's ending.
#ifdef __AVX512BF16__
#include "rel_pos_attention_kernels.h"
#else
#include "rel_pos_attention.h"
#endif

namespace refsam::cpu {

#ifdef __AVX512BF16__
extern const RelPosAttentionKernels* const kAvx512Bf16Kernels = &kKernels;
#else
extern const RelPosAttentionKernels* const kAvx512Bf16Kernels = nullptr;
#endif

}  // namespace refsam::cpu
