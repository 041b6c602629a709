// Checks, allocation and registration of token_image_attention on CUDA devices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "real_check.h"
#include "token_image_attention.h"

namespace refsam::cuda {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

const void* check_elements(const char* name, const Tensor& tensor,
                           const std::vector<int64_t>& shape, const Tensor& q) {
  check_compact(name, tensor, shape, q);
  check_dtype(name, tensor, q.scalar_type());
  return tensor.const_data_ptr();
}

TokenImageAttention describe(const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& residual, const Tensor& out_weight, const Tensor& added,
                             const Tensor& norm_weight, const Tensor& norm_bias,
                             const std::optional<Tensor>& key_lengths, int64_t num_heads) {
  check_rank("q", q, 3);
  check_rank("k", k, 3);
  check_rank("residual", residual, 3);
  TokenImageAttention call{};
  call.dtype = check_real("q", q);
  call.expressions = q.size(0);
  const int64_t internal = q.size(1), queries = q.size(2), keys = k.size(2);
  const int64_t channels = residual.size(2);
  check_range("q's internal width", internal, 1, kWidestTokens);
  check_range("residual's channels", channels, 1, kWidestTokens);
  check(num_heads > 0 && internal % num_heads == 0, "num_heads: got ", num_heads,
        ", wanted a divisor of the internal width ", internal);
  check_range("the width of a head", internal / num_heads, 1, kWidestTokenHead);
  check_range("q's queries", queries, 1, kMost / kWidestTokens);
  check_range("k's keys", keys, 1, kMost / kWidestTokens);
  check_range("heads of all expressions and queries", call.expressions * num_heads * queries, 0,
              kMost / kMostKeyParts);
  call.q = check_elements("q", q, {call.expressions, internal, queries}, q);
  call.k = check_elements("k", k, {call.expressions, internal, keys}, q);
  call.v = check_elements("v", v, {call.expressions, internal, keys}, q);
  call.residual = check_reals("residual", residual, {call.expressions, queries, channels}, q);
  call.out_weight = check_elements("out_weight", out_weight, {channels, internal}, q);
  call.added = check_reals("added", added, {channels}, q);
  call.norm_weight = check_reals("norm_weight", norm_weight, {channels}, q);
  call.norm_bias = check_reals("norm_bias", norm_bias, {channels}, q);
  if (key_lengths) {
    check_compact("key_lengths", *key_lengths, {call.expressions}, q);
    check_dtype("key_lengths", *key_lengths, ScalarType::Long);
    call.lengths = static_cast<const int64_t*>(key_lengths->const_data_ptr());
  }
  call.queries = static_cast<int>(queries);
  call.keys = static_cast<int>(keys);
  call.channels = static_cast<int>(channels);
  call.heads = static_cast<int>(num_heads);
  call.head_width = static_cast<int>(internal / num_heads);
  call.keys_of_part = keys_of_part(queries, keys);
  call.key_parts = (call.keys + call.keys_of_part - 1) / call.keys_of_part;
  return call;
}

// Also the values that the backward needs: see token_image_attention/inputs.py.
Results token_image_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& residual, const Tensor& out_weight, const Tensor& added,
                              const Tensor& norm_weight, const Tensor& norm_bias,
                              std::optional<Tensor> key_lengths, int64_t num_heads, double eps,
                              bool keep) {
  TokenImageAttention call = describe(q, k, v, residual, out_weight, added, norm_weight, norm_bias,
                                      key_lengths, num_heads);
  call.eps = static_cast<float>(eps);
  const DeviceGuard guard(q);
  const auto make = [&](bool wanted, const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::new_empty(q, wanted ? shape : std::vector<int64_t>{0}, dtype);
  };
  const auto floats_of = [](const Tensor& tensor) {
    return tensor.numel() == 0 ? nullptr : static_cast<float*>(tensor.mutable_data_ptr());
  };
  const ScalarType real = ScalarType::Float;
  const int64_t expressions = call.expressions, queries = call.queries, parts = call.key_parts;
  const std::vector<int64_t> shape{expressions, queries, call.channels};
  Tensor out = make(true, shape, residual.scalar_type());
  Tensor x = make(keep, shape, real);
  Tensor statistics = make(keep, {expressions, queries, 2}, real);
  Tensor attended =
      make(keep || parts == 1, {expressions, call.internal(), queries}, q.scalar_type());
  Tensor log_sum_exp = make(keep, {expressions, call.heads, queries}, real);
  const bool is_split = parts > 1;
  Tensor sums = make(is_split, {expressions, parts, call.internal(), queries}, real);
  Tensor highest = make(is_split, {expressions, call.heads, parts, queries}, real);
  Tensor totals = make(is_split, {expressions, call.heads, parts, queries}, real);
  if (expressions > 0) {
    call.out = reals_of(out);
    call.x = floats_of(x);
    call.statistics = floats_of(statistics);
    call.attended = attended.numel() == 0 ? nullptr : attended.mutable_data_ptr();
    call.log_sum_exp = floats_of(log_sum_exp);
    call.parts = floats_of(sums);
    call.highest = floats_of(highest);
    call.totals = floats_of(totals);
    launch_token_image_attention(call, current_stream(q));
  }
  if (!keep) attended = make(false, {}, q.scalar_type());
  return {out, x, statistics, attended, log_sum_exp};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cuda, m) {
  m.def(
      "token_image_attention(Tensor q, Tensor k, Tensor v, Tensor residual, Tensor out_weight, "
      "Tensor added, Tensor norm_weight, Tensor norm_bias, Tensor? key_lengths, int num_heads, "
      "float eps, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cuda, REFSAM_CUDA_KEY, m) {
  m.impl("token_image_attention", TORCH_BOX(&token_image_attention));
}

}  // namespace refsam::cuda
