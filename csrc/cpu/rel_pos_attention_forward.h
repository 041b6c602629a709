// The forward of rel_pos_attention for one instruction set: flash attention (Dao et al. 2022).
//
// Keys and values of a window's head are packed once. A group of queries passes over blocks of keys
// that stay in the second-level cache, kRows queries at a time, whose scores stay in the
// first-level one: product with the keys plus the relative terms; softmax with a
// running maximum; product with the values.
#pragma once

#include "rel_pos_attention_pack.h"

namespace refsam::cpu {
namespace {

constexpr int64_t kForwardGroup = 16 * kRows;    // queries
constexpr int64_t kForwardBlock = 512 / kLanes;  // vectors of keys
constexpr int64_t kScoreRow =
    kForwardBlock * kLanes + 16;  // rows do not begin at the same cache set

// Keys of a task as right operands, and their products with queries.
template <class Element, class Operand>
class Keys {
 public:
  using Stored = typename Operand::Stored;

  Keys(const RelPosAttention& call, const Sizes& sizes, Arena& arena)
      : call_(call),
        sizes_(sizes),
        panels_(arena.take<Stored>(sizes.keys * sizes.depth * Operand::kPack)) {}

  void pack(const Task& task) {
    memset(panels_, 0, sizeof(Stored) * sizes_.keys * sizes_.depth * Operand::kPack);
    for_each_key<Element>(call_, task, 1, [&](const Element* token, int64_t index) {
      pack_column<Operand>(token, call_, sizes_, index, panels_);
    });
  }
  void begin_queries(const Task&, int64_t, int64_t) {}

  // Scores of the group's kRows queries from `query` on, whose operands are `queries`, to rows of
  // kScoreRow; raises their `maxima`.
  REFSAM_INLINE void score(const Stored* queries, int64_t, const RelativeTerms& terms,
                           KeyBlock block, float* scores, Vector* maxima) const {
    compute_scores<Operand>(queries, panels_, sizes_.depth, terms, block,
                            [=](int row, int64_t vector, Vector value) REFSAM_INLINE_LAMBDA {
                              store(scores + row * kScoreRow + vector * kLanes, value);
                              maxima[row] = larger(value, maxima[row]);
                            });
  }

 private:
  const RelPosAttention& call_;
  const Sizes& sizes_;
  Stored* const panels_;
};

template <class Element, class Operand, template <class, class> class TaskKeys>
class Forward {
 public:
  using Stored = typename Operand::Stored;
  static constexpr int64_t kPack = Operand::kPack;

  Forward(const RelPosAttention& call, Arena& arena)
      : call_(call),
        sizes_(sizes_of<Operand>(call)),
        relative_(call, sizes_, kForwardGroup, arena),
        keys_(call, sizes_, arena),
        values_(arena.take<Stored>(sizes_.keys * sizes_.channels)),
        queries_(arena.take<Stored>(kForwardGroup * sizes_.depth * kPack)),
        scores_(arena.take<float>(kRows * kScoreRow)),
        out_(arena.take<float>(kForwardGroup * sizes_.channels)),
        maximum_(arena.take<float>(kForwardGroup)),
        sum_(arena.take<float>(kForwardGroup)),
        exponent_scale_(kLog2E / __builtin_sqrtf(static_cast<float>(call.head_dim))) {}

  void run(int64_t begin, int64_t end) {
    relative_.pack();
    for (int64_t index = begin; index < end; ++index) {
      const Task task = task_of(call_, index);
      if (task.first_query < task.last_query) run_task(task);
    }
  }

 private:
  void run_task(const Task& task) {
    pack_keys(task);
    for (int64_t first = task.first_query; first < task.last_query; first += kForwardGroup) {
      const int64_t count = smaller(kForwardGroup, task.last_query - first);
      begin_queries(task, first, count);
      for (int64_t vector = 0; vector < task.key_vectors(); vector += kForwardBlock) {
        const KeyBlock block{vector, smaller(kForwardBlock, task.key_vectors() - vector)};
        for (int64_t query = 0; query < count; query += kRows) attend(query, block);
      }
      end_queries(task, first, count);
    }
  }

  void pack_keys(const Task& task) {
    relative_.begin_task(task);
    keys_.pack(task);
    memset(values_, 0, sizeof(Stored) * sizes_.keys * sizes_.channels);
    for_each_key<Element>(call_, task, 2, [&](const Element* token, int64_t index) {
      pack_row<Operand>(token, call_, sizes_, index, values_);
    });
  }

