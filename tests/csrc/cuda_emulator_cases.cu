// Kernels that test the emulator itself: `program CASE` runs one of them and prints its result or
// the emulator's message. tests/kernels/test_cuda.py compiles them and knows the answers.
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/mma.h"
#include "../../csrc/cuda/warp.h"

using namespace refsam::cuda;

namespace {

constexpr int kThreads = 64;

using Kernel = void (*)(float*);

// out (64,) float as numbers, NaN where it was not written or made of what was not.
std::string results(Kernel kernel, size_t shared_bytes = 0) {
  std::vector<float> out(kThreads, std::numeric_limits<float>::quiet_NaN());
  launch(kernel, dim3(2), dim3(kThreads), shared_bytes, nullptr, out.data());
  std::string text;
  for (float value : out)
    text += (std::isnan(value) ? "nan" : std::to_string(static_cast<int>(value))) + " ";
  return text;
}

__global__ void sum_by_shuffles(float* out) {
  __shared__ float partial[kThreads / kWarpSize];
  out[threadIdx.x] = block_sum<kThreads / kWarpSize>(static_cast<float>(threadIdx.x), partial);
}

__global__ void ask_neighbours(float* out) {
  const float value = threadIdx.x;
  const float below = __shfl_up_sync(kAllLanes, value, 1, 8);
  const float above = __shfl_down_sync(kAllLanes, value, 1, 8);
  const float first = __shfl_sync(kAllLanes, value, 0, 8);
  const unsigned odd = __ballot_sync(kAllLanes, threadIdx.x % 2 == 1);
  out[threadIdx.x] =
      (below == value - (threadIdx.x % 8 != 0) && above == value + (threadIdx.x % 8 != 7) &&
       first == threadIdx.x / 8 * 8.0f && odd == 0xaaaaaaaau);
}

__global__ void leave_early(float* out) {
  if (threadIdx.x % 2 == 1) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void wait_at_different_barriers(float* out) {
  if (threadIdx.x == 3) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
}

__global__ void leave_out_oneself(float*) { __syncwarp(1u << (threadIdx.x % kWarpSize / 2)); }

enum class Meet { kNowhere, kShuffle, kWarp, kBlock };

template <Meet kMeet>
void meet() {
  if (kMeet == Meet::kShuffle) __shfl_xor_sync(kAllLanes, 0, 1);
  if (kMeet == Meet::kWarp) __syncwarp();
  if (kMeet == Meet::kBlock) __syncthreads();
}

// Twice by the same memory: from lane to lane for a distance of 1, of 32 from warp to warp.
template <int kDistance, Meet kBeforeReading, Meet kBeforeWriting>
__global__ void pass_numbers(float* out) {
  __shared__ int numbers[kThreads];
  int sum = 0;
  for (int i = 0; i < 2; ++i) {
    numbers[threadIdx.x] = i;
    meet<kBeforeReading>();
    sum += numbers[threadIdx.x ^ kDistance];
    meet<kBeforeWriting>();
  }
  out[threadIdx.x] = sum;
}

template <Meet kMeet>
__global__ void load_what_lanes_wrote(float* out) {
  auto* rows = reinterpret_cast<uint32_t*>(dynamic_shared());  // (64, 4), 16 bytes each
  for (int i = 0; i < 4; ++i) rows[kThreads * i + threadIdx.x] = 1;
  meet<kMeet>();
  uint32_t matrices[4];
  ldmatrix_x4(matrices, rows + 4 * threadIdx.x);
  out[threadIdx.x] = matrices[0];
}

__global__ void forget_to_write(float* out) {
  out[threadIdx.x] = reinterpret_cast<float*>(dynamic_shared())[threadIdx.x];
}

__global__ void forget_to_set(float* out) {
  float values[4];
  if (threadIdx.x > kThreads) values[threadIdx.x % 4] = 0.0f;
  out[threadIdx.x] = values[threadIdx.x % 4] < -1e30f;
}

template <bool kWait, Meet kMeet = Meet::kBlock>
__global__ void copy_later(float* out) {
  alignas(16) static const float source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x < 4) {
    cp_async_16(shared + 4 * threadIdx.x, source + 4 * (threadIdx.x % 2), threadIdx.x < 2);
    cp_async_commit();
  }
  if (kWait) cp_async_wait<0>();
  meet<kMeet>();
  if (threadIdx.x < 16) out[threadIdx.x] = shared[threadIdx.x];
  __syncthreads();
  if (!kWait) cp_async_wait<0>();
}

// The first of two groups has arrived, the second has not.
__global__ void copy_in_groups(float* out) {
  alignas(16) static const float source[4] = {1, 2, 3, 4};
  float* shared = reinterpret_cast<float*>(dynamic_shared()) + 8 * threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    cp_async_16(shared + 4 * i, source, true);
    cp_async_commit();
  }
  cp_async_wait<1>();
  out[threadIdx.x] = shared[0] == 1.0f && isnan(shared[4]);
  cp_async_wait<0>();
}

