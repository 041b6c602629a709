// Compiled with the flags that build.py has for the name's ending.
#define REFSAM_VNNI_ENCODING "%{evex%}"
#ifdef __AVX2__
#include "rel_pos_attention_int8_kernels.h"
#else
#include "rel_pos_attention_int8.h"
#endif

namespace refsam::cpu {

#ifdef __AVX2__
extern const RelPosAttentionInt8Kernels* const kAvx512VlInt8AttentionKernels =
    &kInt8AttentionKernels;
#else
extern const RelPosAttentionInt8Kernels* const kAvx512VlInt8AttentionKernels = nullptr;
#endif

}  // namespace refsam::cpu
