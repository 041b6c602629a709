// Checks, allocation, division of the work and registration of rel_pos_attention on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../rel_pos_attention_check.h"
#include "../string_argument.h"
#include "instruction_set.h"
#include "rel_pos_attention.h"
#include "rel_pos_attention_int8.h"
#include "scratch.h"

namespace refsam::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums over tasks have a fixed number of parts, independent of the number of threads.
constexpr int64_t kSlots = 240;

const RelPosAttentionKernels& choose_kernels(const std::string& name) {
  switch (choose_instruction_set(name)) {
    case kAvx512Bf16:
      return *kAvx512Bf16Kernels;
    case kAvx512Vnni:
    case kAvx512:
      return *kAvx512Kernels;
    case kAvx512Vl:
    case kAvxVnni:
    case kAvx2:
      return *kAvx2Kernels;
    default:
      return *kPortableKernels;
  }
}

const RelPosAttentionInt8Kernels& choose_int8_kernels(const std::string& name) {
  switch (choose_instruction_set(name)) {
    case kAvx512Bf16:
      return *kAvx512Bf16Int8AttentionKernels;
    case kAvx512Vnni:
      return *kAvx512VnniInt8AttentionKernels;
    case kAvx512Vl:
      return *kAvx512VlInt8AttentionKernels;
    case kAvxVnni:
      return *kAvxVnniInt8AttentionKernels;
    case kAvx512:
    case kAvx2:
      return *kAvx2Int8AttentionKernels;
    default:
      return *kPortableInt8AttentionKernels;
  }
}

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

RelPosAttention describe(const Tensor& qkv, const Tensor& rel_pos_h, const Tensor& rel_pos_w,
                         const std::optional<Tensor>& qkv_bias, int64_t num_heads,
                         int64_t window_size, const std::string& pad_mode) {
  const RelPosAttentionSizes sizes = check_rel_pos_attention(qkv, rel_pos_h, rel_pos_w, qkv_bias,
                                                             num_heads, window_size, pad_mode);
  const ScalarType dtype = qkv.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "qkv: got dtype ",
        torch::headeronly::toString(dtype), ", wanted Float or BFloat16");
  check(qkv.is_cpu(), "qkv: wanted a CPU tensor");
  check(rel_pos_h.is_cpu(), "rel_pos_h: wanted a CPU tensor");
  check(rel_pos_w.is_cpu(), "rel_pos_w: wanted a CPU tensor");
  check(!qkv_bias || qkv_bias->is_cpu(), "qkv_bias: wanted a CPU tensor");
  RelPosAttention call{};
  call.is_bfloat16 = dtype == ScalarType::BFloat16;
  call.qkv = qkv.const_data_ptr();
  call.image_stride = qkv.stride(0);
  call.row_stride = qkv.stride(1);
  call.column_stride = qkv.stride(2);
  call.rel_pos_h = rel_pos_h.const_data_ptr();
  call.rel_pos_w = rel_pos_w.const_data_ptr();
  call.qkv_bias = data_of(qkv_bias);
  call.images = sizes.images;
  call.height = sizes.height;
  call.width = sizes.width;
  call.heads = sizes.heads;
  call.head_dim = sizes.head_dim;
  call.window_height = sizes.window_height;
  call.window_width = sizes.window_width;
  call.padding_is_key = sizes.padding_is_key;
  call.parts = 1;
  return call;
}

// A gradient or saved output (B, h, w, D), contiguous, in qkv's dtype.
void check_output(const char* name, const Tensor& tensor, const Tensor& qkv,
                  const RelPosAttention& call) {
  check(tensor.is_cpu(), name, ": wanted a CPU tensor");
  check_rank(name, tensor, 4);
  check_dtype(name, tensor, qkv.scalar_type());
  check_contiguous(name, tensor);
  check(tensor.size(0) == call.images && tensor.size(1) == call.height &&
            tensor.size(2) == call.width && tensor.size(3) == call.heads * call.head_dim,
        name, ": wanted shape (", call.images, ", ", call.height, ", ", call.width, ", ",
        call.heads * call.head_dim, ")");
}

