// Building blocks of the kernels of rel_pos_attention, for the instruction set that the including
// file is compiled for: vectors, the operands of matrix products, a register-blocked product, exp2.
//
// Everything is in an unnamed namespace and no header with inline functions is included beside the
// intrinsics: a function compiled for AVX-512 must not become the linker's choice for everyone.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define REFSAM_INLINE inline __attribute__((always_inline))
#define REFSAM_INLINE_LAMBDA __attribute__((always_inline))

namespace refsam::cpu {
namespace {

// Lanes of a vector, and the tile of a product that fits the registers: kRows x kVectors sums.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kRows = 6;
constexpr int kPanel = kVectors * kLanes;

typedef float Vector __attribute__((vector_size(kLanes * 4), may_alias));
typedef int32_t IntVector __attribute__((vector_size(kLanes * 4), may_alias));
typedef Vector UnalignedVector __attribute__((aligned(2)));

REFSAM_INLINE Vector load(const void* from) { return *static_cast<const UnalignedVector*>(from); }
REFSAM_INLINE void store(void* to, Vector value) { *static_cast<UnalignedVector*>(to) = value; }
REFSAM_INLINE Vector broadcast(float value) { return value - Vector{}; }
REFSAM_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

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
  x = x < -126.0f ? broadcast(-126.0f) : x;
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

REFSAM_INLINE void store_elements(float* to, Vector values) { store(to, values); }
REFSAM_INLINE void store_elements(Bfloat16* to, Vector values) {
  const BitVector bits = (BitVector)values;
  // To nearest, ties to even; a NaN stays one.
  const BitVector rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const BitVector kept = values == values ? rounded : bits >> 16 | 0x40;
  const HalfVector halves = __builtin_convertvector(kept, HalfVector);
  memcpy(to, &halves, sizeof(halves));
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

// Operands of a product are kept as they are multiplied: `kPack` neighbours along the summed
// dimension lie side by side in a lane of four bytes. `dot` adds to `sum` the lane at `left` times
// every lane at `right`. `pack` lays neighbours of one row side by side, `pack_rows` those of kPack
// rows.
struct Fp32Operand {
  using Stored = float;
  static constexpr int kPack = 1;

  template <class Element>
  static REFSAM_INLINE Stored pack(Element value) {
    return to_float(value);
  }
  static REFSAM_INLINE void pack(Vector values, Stored* to) { store(to, values); }
  static REFSAM_INLINE void pack_rows(const Vector* rows, Stored* to) { store(to, rows[0]); }
  static REFSAM_INLINE Vector dot(Vector sum, const Stored* left, Vector right) {
    return sum + *left * right;
  }
};

#ifdef __AVX512BF16__
struct Bf16PairOperand {
  using Stored = uint16_t;
  static constexpr int kPack = 2;

  static REFSAM_INLINE Stored pack(Bfloat16 value) { return value.bits; }
  static REFSAM_INLINE void pack(Vector values, Stored* to) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)values);
    memcpy(to, &rounded, sizeof(rounded));
  }
  static REFSAM_INLINE void pack_rows(const Vector* rows, Stored* to) {
    const auto even =
        __builtin_convertvector((HalfVector)_mm512_cvtneps_pbh((__m512)rows[0]), BitVector);
    const auto odd =
        __builtin_convertvector((HalfVector)_mm512_cvtneps_pbh((__m512)rows[1]), BitVector);
    store(to, (Vector)(even | odd << 16));
  }
  static REFSAM_INLINE Vector dot(Vector sum, const Stored* left, Vector right) {
    int32_t pair;
    memcpy(&pair, left, sizeof(pair));
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair),
                                    (__m512bh)right);
  }
};
#endif

// An operand: element (row, depth) of the left one is at row * `row` + depth * `depth`, lane group
// (depth, column) of the right one at depth * `depth` + column; all in units of Stored, `depth` for
// kPack summed elements at once.
template <class Operand>
struct Left {
  const typename Operand::Stored* data;
  int64_t row, depth;
};
template <class Operand>
struct Right {
  const typename Operand::Stored* data;
  int64_t depth;
};

// A tile of kRows x V vectors of a product over `depth` lanes; each sum ends in
// finish(row, vector, sum). A function of its own, with what `finish` needs by value: the addresses
// of the loop then stay in registers.
template <int V, class Operand, class Finish>
__attribute__((noinline)) void multiply_tile(Left<Operand> left, Right<Operand> right,
                                             int64_t depth, Finish finish) {
  Vector sum[kRows][V]{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load(right.data + v * kLanes * Operand::kPack);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[row][v] = Operand::dot(sum[row][v], left.data + row * left.row, column[v]);
      }
    }
    left.data += left.depth;
    right.data += right.depth;
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) finish(row, v, sum[row][v]);
  }
}

// The same for `vectors` <= kVectors, known at run time.
template <class Operand, class Finish>
REFSAM_INLINE void multiply_panel(Left<Operand> left, Right<Operand> right, int64_t depth,
                                  int64_t vectors, Finish finish) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return multiply_tile<4>(left, right, depth, finish);
    if (vectors == 3) return multiply_tile<3>(left, right, depth, finish);
  }
  if (vectors == 2) return multiply_tile<2>(left, right, depth, finish);
  multiply_tile<1>(left, right, depth, finish);
}

// to (rows, width) = factor[row] * to + left @ right for rows <= kRows and any multiple of kLanes
// as width. kRows rows of the left operand are read.
template <class Operand>
void multiply_add(Left<Operand> left, Right<Operand> right, int64_t depth, int64_t width,
                  const float* factor, float* to, int64_t to_row, int rows = kRows) {
  for (int64_t column = 0; column < width; column += kPanel) {
    multiply_panel<Operand>(left, {right.data + column * Operand::kPack, right.depth}, depth,
                            smaller(kVectors, (width - column) / kLanes),
                            [=](int row, int v, Vector sum) REFSAM_INLINE_LAMBDA {
                              if (row >= rows) return;
                              float* const at = to + row * to_row + column + v * kLanes;
                              store(at, load(at) * factor[row] + sum);
                            });
  }
}

}  // namespace
}  // namespace refsam::cpu