__global__ void forget_copies(float* out) {
  alignas(16) static const float source[4] = {};
  cp_async_16(dynamic_shared(), source, true);
  out[0] = 0.0f;
}

__global__ void copy_to_an_odd_address(float* out) { cp_async_16(dynamic_shared() + 8, out, true); }

__global__ void load_from_global_memory(float* out) {
  uint32_t matrices[4];
  ldmatrix_x4(matrices, out);
}

// a (16, 16), row-major, times b (16, 8), by way of shared memory; integers, so that sums are
// exact.
template <typename Element>
__global__ void multiply(float* out) {
  Element* a = reinterpret_cast<Element*>(dynamic_shared());
  Element* b = a + 16 * 16;
  for (int i = threadIdx.x; i < 16 * 16; i += kThreads) a[i] = Element(float(i % 7 - 3));
  for (int i = threadIdx.x; i < 16 * 16; i += kThreads) b[i] = Element(float(i * i % 11 - 5));
  __syncthreads();
  const int lane = lane_id();
  uint32_t left[4], right[4];
  ldmatrix_x4(left, a + (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix_x4_trans(right, b + (lane % 16) * 16 + lane / 16 * 8);
  float sums[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  mma_m16n8k16<Element>(sums, left, {right[0], right[1]});
  bool equal = true;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float wanted = 1.0f;
    for (int k = 0; k < 16; ++k) wanted += float(a[row * 16 + k]) * float(b[k * 16 + column]);
    equal = equal && sums[i] == wanted;
  }
  out[threadIdx.x] = equal;
}

__global__ void nothing(float*) {}

std::string start(dim3 grid, dim3 block, size_t shared_bytes) {
  launch(nothing, grid, block, shared_bytes, nullptr, nullptr);
  return "started";
}

const std::map<std::string, std::function<std::string()>> cases = {
    {"sum", [] { return results(sum_by_shuffles); }},
    {"neighbours", [] { return results(ask_neighbours); }},
    {"leave-early", [] { return results(leave_early); }},
    {"deadlock", [] { return results(wait_at_different_barriers); }},
    {"mask", [] { return results(leave_out_oneself); }},
    {"lane-to-lane", [] { return results(pass_numbers<1, Meet::kWarp, Meet::kWarp>); }},
    {"warp-to-warp", [] { return results(pass_numbers<32, Meet::kBlock, Meet::kBlock>); }},
    {"read-too-early", [] { return results(pass_numbers<32, Meet::kNowhere, Meet::kBlock>); }},
    {"write-too-early", [] { return results(pass_numbers<32, Meet::kBlock, Meet::kNowhere>); }},
    {"barrier-of-too-few", [] { return results(pass_numbers<32, Meet::kBlock, Meet::kWarp>); }},
    {"lane-reads-too-early", [] { return results(pass_numbers<1, Meet::kShuffle, Meet::kWarp>); }},
    {"lane-writes-too-early", [] { return results(pass_numbers<1, Meet::kWarp, Meet::kShuffle>); }},
    {"load", [] { return results(load_what_lanes_wrote<Meet::kBlock>, 1024); }},
    {"load-too-early", [] { return results(load_what_lanes_wrote<Meet::kNowhere>, 1024); }},
    {"not-written", [] { return results(forget_to_write, sizeof(float) * kThreads); }},
    {"not-set", [] { return results(forget_to_set); }},
    {"copy", [] { return results(copy_later<true>, 64); }},
    {"copy-without-barrier", [] { return results(copy_later<true, Meet::kShuffle>, 64); }},
    {"copy-not-waited-for", [] { return results(copy_later<false>, 64); }},
    {"copy-groups", [] { return results(copy_in_groups, 32 * kThreads); }},
    {"copy-forgotten", [] { return results(forget_copies, 64); }},
    {"copy-odd-address", [] { return results(copy_to_an_odd_address, 64); }},
    {"load-global", [] { return results(load_from_global_memory, 64); }},
    {"multiply-half", [] { return results(multiply<__half>, 1024); }},
    {"multiply-bfloat16", [] { return results(multiply<__nv_bfloat16>, 1024); }},
    {"no-blocks", [] { return start(0, 32, 0); }},
    {"many-threads", [] { return start(1, 1025, 0); }},
    {"much-shared-memory", [] { return start(1, 32, 100 * 1024); }},
};

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    try {
      std::puts(cases.at(names[i])().c_str());
    } catch (const std::runtime_error& error) {
      std::puts(error.what());
    }
  }
}