// The saved statistic (B, heads, h, w) float32, contiguous.
void check_statistic(const char* name, const Tensor& tensor, const RelPosAttention& call) {
  check(tensor.is_cpu(), name, ": wanted a CPU tensor");
  check_rank(name, tensor, 4);
  check_dtype(name, tensor, ScalarType::Float);
  check_contiguous(name, tensor);
  check(tensor.size(0) == call.images && tensor.size(1) == call.heads &&
            tensor.size(2) == call.height && tensor.size(3) == call.width,
        name, ": wanted shape (", call.images, ", ", call.heads, ", ", call.height, ", ",
        call.width, ")");
}

// Heads of windows.
int64_t count_heads(const RelPosAttention& call) {
  const int64_t down = (call.height + call.window_height - 1) / call.window_height;
  const int64_t across = (call.width + call.window_width - 1) / call.window_width;
  return call.images * down * across * call.heads;
}

// Runs a forward's kernel, `scratch` and `run` of its tables, on all tasks.
void run_forward(RelPosAttention& call, int64_t (*scratch)(const RelPosAttention&),
                 void (*run)(const RelPosAttention&, int64_t, int64_t, char*)) {
  const int64_t heads = count_heads(call);
  if (heads == 0) return;
  // A few tasks per thread, where heads are fewer; each packs its head's keys again.
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t queries = call.window_height * call.window_width;
  call.parts = std::clamp<int64_t>(wanted / heads, 1, (queries + 127) / 128);
  torch::stable::parallel_for(0, heads * call.parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch memory = allocate(scratch(call));
    run(call, begin, end, memory.get());
  });
}

Tensor new_output(const Tensor& qkv, RelPosAttention& call) {
  Tensor out = torch::stable::new_empty(
      qkv, {call.images, call.height, call.width, call.heads * call.head_dim});
  call.out = out.mutable_data_ptr();
  return out;
}

std::tuple<Tensor, Tensor> forward(const Tensor& qkv, const Tensor& rel_pos_h,
                                   const Tensor& rel_pos_w, std::optional<Tensor> qkv_bias,
                                   int64_t num_heads, int64_t window_size, StringHandle pad_mode,
                                   StringHandle instruction_set) {
  const std::string pads = take_string(pad_mode), wanted_set = take_string(instruction_set);
  RelPosAttention call =
      describe(qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, pads);
  const RelPosAttentionKernels& kernels = choose_kernels(wanted_set);
  Tensor out = new_output(qkv, call);
  Tensor log_sum_exp = torch::stable::new_empty(
      qkv, {call.images, call.heads, call.height, call.width}, ScalarType::Float);
  call.log_sum_exp = static_cast<float*>(log_sum_exp.mutable_data_ptr());
  run_forward(call, kernels.forward_scratch, kernels.forward);
  return {out, log_sum_exp};
}

Tensor int8_forward(const Tensor& qkv, const Tensor& rel_pos_h, const Tensor& rel_pos_w,
                    std::optional<Tensor> qkv_bias, int64_t num_heads, int64_t window_size,
                    StringHandle pad_mode, StringHandle instruction_set) {
  const std::string pads = take_string(pad_mode), wanted_set = take_string(instruction_set);
  RelPosAttention call =
      describe(qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, pads);
  const RelPosAttentionInt8Kernels& kernels = choose_int8_kernels(wanted_set);
  Tensor out = new_output(qkv, call);
  run_forward(call, kernels.scratch, kernels.run);
  return out;
}

// Adds up slots (count, size) in their order; `result` takes its elements from `offset` on.
void sum_slots(const std::vector<float>& slots, int64_t count, int64_t offset, Tensor& result) {
  const int64_t elements = result.numel();
  if (elements == 0) return;
  const int64_t size = static_cast<int64_t>(slots.size()) / count;
  Tensor sums = torch::stable::new_zeros(result, {elements}, ScalarType::Float);
  float* const to = static_cast<float*>(sums.mutable_data_ptr());
  for (int64_t slot = 0; slot < count; ++slot) {
    const float* const from = slots.data() + slot * size + offset;
    for (int64_t i = 0; i < elements; ++i) to[i] += from[i];
  }
  torch::stable::copy_(result, sums);
}

