// Hierarchical dense attention on a CUDA device, in its absorbed form: see
// kernels/refsam_kernels/dense_attention/README.md.
#pragma once

#include <cuda_runtime_api.h>

#include "real.h"

namespace refsam::cuda {

constexpr int kWidestDense = 512;  // channels
constexpr int kMostWords = 128;

// Tensors are contiguous, elements of `dtype` where nothing else is said.
struct DenseAttention {
  const void* features;    // (levels, images, pixels, channels)
  const void* text;        // (expressions, words, channels)
  const void* absorbed;    // (expressions, words, channels), text times the second half of weight
  const int64_t* lengths;  // (expressions,)
  const int64_t* image_index;  // (expressions,)
  const void* weight;          // (channels, 2 * channels)
  Reals bias;                  // (channels,)
  Reals scale;                 // ()
  Reals level_weights;         // (levels,)
  void* dense;                 // (expressions, pixels, channels)
  Dtype dtype;
  int64_t expressions, images, pixels;
  int levels, words, channels;
};

void launch_dense_attention(const DenseAttention& call, cudaStream_t stream);

}  // namespace refsam::cuda
