// Attention with decomposed relative positions on the CPU: what the operator, the division of the
// work and the kernels of each instruction set share. Plain data only: inline functions here would
// be compiled for every instruction set, and the linker would keep any one of them.
#pragma once

#include <stdint.h>

namespace refsam::cpu {

// One call: sizes, and tensors of float or bfloat16. Strides count elements.
struct RelPosAttention {
  bool is_bfloat16;
  const void* qkv;  // (images, height, width, [3, heads, head_dim]), the last dimension dense
  int64_t image_stride, row_stride, column_stride;
  const void *rel_pos_h, *rel_pos_w;  // (2 * window_height - 1, head_dim), likewise; contiguous
  const void* qkv_bias;               // ([3, heads, head_dim]) or null for zeros
  int64_t images, height, width, heads, head_dim;
  int64_t window_height, window_width;  // the grid's if attention is global
  bool padding_is_key;
  int64_t parts;       // number of tasks that share the queries of a window's head
  void* out;           // (images, height, width, [heads, head_dim]), contiguous
  float* log_sum_exp;  // (images, heads, height, width), contiguous
};

// One call of the backward: the forward's call and results, and where the gradients go.
// Tasks are dealt to `slots` in equal stretches; sums over tasks are kept apart by slot.
struct RelPosAttentionBackward {
  RelPosAttention forward;
  const void* grad_out;  // like forward.out
  void* grad_qkv;        // like forward.qkv, contiguous
  int64_t slots;
  float* grad_tables;   // (slots, 2 * window_height - 1 + 2 * window_width - 1, head_dim), zeros;
                        // null if not needed
  float* grad_padding;  // (slots, [2, heads, head_dim]): of k and v, zeros
};

// The kernels for one instruction set. A range of tasks (of slots in the backward) runs in one
// thread, in `scratch` bytes aligned to 64.
struct RelPosAttentionKernels {
  int64_t (*forward_scratch)(const RelPosAttention& call);
  void (*forward)(const RelPosAttention& call, int64_t begin, int64_t end, char* scratch);
  int64_t (*backward_scratch)(const RelPosAttentionBackward& call);
  void (*backward)(const RelPosAttentionBackward& call, int64_t begin, int64_t end, char* scratch);
};

// Each is null if the library was built for another processor family.
extern const RelPosAttentionKernels* const kPortableKernels;
extern const RelPosAttentionKernels* const kAvx2Kernels;
extern const RelPosAttentionKernels* const kAvx512Kernels;
extern const RelPosAttentionKernels* const kAvx512Bf16Kernels;

}  // namespace refsam::cpu
