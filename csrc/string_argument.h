// Strings as torch passes them to an operator.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstddef>
#include <memory>
#include <string>

#include "check.h"

namespace refsam {

// The text of an argument of type str, which the operator has to delete: once for each. The
// conversion to std::string in torch's headers leaves a copy behind at every call up to 2.13
// (https://github.com/pytorch/pytorch/issues/191340).
inline std::string take_string(StringHandle argument) {
  const std::unique_ptr<StringOpaque, decltype(&torch_delete_string)> owner(argument,
                                                                            &torch_delete_string);
  size_t length = 0;
  const char* text = nullptr;
  check(torch_string_length(argument, &length) == 0 && torch_string_c_str(argument, &text) == 0,
        "torch gave a string that cannot be read");
  return std::string(text, length);
}

}  // namespace refsam
