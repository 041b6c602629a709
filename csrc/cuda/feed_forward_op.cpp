// Checks, allocation and registration of the steps of adapter_mlp and adapter_projection on CUDA
// devices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <limits>
#include <tuple>

#include "feed_forward.h"
#include "real_check.h"

namespace refsam::cuda {
namespace {

using Rows = std::tuple<Tensor, Tensor, Tensor, Tensor>;

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// The rows of (..., width).
int64_t check_rows(const char* name, const Tensor& tensor) {
  check(tensor.dim() > 0, name, ": got no dimensions, wanted (..., width)");
  check_on_device(name, tensor);
  const int64_t width = tensor.size(tensor.dim() - 1);
  const int64_t rows = width == 0 ? 0 : tensor.numel() / width;
  check_range(name, rows, 0, std::numeric_limits<int32_t>::max());
  return rows;
}

// Whether rows of this width begin where four numbers can be read at once.
bool are_in_fours(int64_t width, std::initializer_list<const void*> tensors) {
  constexpr uintptr_t kAligned = 16;
  bool aligned = width % 4 == 0;
  for (const void* data : tensors) aligned &= reinterpret_cast<uintptr_t>(data) % kAligned == 0;
  return aligned;
}

Dtype wider(Dtype first, Dtype second) { return first == second ? first : Dtype::kFloat32; }

Rows add_and_norm(const Tensor& residual, const Tensor& first, std::optional<Tensor> second,
                  double scale, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                  double eps, bool keep) {
  AddAndNorm call{};
  call.rows = check_rows("residual", residual);
  std::vector<int64_t> shape = shape_of(residual);
  const int64_t width = shape.back();
  check_range("residual's last dimension", width, 0, kWidestRow);
  check(norm_weight.has_value() == norm_bias.has_value(),
        "norm_bias: got one of norm_weight and norm_bias, wanted both or none");
  call.residual = check_reals("residual", residual, shape, residual);
  call.first = check_reals("first", first, shape, residual);
  call.second = check_reals("second", second, shape, residual);
  call.norm_weight = check_reals("norm_weight", norm_weight, {width}, residual);
  call.norm_bias = check_reals("norm_bias", norm_bias, {width}, residual);
  const DeviceGuard guard(residual);
  const auto make = [&](bool wanted, const std::vector<int64_t>& sizes, ScalarType dtype) {
    return torch::stable::new_empty(residual, wanted ? sizes : std::vector<int64_t>{0}, dtype);
  };
  const bool has_norm = norm_weight.has_value();
  const ScalarType x_dtype = scalar_type_of(wider(call.residual.dtype, call.first.dtype));
  Tensor x = make(true, shape, x_dtype);
  Tensor normed = make(has_norm, shape, first.scalar_type());
  shape.back() = 1;
  Tensor mean = make(has_norm && keep, shape, ScalarType::Float);
  Tensor rstd = make(has_norm && keep, shape, ScalarType::Float);
  if (residual.numel() == 0) return {x, normed, mean, rstd};
  call.x = reals_of(x);
  call.normed = reals_of(normed);
  if (has_norm && keep) {
    call.mean = static_cast<float*>(mean.mutable_data_ptr());
    call.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  }
  call.width = static_cast<int>(width);
  call.scale = static_cast<float>(scale);
  call.eps = static_cast<float>(eps);
  call.in_fours =
      are_in_fours(width, {call.residual.data, call.first.data, call.second.data, call.x.data,
                           call.norm_weight.data, call.norm_bias.data, call.normed.data});
  launch_add_and_norm(call, current_stream(residual));
  return {x, normed, mean, rstd};
}

void bias_gelu(const Tensor& hidden, const Tensor& bias, std::optional<Tensor> activated) {
  BiasGelu call{};
  call.rows = check_rows("hidden", hidden);
  const std::vector<int64_t> shape = shape_of(hidden);
  const Tensor& result = activated ? *activated : hidden;
  check_reals("hidden", hidden, shape, hidden);
  call.bias = check_reals("bias", bias, {shape.back()}, hidden);
  check_compact("activated", result, shape, hidden);
  check_dtype("activated", result, hidden.scalar_type());
  check_range("hidden's last dimension", shape.back(), 0, kWidestHidden);
  if (hidden.numel() == 0) return;
  call.hidden = reals_of(hidden);
  call.activated = reals_of(result);
  call.width = static_cast<int>(shape.back());
  call.in_fours =
      are_in_fours(shape.back(), {call.hidden.data, call.activated.data, call.bias.data});
  const DeviceGuard guard(hidden);
  launch_bias_gelu(call, current_stream(hidden));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cuda, m) {
  m.def(
      "add_and_norm(Tensor residual, Tensor first, Tensor? second, float scale, Tensor? "
      "norm_weight, Tensor? norm_bias, float eps, bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("bias_gelu_(Tensor(a!) hidden, Tensor bias, Tensor(b!)? activated) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cuda, REFSAM_CUDA_KEY, m) {
  m.impl("add_and_norm", TORCH_BOX(&add_and_norm));
  m.impl("bias_gelu_", TORCH_BOX(&bias_gelu));
}

}  // namespace refsam::cuda
