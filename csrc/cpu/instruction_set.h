// Which instructions the kernels of a call use: the best that the processor has, or those that are
// named, as on a processor without the others.
#pragma once

#include <string>

namespace refsam::cpu {

// From the most to the least wanted.
enum InstructionSet {
  kAvx512Bf16,  // with AVX-512 VNNI
  kAvx512Vnni,
  kAvx512,
  kAvx512Vl,  // VNNI on vectors of 256 bits as AVX-512 encodes it: for tests of what AVX-VNNI
              // computes
  kAvxVnni,
  kAvx2,
  kPortable,
  kInstructionSets,
};

// The one that is named, or the best if `name` is empty. Throws if the processor does not have it.
InstructionSet choose_instruction_set(const std::string& name);

}  // namespace refsam::cpu
