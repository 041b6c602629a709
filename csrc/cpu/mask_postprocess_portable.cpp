// Compiled without flags for an instruction set: for any processor of the family.
#include "mask_postprocess_kernels.h"

namespace refsam::cpu {

extern const MaskKernels* const kPortableMaskKernels = &kMaskKernels;

}  // namespace refsam::cpu