// Gradients of qkv, of both tables (without elements unless `needs_tables`) and of what padding
// tokens have as k and v (2*D,).
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& qkv, const Tensor& rel_pos_h, const Tensor& rel_pos_w,
    std::optional<Tensor> qkv_bias, const Tensor& out, const Tensor& log_sum_exp, int64_t num_heads,
    int64_t window_size, StringHandle pad_mode, bool needs_tables, StringHandle instruction_set) {
  const std::string pads = take_string(pad_mode), wanted_set = take_string(instruction_set);
  RelPosAttentionBackward call{};
  RelPosAttention& shared = call.forward;
  shared = describe(qkv, rel_pos_h, rel_pos_w, qkv_bias, num_heads, window_size, pads);
  const RelPosAttentionKernels& kernels = choose_kernels(wanted_set);
  check_output("grad_out", grad_out, qkv, shared);
  check_output("out", out, qkv, shared);
  check_statistic("log_sum_exp", log_sum_exp, shared);
  const int64_t table_elements = rel_pos_h.numel() + rel_pos_w.numel();
  const int64_t padding_elements = 2 * shared.heads * shared.head_dim;
  Tensor grad_qkv =
      torch::stable::new_empty(qkv, {shared.images, shared.height, shared.width, qkv.size(3)});
  Tensor grad_h = torch::stable::new_zeros(rel_pos_h, {needs_tables ? rel_pos_h.numel() : 0});
  Tensor grad_w = torch::stable::new_zeros(rel_pos_w, {needs_tables ? rel_pos_w.numel() : 0});
  Tensor grad_padding = torch::stable::new_zeros(qkv, {padding_elements});
  const int64_t heads = count_heads(shared);
  if (heads == 0) return {grad_qkv, grad_h, grad_w, grad_padding};
  call.grad_out = grad_out.const_data_ptr();
  shared.out = const_cast<void*>(out.const_data_ptr());
  shared.log_sum_exp = static_cast<float*>(const_cast<void*>(log_sum_exp.const_data_ptr()));
  call.grad_qkv = grad_qkv.mutable_data_ptr();
  call.slots = std::min(heads, kSlots);
  std::vector<float> tables(needs_tables ? call.slots * table_elements : 0);
  std::vector<float> padding(call.slots * padding_elements);
  call.grad_tables = needs_tables ? tables.data() : nullptr;
  call.grad_padding = padding.data();
  torch::stable::parallel_for(0, call.slots, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = allocate(kernels.backward_scratch(call));
    kernels.backward(call, begin, end, scratch.get());
  });
  sum_slots(tables, call.slots, 0, grad_h);
  sum_slots(tables, call.slots, rel_pos_h.numel(), grad_w);
  sum_slots(padding, call.slots, 0, grad_padding);
  return {grad_qkv, grad_h, grad_w, grad_padding};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(refsam_kernels_cpu, m) {
  m.def(
      "rel_pos_attention(Tensor qkv, Tensor rel_pos_h, Tensor rel_pos_w, Tensor? qkv_bias, int "
      "num_heads, int window_size, str pad_mode, str instruction_set) -> (Tensor, Tensor)");
  m.def(
      "rel_pos_attention_int8(Tensor qkv, Tensor rel_pos_h, Tensor rel_pos_w, Tensor? qkv_bias, "
      "int "
      "num_heads, int window_size, str pad_mode, str instruction_set) -> Tensor");
  m.def(
      "rel_pos_attention_backward(Tensor grad_out, Tensor qkv, Tensor rel_pos_h, Tensor rel_pos_w, "
      "Tensor? qkv_bias, Tensor out, Tensor log_sum_exp, int num_heads, int window_size, str "
      "pad_mode, bool needs_tables, str instruction_set) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(refsam_kernels_cpu, CPU, m) {
  m.impl("rel_pos_attention", TORCH_BOX(&forward));
  m.impl("rel_pos_attention_int8", TORCH_BOX(&int8_forward));
  m.impl("rel_pos_attention_backward", TORCH_BOX(&backward));
}

}  // namespace refsam::cpu