  void begin_queries(const Task& task, int64_t first, int64_t count) {
    pack_queries<Operand, Element>(call_, task, sizes_, first, count, queries_);
    relative_.compute(task, first, count, queries_);
    keys_.begin_queries(task, first, count);
    memset(out_, 0, sizeof(float) * round_up(count, kRows) * sizes_.channels);
    for (int64_t i = 0; i < kForwardGroup; ++i) {
      maximum_[i] = -__builtin_inff();
      sum_[i] = 0;
    }
  }

  // Adds a block of keys to the results of kRows queries of the group.
  void attend(int64_t query, KeyBlock block) {
    Vector maxima[kRows];
    for (int row = 0; row < kRows; ++row) maxima[row] = broadcast(maximum_[query + row]);
    keys_.score(queries_ + query * sizes_.depth * kPack, query, relative_.terms(query), block,
                scores_, maxima);
    Stored* const probabilities = reinterpret_cast<Stored*>(scores_);  // in the scores' place
    float factor[kRows];
    for (int row = 0; row < kRows; ++row) {
      const float maximum = largest_of(maxima[row]);
      factor[row] = __builtin_exp2f((maximum_[query + row] - maximum) * exponent_scale_);
      maximum_[query + row] = maximum;
      const float sum = exponentials(scores_ + row * kScoreRow, maximum, block.count,
                                     probabilities + row * kScoreRow * kPack);
      sum_[query + row] = sum_[query + row] * factor[row] + sum;
    }
    multiply_add<Operand>(
        {probabilities, kScoreRow * kPack, kPack},
        {values_ + block.first * kLanes * sizes_.channels, sizes_.channels * kPack},
        block.count * kLanes / kPack, sizes_.channels, factor, out_ + query * sizes_.channels,
        sizes_.channels);
  }

  // A row of scores to probabilities times a constant; returns their sum.
  float exponentials(const float* scores, float maximum, int64_t vectors, Stored* to) const {
    const float shift = maximum * exponent_scale_;
    Vector sum{};
    for (int64_t v = 0; v < vectors; ++v) {
      const Vector value = exp2_of(load(scores + v * kLanes) * exponent_scale_ - shift);
      sum += value;
      Operand::pack(value, to + v * kLanes);
    }
    return sum_of(sum);
  }

  void end_queries(const Task& task, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = token_place(call_, task, first + i);
      Element* const out =
          static_cast<Element*>(call_.out) + (token * call_.heads + task.head) * call_.head_dim;
      store_row(out, out_ + i * sizes_.channels, 1 / sum_[i], call_.head_dim);
      if (!call_.log_sum_exp) continue;
      call_.log_sum_exp[statistic_place(call_, task, first + i)] =
          maximum_[i] * exponent_scale_ * kLn2 + __builtin_logf(sum_[i]);
    }
  }

  const RelPosAttention& call_;
  const Sizes sizes_;
  Relative<Element, Operand> relative_;
  TaskKeys<Element, Operand> keys_;
  Stored* const values_;   // (keys, channels)
  Stored* const queries_;  // (kForwardGroup, depth)
  float* const scores_;    // (kRows, kScoreRow)
  float* const out_;       // (kForwardGroup, channels)
  float* const maximum_;
  float* const sum_;
  const float exponent_scale_;  // of the scores, to base 2
};

// Runs tasks in `scratch`; returns the bytes that it takes there, with null nothing but these.
template <class Element, class Operand, template <class, class> class TaskKeys>
int64_t run_forward(const RelPosAttention& call, int64_t begin, int64_t end, char* scratch) {
  Arena arena(scratch);
  Forward<Element, Operand, TaskKeys> forward(call, arena);
  if (scratch) forward.run(begin, end);
  return arena.used();
}

template <template <class, class> class TaskKeys>
int64_t forward_scratch(const RelPosAttention& call) {
  return call.is_bfloat16 ? run_forward<Bfloat16, Bfloat16Operand, TaskKeys>(call, 0, 0, nullptr)
                          : run_forward<float, Fp32Operand, TaskKeys>(call, 0, 0, nullptr);
}

template <template <class, class> class TaskKeys>
void forward(const RelPosAttention& call, int64_t begin, int64_t end, char* scratch) {
  if (call.is_bfloat16) {
    run_forward<Bfloat16, Bfloat16Operand, TaskKeys>(call, begin, end, scratch);
  } else {
    run_forward<float, Fp32Operand, TaskKeys>(call, begin, end, scratch);
  }
}

}  // namespace
}  // namespace refsam::cpu
