// Run-time choice of the instruction set: the compiler makes one version of the marked function for
// each and the loader takes the best that the processor has. The library itself stays buildable and
// loadable on the oldest x86-64.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define REFSAM_SIMD __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define REFSAM_SIMD
#endif
