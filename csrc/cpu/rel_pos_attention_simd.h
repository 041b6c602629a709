// The operands of rel_pos_attention's matrix products and a register-blocked product, for the
// instruction set that the including file is compiled for.
#pragma once

#include "vector.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace refsam::cpu {
namespace {

// The tile of a product that fits the registers: kRows x kVectors sums.
#ifdef __AVX512F__
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int kRows = 6;
constexpr int kPanel = kVectors * kLanes;

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

// The operand of calls in bfloat16.
#ifdef __AVX512BF16__
using Bfloat16Operand = Bf16PairOperand;
#else
using Bfloat16Operand = Fp32Operand;
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
