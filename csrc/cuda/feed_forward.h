// The steps between the matrix products of adapter_mlp and adapter_projection on a CUDA device, as
// kernels/refsam_kernels/feed_forward/torch_steps.py defines them. All tensors are contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include "real.h"

namespace refsam::cuda {

constexpr int kWidestRow = 8192;
constexpr int kWidestHidden = 1 << 26;

// x = residual + first + scale * second, and its layer norm; (rows, width) each.
struct AddAndNorm {
  Reals residual, first, second;  // no second: left out
  Reals norm_weight, norm_bias;   // (width,); none: no layer norm
  MutableReals x, normed;
  float* mean;  // (rows,), like rstd null where the statistics are not kept
  float* rstd;
  int64_t rows;
  int width;
  float scale, eps;
  bool in_fours;  // every row of every tensor begins where four numbers can be read at once
};

void launch_add_and_norm(const AddAndNorm& call, cudaStream_t stream);

// activated = gelu(hidden + bias), (rows, width) each; `hidden` becomes hidden + bias, unless it is
// `activated` itself. Both have one dtype.
struct BiasGelu {
  MutableReals hidden, activated;
  Reals bias;  // (width,)
  int64_t rows;
  int width;
  bool in_fours;
};

void launch_bias_gelu(const BiasGelu& call, cudaStream_t stream);

}  // namespace refsam::cuda
