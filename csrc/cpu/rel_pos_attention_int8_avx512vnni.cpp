// Compiled with the flags that build.py has for the name's ending.
#ifdef __AVX512VNNI__
#include "rel_pos_attention_int8_kernels.h"
#else
#include "rel_pos_attention_int8.h"
#endif

namespace refsam::cpu {

#ifdef __AVX512VNNI__
extern const RelPosAttentionInt8Kernels* const kAvx512VnniInt8AttentionKernels =
    &kInt8AttentionKernels;
#else
extern const RelPosAttentionInt8Kernels* const kAvx512VnniInt8AttentionKernels = nullptr;
#endif

}  // namespace refsam::cpu
