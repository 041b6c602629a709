// Tensors of any of the dtypes of real.h: checks, and kernel arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../check.h"
#include "device.h"
#include "real.h"

namespace refsam::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype check_real(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return Dtype::kFloat32;
  if (dtype == ScalarType::Half) return Dtype::kFloat16;
  check(dtype == ScalarType::BFloat16, name, ": got dtype ", torch::headeronly::toString(dtype),
        ", wanted Float, Half or BFloat16");
  return Dtype::kBFloat16;
}

inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  check_rank(name, tensor, static_cast<int64_t>(shape.size()));
  for (size_t i = 0; i < shape.size(); ++i)
    check(tensor.size(i) == shape[i], name, ": got size ", tensor.size(i), " of dimension ", i,
          ", wanted ", shape[i]);
}

// Contiguous, of this shape and on the device of `like`.
inline void check_compact(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                          const Tensor& like) {
  check_on_device(name, tensor, like);
  check_shape(name, tensor, shape);
  check_contiguous(name, tensor);
}

// The numbers of such a tensor.
inline Reals check_reals(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                         const Tensor& like) {
  check_compact(name, tensor, shape, like);
  return {tensor.const_data_ptr(), check_real(name, tensor)};
}

inline Reals check_reals(const char* name, const std::optional<Tensor>& tensor,
                         const std::vector<int64_t>& shape, const Tensor& like) {
  return tensor ? check_reals(name, *tensor, shape, like) : Reals{};
}

inline MutableReals reals_of(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), check_real("result", tensor)};
}

inline ScalarType scalar_type_of(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return ScalarType::Float;
  return dtype == Dtype::kFloat16 ? ScalarType::Half : ScalarType::BFloat16;
}

}  // namespace refsam::cuda
