// Checks of arguments, shared by every operator: the message names the argument, what was got and what is wanted.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

#include <torch/csrc/stable/tensor.h>

namespace refsam {

template <typename... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_rank(const char* name, const torch::stable::Tensor& tensor, int64_t rank) {
  check(tensor.dim() == rank, name, ": got ", tensor.dim(), " dimensions, wanted ", rank);
}

inline void check_dtype(const char* name, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
  check(tensor.scalar_type() == dtype, name, ": got dtype ", torch::headeronly::toString(tensor.scalar_type()),
        ", wanted ", torch::headeronly::toString(dtype));
}

// The last dimension is read through a pointer; the others may have any stride.
inline void check_last_stride(const char* name, const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  check(tensor.size(last) <= 1 || tensor.stride(last) == 1, name, ": got stride ", tensor.stride(last),
        " in the last dimension, wanted 1");
}

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  check(low <= value && value <= high, name, ": got ", value, ", wanted ", low, " to ", high);
}

}  // namespace refsam
