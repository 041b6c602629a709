// The kernels of rel_pos_attention for the instruction set that the including file is compiled for.
#pragma once

#include "rel_pos_attention_backward.h"
#include "rel_pos_attention_forward.h"

namespace refsam::cpu {
namespace {

template <class Element, class Operand>
int64_t run_backward(const RelPosAttentionBackward& call, int64_t begin, int64_t end,
                     char* scratch) {
  Arena arena(scratch);
  Backward<Element, Operand> backward(call, arena);
  if (scratch) backward.run(begin, end);
  return arena.used();
}

int64_t backward_scratch(const RelPosAttentionBackward& call) {
  return call.forward.is_bfloat16 ? run_backward<Bfloat16, Bfloat16Operand>(call, 0, 0, nullptr)
                                  : run_backward<float, Fp32Operand>(call, 0, 0, nullptr);
}

void backward(const RelPosAttentionBackward& call, int64_t begin, int64_t end, char* scratch) {
  if (call.forward.is_bfloat16) {
    run_backward<Bfloat16, Bfloat16Operand>(call, begin, end, scratch);
  } else {
    run_backward<float, Fp32Operand>(call, begin, end, scratch);
  }
}

const RelPosAttentionKernels kKernels{forward_scratch<Keys>, forward<Keys>, backward_scratch,
                                      backward};

}  // namespace
}  // namespace refsam::cpu
