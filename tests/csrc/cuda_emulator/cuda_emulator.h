// CUDA on a CPU: what the compiler of kernels (csrc/cuda/*.cu) includes before them, so that the
// same sources run without a GPU, as Triton's interpreter runs Triton kernels.
//
// Blocks run one after another, their threads as fibres of one thread, which change at barriers and
// at the operations of a warp. What a GPU leaves open is made to show:
// - shared memory holds NaN when a block begins (all bits are set, in integers -1);
// - threads run in another order in every block;
// - shared memory that two threads use, one of them writing, without a barrier between (shuffles
//   and ldmatrix are none): std::runtime_error. The compiler shows every access, but not in builds
//   with AddressSanitizer. Atomics and global memory are not looked at;
// - an asynchronous copy fills its destination with NaN until it is waited for;
// - threads that wait at different barriers, addresses that are not aligned or not shared memory,
//   lanes that a mask leaves out or that call different operations: std::runtime_error.
// Local variables hold a pattern (-ftrivial-auto-var-init); AddressSanitizer finds what is read or
// written outside tensors and dynamic shared memory (`make sanitize`).
#ifndef REFSAM_CUDA_EMULATOR_H
#define REFSAM_CUDA_EMULATOR_H

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Not before the standard library, which they disturb: __noinline__ is a macro of theirs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "fibres.h"

// A kernel's attributes, which mean nothing here. Shared memory is the only thread_local memory of
// the library: that is how the emulator finds it to fill it.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

#define threadIdx (::refsam::emulator::position.thread)
#define blockIdx (::refsam::emulator::position.block)
#define blockDim (::refsam::emulator::position.block_size)
#define gridDim (::refsam::emulator::position.grid_size)
#define warpSize 32

// Barriers.

inline void __syncthreads() {
  refsam::emulator::meet_block("__syncthreads", 0, [](auto&) {});
}

inline int __syncthreads_count(int predicate) {
  return refsam::emulator::meet_block("__syncthreads_count", predicate, [](auto& values) {
    int count = 0;
    for (int* value : values) count += value != nullptr && *value != 0;
    for (int* value : values)
      if (value != nullptr) *value = count;
  });
}

inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  refsam::emulator::meet_warp("__syncwarp", mask, 0,
                              [](auto&) { refsam::emulator::pass_warp_barrier(); });
}

// Shuffles: the value of lane `source`, of a lane that takes no part NaN.

namespace refsam::emulator {

template <typename T>
struct Shuffled {
  T value;
  int source;
  T result;
};

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  return meet_warp(name, mask, Shuffled<T>{value, source, value},
                   [](auto& lanes) {
                     for (Shuffled<T>* lane : lanes) {
                       if (lane == nullptr) continue;
                       const Shuffled<T>* from = lanes[lane->source];
                       std::memset(static_cast<void*>(&lane->result), 0xff, sizeof(T));
                       if (from != nullptr) lane->result = from->value;
                     }
                   })
      .result;
}

// Lane `lane` of the same part of `width` lanes, or this lane where that is another part's.
inline int lane_of_part(int lane, int width) {
  const int start = lane_id() & ~(width - 1);
  return start <= lane && lane < start + width ? lane : lane_id();
}

}  // namespace refsam::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int start = refsam::emulator::lane_id() & ~(width - 1);
  return refsam::emulator::shuffle("__shfl_sync", mask, value, start + (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = refsam::emulator::lane_of_part(refsam::emulator::lane_id() ^ distance, width);
  return refsam::emulator::shuffle("__shfl_xor_sync", mask, value, lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = refsam::emulator::lane_id() - static_cast<int>(distance);
  return refsam::emulator::shuffle("__shfl_up_sync", mask, value,
                                   refsam::emulator::lane_of_part(lane, width));
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = refsam::emulator::lane_id() + static_cast<int>(distance);
  return refsam::emulator::shuffle("__shfl_down_sync", mask, value,
                                   refsam::emulator::lane_of_part(lane, width));
}

// Votes and reductions.

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned vote = predicate != 0;
  return refsam::emulator::meet_warp("__ballot_sync", mask, vote, [](auto& lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes[lane] != nullptr) votes |= *lanes[lane] << lane;
    for (unsigned* lane : lanes)
      if (lane != nullptr) *lane = votes;
  });
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

namespace refsam::emulator {

template <typename T, typename Operation>
T reduce(const char* name, unsigned mask, T value, Operation) {
  static_assert(std::is_integral_v<T>);  // as on a GPU
  return meet_warp(name, mask, value, [](auto& lanes) {
    const T* first = nullptr;
    T result{};
    for (const T* lane : lanes) {
      if (lane == nullptr) continue;
      result = first == nullptr ? *lane : Operation{}(result, *lane);
      first = lane;
    }
    for (T* lane : lanes)
      if (lane != nullptr) *lane = result;
  });
}

}  // namespace refsam::emulator

template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  const auto add = [](T a, T b) { return static_cast<T>(a + b); };
  return refsam::emulator::reduce("__reduce_add_sync", mask, value, add);
}

template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  const auto least = [](T a, T b) { return std::min(a, b); };
  return refsam::emulator::reduce("__reduce_min_sync", mask, value, least);
}

template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  const auto greatest = [](T a, T b) { return std::max(a, b); };
  return refsam::emulator::reduce("__reduce_max_sync", mask, value, greatest);
}

template <typename T>
T __reduce_or_sync(unsigned mask, T value) {
  const auto either = [](T a, T b) { return a | b; };
  return refsam::emulator::reduce("__reduce_or_sync", mask, value, either);
}

// Atomics, of integers only: sums of floating point numbers would depend on the order.

template <typename T>
  requires std::is_integral_v<T>
REFSAM_NOT_WATCHED T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address + value);
}

template <typename T>
  requires std::is_integral_v<T>
REFSAM_NOT_WATCHED T atomicMin(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::min(*address, value));
}

template <typename T>
  requires std::is_integral_v<T>
REFSAM_NOT_WATCHED T atomicMax(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::max(*address, value));
}

template <typename T>
  requires std::is_integral_v<T>
REFSAM_NOT_WATCHED T atomicOr(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address | value);
}

// Functions that only nvcc knows.

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

using std::isfinite;
using std::isinf;
using std::isnan;

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return std::clamp(x, 0.0f, 1.0f); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

#include "launch.h"
#include "mma.h"

#endif  // REFSAM_CUDA_EMULATOR_H
