// Products of quantised rows with quantised weights on the CPU: what the operators and the kernels
// of each instruction set share. Plain data only, as in rel_pos_attention.h.
#pragma once

#include <stdint.h>

namespace refsam::cpu {

constexpr int64_t kInt8Block = 16;  // output channels whose weights lie side by side
constexpr int64_t kInt8Group = 4;   // input channels that one instruction sums

// A linear layer, its weights `scale` times an integer in each output channel. Everything is padded
// with zeros to whole blocks and groups.
struct Int8Weights {
  const int8_t* packed;  // (blocks, groups, kInt8Block, kInt8Group)
  const float* scale;    // (blocks * kInt8Block)
  const int32_t* sums;   // of the integers over the inputs, likewise
  const float* bias;     // likewise
  int64_t in, out;       // channels without the padding
};

// One call: out = residual + second(gelu(first(norm(x)))), or residual + first(norm(x)).
struct Int8Call {
  int64_t rows, rows_of_block;  // rows are computed in blocks
  const void* x;                // (rows, first.in), float or bfloat16, each row dense
  int64_t x_stride;
  bool x_is_bfloat16;
  const float *norm_weight, *norm_bias;  // (first.in), null without a layer norm
  float eps;
  Int8Weights first, second;  // second.packed is null if there is one layer
  const void* residual;       // (rows, out channels) like out, contiguous; or null
  void* out;                  // (rows, out channels), float or bfloat16, contiguous
  bool out_is_bfloat16;
};

// The kernels for one instruction set. Blocks of rows from `begin` to `end` run in one thread, in
// `scratch` bytes aligned to 64.
struct Int8Kernels {
  int64_t (*scratch)(const Int8Call& call);
  void (*run)(const Int8Call& call, int64_t begin, int64_t end, char* scratch);
};

// Each is null if the library was built for another processor family.
extern const Int8Kernels* const kPortableInt8Kernels;
extern const Int8Kernels* const kAvx2Int8Kernels;
extern const Int8Kernels* const kAvxVnniInt8Kernels;
extern const Int8Kernels* const kAvx512VlInt8Kernels;
extern const Int8Kernels* const kAvx512VnniInt8Kernels;

}  // namespace refsam::cpu
