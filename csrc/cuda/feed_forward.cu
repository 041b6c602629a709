// A block has a row in its registers, four neighbouring numbers of it in a thread at a time; sums
// over the row are taken in a fixed order.
#include "feed_forward.h"
#include "launch.h"
#include "warp.h"

namespace refsam::cuda {
namespace {

constexpr int kFour = 4;
constexpr int kGeluThreads = 256;

template <typename T>
struct alignas(kFour * sizeof(T)) Four {
  T values[kFour];
};

// Numbers offset, ..., offset + 3, of which `count` exist; the others are zero.
__device__ inline void read(const Reals& from, int64_t offset, int count, bool in_fours,
                            float (&values)[kFour]) {
  const auto read_at_once = [&](auto zero) {
    using T = decltype(zero);
    const auto four = *reinterpret_cast<const Four<T>*>(static_cast<const T*>(from.data) + offset);
#pragma unroll
    for (int i = 0; i < kFour; ++i) values[i] = static_cast<float>(four.values[i]);
  };
  if (!in_fours || count < kFour) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) values[i] = i < count ? from[offset + i] : 0.0f;
  } else if (from.dtype == Dtype::kFloat32) {
    read_at_once(float{});
  } else if (from.dtype == Dtype::kFloat16) {
    read_at_once(__half{});
  } else {
    read_at_once(__nv_bfloat16{});
  }
}

__device__ inline void write(const MutableReals& to, int64_t offset, int count, bool in_fours,
                             const float (&values)[kFour]) {
  const auto write_at_once = [&](auto zero) {
    using T = decltype(zero);
    Four<T> four;
#pragma unroll
    for (int i = 0; i < kFour; ++i) four.values[i] = static_cast<T>(values[i]);
    *reinterpret_cast<Four<T>*>(static_cast<T*>(to.data) + offset) = four;
  };
  if (!in_fours || count < kFour) {
#pragma unroll
    for (int i = 0; i < kFour; ++i)
      if (i < count) to.store(offset + i, values[i]);
  } else if (to.dtype == Dtype::kFloat32) {
    write_at_once(float{});
  } else if (to.dtype == Dtype::kFloat16) {
    write_at_once(__half{});
  } else {
    write_at_once(__nv_bfloat16{});
  }
}

// The exact one, by the error function.
__device__ inline float gelu(float x) { return x * (0.5f * (1.0f + erff(x * 0.70710678118f))); }

// A row of at most kWarps * 32 * kFours * 4 numbers. As the widest row: 8 warps of 8 fours each.
template <int kWarps, int kFours>
__global__ void __launch_bounds__(kWarps* kWarpSize) add_and_norm_kernel(AddAndNorm call) {
  __shared__ float sums[2][kWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * call.width;
  const auto column = [](int i) {
    return (i * kWarps * kWarpSize + static_cast<int>(threadIdx.x)) * kFour;
  };
  float x[kFours][kFour];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const int count = call.width - column(i);
    float term[kFour];
    read(call.residual, row + column(i), count, call.in_fours, x[i]);
    read(call.first, row + column(i), count, call.in_fours, term);
#pragma unroll
    for (int j = 0; j < kFour; ++j) x[i][j] += term[j];
    if (call.second.data) {
      read(call.second, row + column(i), count, call.in_fours, term);
#pragma unroll
      for (int j = 0; j < kFour; ++j) x[i][j] += call.scale * term[j];
    }
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      x[i][j] = call.x.rounded(x[i][j]);
      sum += x[i][j];
    }
    write(call.x, row + column(i), count, call.in_fours, x[i]);
  }
  if (!call.norm_weight.data) return;
  const float mean = block_sum<kWarps>(sum, sums[0]) / static_cast<float>(call.width);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kFours; ++i)
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      const float centred = column(i) + j < call.width ? x[i][j] - mean : 0.0f;
      squares += centred * centred;
    }
  const float variance = block_sum<kWarps>(squares, sums[1]) / static_cast<float>(call.width);
  const float rstd = rsqrtf(variance + call.eps);
  if (call.mean && threadIdx.x == 0) {
    call.mean[blockIdx.x] = mean;
    call.rstd[blockIdx.x] = rstd;
  }
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const int count = call.width - column(i);
    float weight[kFour], bias[kFour];
    read(call.norm_weight, column(i), count, call.in_fours, weight);
    read(call.norm_bias, column(i), count, call.in_fours, bias);
#pragma unroll
    for (int j = 0; j < kFour; ++j) x[i][j] = (x[i][j] - mean) * rstd * weight[j] + bias[j];
    write(call.normed, row + column(i), count, call.in_fours, x[i]);
  }
}

// Blocks along y share a row.
__global__ void __launch_bounds__(kGeluThreads) bias_gelu_kernel(BiasGelu call) {
  const int column = (blockIdx.y * kGeluThreads + threadIdx.x) * kFour;
  const int count = call.width - column;
  if (count <= 0) return;
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * call.width + column;
  float hidden[kFour], bias[kFour];
  read({call.hidden.data, call.hidden.dtype}, offset, count, call.in_fours, hidden);
  read(call.bias, column, count, call.in_fours, bias);
#pragma unroll
  for (int j = 0; j < kFour; ++j) hidden[j] = call.hidden.rounded(hidden[j] + bias[j]);
  if (call.hidden.data != call.activated.data)
    write(call.hidden, offset, count, call.in_fours, hidden);
#pragma unroll
  for (int j = 0; j < kFour; ++j) hidden[j] = gelu(hidden[j]);
  write(call.activated, offset, count, call.in_fours, hidden);
}

}  // namespace

void launch_add_and_norm(const AddAndNorm& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(call.rows));
  if (call.width <= kWarpSize * 4 * kFour)
    launch(add_and_norm_kernel<1, 4>, grid, dim3(kWarpSize), 0, stream, call);
  else
    launch(add_and_norm_kernel<8, 8>, grid, dim3(8 * kWarpSize), 0, stream, call);
}

void launch_bias_gelu(const BiasGelu& call, cudaStream_t stream) {
  constexpr int per_block = kGeluThreads * kFour;
  const dim3 grid(static_cast<unsigned>(call.rows), (call.width + per_block - 1) / per_block);
  launch(bias_gelu_kernel, grid, dim3(kGeluThreads), 0, stream, call);
}

}  // namespace refsam::cuda
