#include "instruction_set.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "../check.h"
#include "../string_argument.h"

namespace refsam::cpu {
namespace {

struct Candidate {
  const char* name;
  bool is_supported;  // by this processor and its operating system
};

std::array<Candidate, kInstructionSets> candidates() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avxvnni = avx2 && __builtin_cpu_supports("avxvnni");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool avx512bf16 = avx512vnni && __builtin_cpu_supports("avx512bf16");
#else
  constexpr bool avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false,
                 avx512bf16 = false;
#endif
  return {{{"avx512bf16", avx512bf16},
           {"avx512vnni", avx512vnni},
           {"avx512", avx512},
           {"avx512vl", avx512vnni},
           {"avxvnni", avxvnni},
           {"avx2", avx2},
           {"portable", true}}};
}

}  // namespace

InstructionSet choose_instruction_set(const std::string& name) {
  const auto all = candidates();
  for (int index = 0; index < kInstructionSets; ++index) {
    if (name.empty() ? !all[index].is_supported : name != all[index].name) continue;
    check(all[index].is_supported, "instruction_set: got ", name,
          ", which this processor does not have");
    return static_cast<InstructionSet>(index);
  }
  check(false, "instruction_set: got ", name,
        ", wanted avx512bf16, avx512vnni, avx512, avx512vl, avxvnni, avx2 or portable");
  return kPortable;
}

namespace {

// Whether the instructions multiply 8-bit integers.
bool multiplies_int8(StringHandle name) {
  const InstructionSet set = choose_instruction_set(take_string(name));
  return set != kAvx512 && set != kAvx2 && set != kPortable;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cpu, m) {
  m.def("multiplies_int8(str instruction_set) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("multiplies_int8", TORCH_BOX(&multiplies_int8));
}

}  // namespace refsam::cpu
