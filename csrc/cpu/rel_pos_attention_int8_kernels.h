// The kernels of rel_pos_attention_int8 for the instruction set that the including file is compiled
// for: the forward of rel_pos_attention, with products of queries and keys in 8-bit integers.
#pragma once

#include "int8_linear_tile.h"
#include "rel_pos_attention_forward.h"
#include "rel_pos_attention_int8.h"

namespace refsam::cpu {
namespace {

// A token as integers, at most kLargest / 2 on either side, and zeros up to whole vectors: value =
// step * integer. Returns the step, NaN if a value is not finite. Overwrites `values`, which has
// zeros up to whole vectors.
inline float quantise_token(float* values, int64_t count, int8_t* integers) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  Vector most{}, poison{};
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vector value = load(values + k);
    most = larger(larger(value, -value), most);
    poison += value * 0.0f;
  }
  const float step = largest_of(most) / (kLargest / 2) + sum_of(poison);
  const bool is_usable = step > 1.2e-38f;  // also false for NaN
  const Vector factor = broadcast(is_usable ? 1 / step : 0.0f);
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vector shifted = is_usable ? load(values + k) * factor + kRounder : broadcast(kRounder);
    const IntVector value = (IntVector)shifted - (IntVector)broadcast(kRounder);
    const ByteVector bytes = __builtin_convertvector(value, ByteVector);
    memcpy(integers + k, &bytes, sizeof(bytes));
  }
  return is_usable || step != step ? step : 0.0f;
}

// The relative terms of one query; see RelativeTerms.
struct RowTerms {
  const float *h, *w;
  const int32_t *rows, *columns;
};

// Sums of products of bytes to scores, in place; returns the maximum's lanes. A function of its
// own: its addresses stay in registers.
__attribute__((noinline)) Vector finish_scores(float* scores, int64_t vectors, const int32_t* zeros,
                                               const float* key_steps, float step, RowTerms terms,
                                               Vector maximum) {
  for (int64_t v = 0; v < vectors; ++v) {
    const IntVector sum =
        (IntVector)load(scores + v * kLanes) - (IntVector)load(zeros + v * kLanes);
    const Vector product = __builtin_convertvector(sum, Vector) * step;
    const Vector relative = terms.h[terms.rows[v]] + load(terms.w + terms.columns[v]);
    const Vector value = product * load(key_steps + v * kLanes) + relative;
    store(scores + v * kLanes, value);
    maximum = larger(value, maximum);
  }
  return maximum;
}

template <class Element, class Operand>
class Int8Keys {
 public:
  Int8Keys(const RelPosAttention& call, const Sizes& sizes, Arena& arena)
      : call_(call),
        groups_((call.head_dim + kInt8Group - 1) / kInt8Group),
        keys_(round_up(sizes.keys, kTileColumns)),
        columns_(arena.take<int8_t>(keys_ * groups_ * kInt8Group)),
        zeros_(arena.take<int32_t>(keys_)),
        key_steps_(arena.take<float>(keys_)),
        rows_(arena.take<uint8_t>(kForwardGroup * row_stride())),
        query_steps_(arena.take<float>(kForwardGroup)),
        values_(arena.take<float>(round_up(call.head_dim, kLanes))),
        integers_(arena.take<int8_t>(round_up(call.head_dim, kLanes))) {}

  void pack(const Task& task) {
    memset(columns_, 0, static_cast<size_t>(keys_ * groups_ * kInt8Group));
    memset(zeros_, 0, sizeof(*zeros_) * static_cast<size_t>(keys_));
    memset(key_steps_, 0, sizeof(*key_steps_) * static_cast<size_t>(keys_));
    for_each_key<Element>(call_, task, 1,
                          [&](const Element* token, int64_t index) { pack_key(token, index); });
  }

  void begin_queries(const Task& task, int64_t first, int64_t count) {
    memset(rows_, kZero, static_cast<size_t>(round_up(count, kRows) * row_stride()));
    for (int64_t i = 0; i < kForwardGroup; ++i) query_steps_[i] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = first + i;
      const Element* const token =
          token_at<Element>(call_, task, query / task.width, query % task.width, 0);
      query_steps_[i] = quantise(token);
      uint8_t* const row = rows_ + i * row_stride();
      for (int64_t k = 0; k < row_stride(); ++k) {
        row[k] = static_cast<uint8_t>(integers_[k] + kZero);
      }
    }
  }

  template <class Stored>
  REFSAM_INLINE void score(const Stored*, int64_t query, const RelativeTerms& terms, KeyBlock block,
                           float* scores, Vector* maxima) const {
    multiply(query, block, reinterpret_cast<int32_t*>(scores));
    const int64_t key = block.first * kLanes;
    for (int row = 0; row < kRows; ++row) {
      const RowTerms of_row{terms.h + row * terms.h_row, terms.w + row * terms.w_row,
                            terms.rows + block.first, terms.columns + block.first};
      maxima[row] = finish_scores(scores + row * kScoreRow, block.count, zeros_ + key,
                                  key_steps_ + key, query_steps_[query + row], of_row, maxima[row]);
    }
  }

 private:
  static constexpr int kZero = (kLargest + 1) / 2;  // of the bytes of queries

  // Products of kRows queries with a block of keys, whole blocks of 16.
  void multiply(int64_t query, KeyBlock block, int32_t* sums) const {
    const int64_t blocks = (block.count + kBlockVectors - 1) / kBlockVectors;
    const int64_t first = block.first / kBlockVectors;
    for (int64_t i = 0; i < blocks; i += kTileBlocks) {
      const int8_t* const columns = columns_ + (first + i) * groups_ * kGroupBytes;
      for (int row = 0; row < kRows; row += kTileRows) {
        multiply_blocks(rows_ + (query + row) * row_stride(), row_stride(), columns, groups_,
                        smaller(kTileBlocks, blocks - i), columns,
                        sums + row * kScoreRow + i * kInt8Block, kScoreRow);
      }
    }
  }

  int64_t row_stride() const { return groups_ * kInt8Group; }

  float quantise(const Element* token) {
    read_row(token, call_.head_dim, values_);
    return quantise_token(values_, call_.head_dim, integers_);
  }

  void pack_key(const Element* token, int64_t index) {
    key_steps_[index] = quantise(token);
    int8_t* const column =
        columns_ + index / kInt8Block * groups_ * kGroupBytes + index % kInt8Block * kInt8Group;
    int32_t sum = 0;
    for (int64_t k = 0; k < row_stride(); ++k) sum += integers_[k];
    zeros_[index] = kZero * sum;
    for (int64_t group = 0; group < groups_; ++group) {
      memcpy(column + group * kGroupBytes, integers_ + group * kInt8Group, kInt8Group);
    }
  }

  const RelPosAttention& call_;
  const int64_t groups_, keys_;
  int8_t* const columns_;  // as Int8Weights::packed
  int32_t* const zeros_;   // what the queries' zero adds to a key's products
  float* const key_steps_;
  uint8_t* const rows_;  // (kForwardGroup, groups * kInt8Group)
  float* const query_steps_;
  float* const values_;  // of one token
  int8_t* const integers_;
};

const RelPosAttentionInt8Kernels kInt8AttentionKernels{forward_scratch<Int8Keys>,
                                                       forward<Int8Keys>};

}  // namespace
}  // namespace refsam::cpu
