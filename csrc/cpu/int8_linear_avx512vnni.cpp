// Compiled with the flags that build.py has for the name's ending.
#ifdef __AVX512VNNI__
#include "int8_linear_kernels.h"
#else
#include "int8_linear.h"
#endif

namespace refsam::cpu {

#ifdef __AVX512VNNI__
extern const Int8Kernels* const kAvx512VnniInt8Kernels = &kInt8Kernels;
#else
extern const Int8Kernels* const kAvx512VnniInt8Kernels = nullptr;
#endif

}  // namespace refsam::cpu
