// Compiled without flags for an instruction set: for any processor of the family.
#include "int8_linear_kernels.h"

namespace refsam::cpu {

extern const Int8Kernels* const kPortableInt8Kernels = &kInt8Kernels;

}  // namespace refsam::cpu
