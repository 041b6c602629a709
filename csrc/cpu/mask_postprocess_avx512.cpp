// Compiled with the flags that build.py has for the name's ending.
#ifdef __AVX512F__
#include "mask_postprocess_kernels.h"
#else
#include "mask_postprocess_band.h"
#endif

namespace refsam::cpu {

#ifdef __AVX512F__
extern const MaskKernels* const kAvx512MaskKernels = &kMaskKernels;
#else
extern const MaskKernels* const kAvx512MaskKernels = nullptr;
#endif

}  // namespace refsam::cpu
