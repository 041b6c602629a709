// Attention between tokens and image on a CUDA device, from projected queries, keys and values on:
// see kernels/refsam_kernels/token_image_attention/README.md.
#pragma once

#include <cuda_runtime_api.h>

#include "real.h"

namespace refsam::cuda {

constexpr int kWidestTokens = 512;  // channels and internal width
constexpr int kWidestTokenHead = 128;
constexpr int kMostKeyParts = 32;

// Tensors are contiguous, with elements of `dtype` unless stated; null outputs are not kept.
struct TokenImageAttention {
  const void* q;           // (expressions, internal width, queries)
  const void* k;           // (expressions, internal width, keys)
  const void* v;           // likewise
  const int64_t* lengths;  // (expressions,) of keys, or null
  const void* out_weight;  // (channels, internal width)
  Reals added;             // (channels,), to the output projection
  Reals residual;          // (expressions, queries, channels)
  Reals norm_weight;       // (channels,)
  Reals norm_bias;         // (channels,)
  MutableReals out;        // (expressions, queries, channels)
  float* x;                // likewise, the sum before the layer norm
  float* statistics;       // (expressions, queries, 2)
  void* attended;          // (expressions, internal width, queries); there if the keys are one part
  float* log_sum_exp;      // (expressions, heads, queries)
  // For each part of the keys, if there are several: sums of weights times values, the largest
  // logit in units of log(2), the sum of the weights.
  float* parts;    // (expressions, parts, internal width, queries)
  float* highest;  // (expressions, heads, parts, queries)
  float* totals;   // likewise
  Dtype dtype;
  int64_t expressions;
  int queries, keys, channels, heads, head_width;
  int key_parts, keys_of_part;
  float eps;

  __host__ __device__ int internal() const { return heads * head_width; }
};

// How the keys are split: parts of so many keys each, few enough that joining them costs little.
int keys_of_part(int64_t queries, int64_t keys);

void launch_token_image_attention(const TokenImageAttention& call, cudaStream_t stream);

}  // namespace refsam::cuda
