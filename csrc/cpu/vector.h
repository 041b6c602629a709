// Vectors of the instruction set that the including file is compiled for, elements of tensors,
// exp2, and a thread's scratch.
//
// Everything is in an unnamed namespace and no header with inline functions is included beside the
// intrinsics: a function compiled for AVX-512 must not become the linker's choice for everyone.
#pragma once

#include <stdint.h>
#include <string.h>

#define REFSAM_INLINE inline __attribute__((always_inline))
#define REFSAM_INLINE_LAMBDA __attribute__((always_inline))

namespace refsam::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

constexpr float kLog2E = 1.44269504088896340736f;

typedef float Vector __attribute__((vector_size(kLanes * 4), may_alias));
typedef int32_t IntVector __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint8_t ByteVector __attribute__((vector_size(kLanes), may_alias));
typedef Vector UnalignedVector __attribute__((aligned(2)));

REFSAM_INLINE Vector load(const void* from) { return *static_cast<const UnalignedVector*>(from); }
REFSAM_INLINE void store(void* to, Vector value) { *static_cast<UnalignedVector*>(to) = value; }
REFSAM_INLINE Vector broadcast(float value) { return value - Vector{}; }
// b if one of them is NaN. GCC 12 makes two instructions of a choice between vectors.
REFSAM_INLINE Vector larger(Vector a, Vector b) {
#ifdef __AVX2__
  asm("vmaxps %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
  return a;
#else
  return a > b ? a : b;
#endif
}

REFSAM_INLINE float sum_of(Vector vector) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += vector[lane];
  return sum;
}

REFSAM_INLINE float largest_of(Vector vector) {
  float largest = vector[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    largest = vector[lane] > largest ? vector[lane] : largest;
  }
  return largest;
}

constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// 2^x to float rounding (relative error 8e-8) for x <= 127; below -126 some number under 3e-38.
REFSAM_INLINE Vector exp2_of(Vector x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  x = larger(broadcast(-126.0f), x);       // NaN stays
  const Vector shifted = x + kRounder;
  const Vector rest = x - (shifted - kRounder);
  Vector power = rest * 0x1.41d332p-13f + 0x1.5f456ap-10f;
  power = power * rest + 0x1.3b2dbcp-7f;
  power = power * rest + 0x1.c6aed4p-5f;
  power = power * rest + 0x1.ebfbdap-3f;
  power = power * rest + 0x1.62e430p-1f;
  power = power * rest + 1.0f;
  return (Vector)((IntVector)power + ((IntVector)shifted << 23));
}

// Elements of tensors.
struct Bfloat16 {
  uint16_t bits;
};

REFSAM_INLINE float to_float(float value) { return value; }
REFSAM_INLINE float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

typedef uint32_t BitVector __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint16_t HalfVector __attribute__((vector_size(kLanes * 2), may_alias));

REFSAM_INLINE Vector load_elements(const float* from) { return load(from); }
REFSAM_INLINE Vector load_elements(const Bfloat16* from) {
  HalfVector halves;
  memcpy(&halves, from, sizeof(halves));
  return (Vector)(__builtin_convertvector(halves, BitVector) << 16);
}

REFSAM_INLINE void store_elements(float* to, Vector values) { store(to, values); }
REFSAM_INLINE void store_elements(Bfloat16* to, Vector values) {
  const BitVector bits = (BitVector)values;
  // To nearest, ties to even; a NaN stays one.
  const BitVector rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const BitVector kept = values == values ? rounded : bits >> 16 | 0x40;
  const HalfVector halves = __builtin_convertvector(kept, HalfVector);
  memcpy(to, &halves, sizeof(halves));
}

// One row of a tensor as floats, with zeros up to whole vectors.
template <class Element>
REFSAM_INLINE void read_row(const Element* from, int64_t count, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(to + k, load_elements(from + k));
  if (k == count) return;
  store(to + k, Vector{});
  for (; k < count; ++k) to[k] = to_float(from[k]);
}

// to (count,) = factor * from, of which whole vectors are read.
template <class Element>
REFSAM_INLINE void store_row(Element* to, const float* from, float factor, int64_t count) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store_elements(to + k, load(from + k) * factor);
  if (k == count) return;
  Element rest[kLanes];
  store_elements(rest, load(from + k) * factor);
  memcpy(to + k, rest, sizeof(Element) * static_cast<size_t>(count - k));
}

// Hands out aligned pieces of a thread's scratch; from a null base it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(base_ + static_cast<uintptr_t>(used_));
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace refsam::cpu
