// Floating point numbers in the dtype of a tensor, which a kernel learns when it runs: for what it
// reads or writes once, so that it need not be compiled for every pair of dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace refsam::cuda {

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };

template <typename T>
constexpr Dtype kDtypeOf = Dtype::kFloat32;
template <>
constexpr Dtype kDtypeOf<__half> = Dtype::kFloat16;
template <>
constexpr Dtype kDtypeOf<__nv_bfloat16> = Dtype::kBFloat16;

// Calls `function` with a zero of the dtype's C++ type.
template <typename Function>
void with_element(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(float{});
    case Dtype::kFloat16:
      return function(__half{});
    case Dtype::kBFloat16:
      return function(__nv_bfloat16{});
  }
}

// Contiguous numbers to read; null where there are none.
struct Reals {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;

  __device__ float operator[](int64_t index) const {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[index];
    if (dtype == Dtype::kFloat16)
      return static_cast<float>(static_cast<const __half*>(data)[index]);
    return static_cast<float>(static_cast<const __nv_bfloat16*>(data)[index]);
  }
};

// Contiguous numbers to write; null where there are none.
struct MutableReals {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;

  __device__ void store(int64_t index, float value) const {
    if (dtype == Dtype::kFloat32) {
      static_cast<float*>(data)[index] = value;
    } else if (dtype == Dtype::kFloat16) {
      static_cast<__half*>(data)[index] = static_cast<__half>(value);
    } else {
      static_cast<__nv_bfloat16*>(data)[index] = static_cast<__nv_bfloat16>(value);
    }
  }

  // The value as it is read again after it was stored.
  __device__ float rounded(float value) const {
    if (dtype == Dtype::kFloat32) return value;
    if (dtype == Dtype::kFloat16) return static_cast<float>(static_cast<__half>(value));
    return static_cast<float>(static_cast<__nv_bfloat16>(value));
  }
};

}  // namespace refsam::cuda
