// Checks, allocation, division of the work and registration of int8_linear on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>

#include "../check.h"
#include "../string_argument.h"
#include "instruction_set.h"
#include "int8_linear.h"
#include "scratch.h"

namespace refsam::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows that a thread computes at a time: what lies between two layers stays in the second cache.
constexpr int64_t kMostRows = 48, kFewestRows = 6;

const Int8Kernels& choose_kernels(const std::string& name) {
  switch (choose_instruction_set(name)) {
    case kAvx512Bf16:
    case kAvx512Vnni:
      return *kAvx512VnniInt8Kernels;
    case kAvx512Vl:
      return *kAvx512VlInt8Kernels;
    case kAvxVnni:
      return *kAvxVnniInt8Kernels;
    case kAvx512:
    case kAvx2:
      return *kAvx2Int8Kernels;
    default:
      return *kPortableInt8Kernels;
  }
}

void check_float(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, ": got dtype ",
        torch::headeronly::toString(dtype), ", wanted Float or BFloat16");
  check(tensor.is_cpu(), name, ": wanted a CPU tensor");
}

// A contiguous tensor on the CPU with this many elements.
const void* data_of(const char* name, const Tensor& tensor, ScalarType dtype, int64_t elements) {
  check(tensor.is_cpu(), name, ": wanted a CPU tensor");
  check_dtype(name, tensor, dtype);
  check_contiguous(name, tensor);
  check(tensor.numel() == elements, name, ": got ", tensor.numel(), " elements, wanted ", elements);
  return tensor.const_data_ptr();
}

Int8Weights describe(const Tensor& packed, const Tensor& scale, const Tensor& sums,
                     const Tensor& bias, int64_t in, int64_t out) {
  // Sums of 255 times 127 fit 32 bits.
  check_range("in", in, 1, 65536);
  check(out > 0, "out: got ", out, ", wanted a positive number of channels");
  const int64_t groups = (in + kInt8Group - 1) / kInt8Group;
  const int64_t padded = (out + kInt8Block - 1) / kInt8Block * kInt8Block;
  Int8Weights weights{};
  weights.packed = static_cast<const int8_t*>(
      data_of("packed", packed, ScalarType::Char, padded * groups * kInt8Group));
  weights.scale = static_cast<const float*>(data_of("scale", scale, ScalarType::Float, padded));
  weights.sums = static_cast<const int32_t*>(data_of("sums", sums, ScalarType::Int, padded));
  weights.bias = static_cast<const float*>(data_of("bias", bias, ScalarType::Float, padded));
  weights.in = in;
  weights.out = out;
  return weights;
}

// A call without its result: x (rows, in) with dense rows, and the layer norm of its rows.
Int8Call describe_rows(const Tensor& x, const std::optional<Tensor>& norm_weight,
                       const std::optional<Tensor>& norm_bias, double eps, int64_t in) {
  check_float("x", x);
  check_rank("x", x, 2);
  check(x.size(1) == in, "x: got ", x.size(1), " channels, wanted ", in);
  check(x.stride(1) == 1, "x: got a stride of ", x.stride(1), " between channels, wanted 1");
  Int8Call call{};
  call.rows = x.size(0);
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.x_is_bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  check(norm_weight.has_value() == norm_bias.has_value(),
        "norm_bias: got one without the other, wanted both norm_weight and norm_bias or none");
  if (norm_weight) {
    call.norm_weight =
        static_cast<const float*>(data_of("norm_weight", *norm_weight, ScalarType::Float, in));
    call.norm_bias =
        static_cast<const float*>(data_of("norm_bias", *norm_bias, ScalarType::Float, in));
  }
  call.eps = static_cast<float>(eps);
  return call;
}

// Computes the call's rows into a new tensor (rows, out) of the wanted type.
Tensor run(Int8Call call, const Tensor& x, const std::optional<Tensor>& residual, int64_t out,
           bool as_bfloat16, const std::string& instruction_set) {
  const Int8Kernels& kernels = choose_kernels(instruction_set);
  const ScalarType dtype = as_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  if (residual) call.residual = data_of("residual", *residual, dtype, call.rows * out);
  Tensor result = torch::stable::new_empty(x, {call.rows, out}, dtype);
  if (call.rows == 0) return result;
  call.out = result.mutable_data_ptr();
  call.out_is_bfloat16 = as_bfloat16;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t share = (call.rows + threads - 1) / threads;
  call.rows_of_block = std::min((share + kFewestRows - 1) / kFewestRows * kFewestRows, kMostRows);
  const int64_t blocks = (call.rows + call.rows_of_block - 1) / call.rows_of_block;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = allocate(kernels.scratch(call));
    kernels.run(call, begin, end, scratch.get());
  });
  return result;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& sums,
              const Tensor& bias, std::optional<Tensor> packed2, std::optional<Tensor> scale2,
              std::optional<Tensor> sums2, std::optional<Tensor> bias2,
              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
              std::optional<Tensor> residual, int64_t in, int64_t hidden, int64_t out, double eps,
              bool as_bfloat16, StringHandle instruction_set) {
  const std::string wanted_set = take_string(instruction_set);
  Int8Call call = describe_rows(x, norm_weight, norm_bias, eps, in);
  call.first = describe(packed, scale, sums, bias, in, packed2 ? hidden : out);
  if (packed2) {
    check(scale2 && sums2 && bias2, "packed2: got one without scale2, sums2 and bias2");
    call.second = describe(*packed2, *scale2, *sums2, *bias2, hidden, out);
  }
  return run(call, x, residual, out, as_bfloat16, wanted_set);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cpu, m) {
  m.def(
      "int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor sums, Tensor bias, Tensor? "
      "packed2, Tensor? scale2, Tensor? sums2, Tensor? bias2, Tensor? norm_weight, Tensor? "
      "norm_bias, Tensor? residual, int in_channels, int hidden_channels, int out_channels, float "
      "eps, bool as_bfloat16, str instruction_set) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cpu, CPU, m) { m.impl("int8_linear", TORCH_BOX(&linear)); }

}  // namespace refsam::cpu
