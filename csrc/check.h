// Checks of arguments, shared by every operator: the message names the argument, the value
// it got and the value it wanted.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

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

inline void check_dtype(const char* name, const torch::stable::Tensor& tensor,
                        torch::headeronly::ScalarType dtype) {
  check(tensor.scalar_type() == dtype, name, ": got dtype ",
        torch::headeronly::toString(tensor.scalar_type()), ", wanted ",
        torch::headeronly::toString(dtype));
}

inline void check_contiguous(const char* name, const torch::stable::Tensor& tensor) {
  check(tensor.is_contiguous(), name, ": got strides of a view, wanted a contiguous tensor");
}

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  check(low <= value && value <= high, name, ": got ", value, ", wanted ", low, " to ", high);
}

}  // namespace refsam
