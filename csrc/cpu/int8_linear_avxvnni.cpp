// Compiled with the flags that build.py has for the name's ending.
#define REFSAM_VNNI_ENCODING "%{vex%}"
#ifdef __AVX2__
#include "int8_linear_kernels.h"
#else
#include "int8_linear.h"
#endif

namespace refsam::cpu {

#ifdef __AVX2__
extern const Int8Kernels* const kAvxVnniInt8Kernels = &kInt8Kernels;
#else
extern const Int8Kernels* const kAvxVnniInt8Kernels = nullptr;
#endif

}  // namespace refsam::cpu
