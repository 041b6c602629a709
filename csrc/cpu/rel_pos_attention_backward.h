// The backward of rel_pos_attention for one instruction set: flash attention's (Dao et al. 2022),
// with the gradients of the relative terms.
//
// Keys and values of a window's head are packed once, and their gradients summed in scratch. For a
// group of queries and a block of keys the probabilities p and the gradient of the scores ds are
// computed again and kept; then
//   dv += p^T grad   dk += ds^T q   dq += ds k   dh[query, key row] += ds   dw[query, column] += ds
// A thread runs a task from start to end, and sums over tasks are kept apart by slot: the result
// does not depend on the number of threads.
#pragma once

#include "rel_pos_attention_pack.h"

namespace refsam::cpu {
namespace {

constexpr int64_t kBackwardGroup = 8 * kRows;                // queries
constexpr int64_t kBackwardBlock = 256 / kLanes;             // vectors of keys
constexpr int64_t kBlockRow = kBackwardBlock * kLanes + 16;  // as kScoreRow

template <class Element, class Operand>
class Backward {
 public:
  using Stored = typename Operand::Stored;
  static constexpr int64_t kPack = Operand::kPack;

  Backward(const RelPosAttentionBackward& call, Arena& arena)
      : call_(call),
        forward_(call.forward),
        sizes_(sizes_of<Operand>(call.forward)),
        scale_(1 / __builtin_sqrtf(static_cast<float>(call.forward.head_dim))),
        relative_(call.forward, sizes_, kBackwardGroup, arena),
        key_columns_(arena.take<Stored>(sizes_.keys * sizes_.depth * kPack)),
        value_columns_(arena.take<Stored>(sizes_.keys * sizes_.depth * kPack)),
        key_rows_(arena.take<Stored>(sizes_.keys * sizes_.channels)),
        grad_keys_(arena.take<float>((sizes_.keys + kRows) * sizes_.channels)),
        grad_values_(arena.take<float>((sizes_.keys + kRows) * sizes_.channels)),
        queries_(arena.take<Stored>(kBackwardGroup * sizes_.depth * kPack)),
        query_rows_(arena.take<Stored>(kBackwardGroup * sizes_.channels)),
        grads_(arena.take<Stored>(kBackwardGroup * sizes_.depth * kPack)),
        grad_rows_(arena.take<Stored>(kBackwardGroup * sizes_.channels)),
        shift_(arena.take<float>(kBackwardGroup)),
        delta_(arena.take<float>(kBackwardGroup)),
        scores_(arena.take<float>(kRows * kBlockRow)),
        grad_scores_(arena.take<float>(kRows * kBlockRow)),
        probabilities_(arena.take<Stored>(kBackwardGroup * kBlockRow)),
        differences_(arena.take<Stored>(kBackwardGroup * kBlockRow)),
        grad_queries_(arena.take<float>(kBackwardGroup * sizes_.channels)),
        grad_h_(arena.take<float>(kBackwardGroup * forward_.window_height)),
        grad_w_(arena.take<float>(kBackwardGroup * sizes_.key_width)),
        distance_rows_(arena.take<float>(sizes_.distances * sizes_.channels)),
        float_queries_(arena.take<float>(kBackwardGroup * sizes_.channels)),
        grad_products_(arena.take<float>(kBackwardGroup * sizes_.distances + kRows)),
        grad_distances_(arena.take<float>((sizes_.distances + kRows) * sizes_.channels)) {}

  void run(int64_t begin, int64_t end) {
    const int64_t tasks = count_tasks(forward_);
    relative_.pack();
    memset(distance_rows_, 0, sizeof(float) * sizes_.distances * sizes_.channels);
    for_each_distance<Element>(forward_, [&](const Element* row, int64_t index) {
      pack_row<Fp32Operand>(row, forward_, sizes_, index, distance_rows_);
    });
    for (int64_t slot = begin; slot < end; ++slot) {
      memset(grad_distances_, 0, sizeof(float) * sizes_.distances * sizes_.channels);
      const int64_t last = (slot + 1) * tasks / call_.slots;
      for (int64_t index = slot * tasks / call_.slots; index < last; ++index) {
        run_task(task_of(forward_, index), slot);
      }
      if (call_.grad_tables) write_tables(slot);
    }
  }

 private:
  void run_task(const Task& task, int64_t slot) {
    begin_keys(task);
    for (int64_t first = 0; first < task.last_query; first += kBackwardGroup) {
      const int64_t count = smaller(kBackwardGroup, task.last_query - first);
      begin_queries(task, first, count);
      for (int64_t vector = 0; vector < task.key_vectors(); vector += kBackwardBlock) {
        const KeyBlock block{vector, smaller(kBackwardBlock, task.key_vectors() - vector)};
        for (int64_t query = 0; query < count; query += kRows) attend(query, block);
        add_to_keys(round_up(count, kRows), block);
      }
      end_queries(task, first, count);
    }
    end_keys(task, slot);
  }

  void begin_keys(const Task& task) {
    relative_.begin_task(task);
    memset(key_columns_, 0, sizeof(Stored) * sizes_.keys * sizes_.depth * kPack);
    memset(value_columns_, 0, sizeof(Stored) * sizes_.keys * sizes_.depth * kPack);
    memset(key_rows_, 0, sizeof(Stored) * sizes_.keys * sizes_.channels);
    memset(grad_keys_, 0, sizeof(float) * sizes_.keys * sizes_.channels);
    memset(grad_values_, 0, sizeof(float) * sizes_.keys * sizes_.channels);
    for_each_key<Element>(forward_, task, 1, [&](const Element* token, int64_t index) {
      pack_column<Operand>(token, forward_, sizes_, index, key_columns_);
      pack_row<Operand>(token, forward_, sizes_, index, key_rows_);
    });
    for_each_key<Element>(forward_, task, 2, [&](const Element* token, int64_t index) {
      pack_column<Operand>(token, forward_, sizes_, index, value_columns_);
    });
  }

  // The queries of a group and the gradients of their outputs as operands, and zero gradients.
  void begin_queries(const Task& task, int64_t first, int64_t count) {
    const int64_t rows = round_up(count, kRows);
    pack_queries<Operand, Element>(forward_, task, sizes_, first, count, queries_);
    relative_.compute(task, first, count, queries_);
    memset(query_rows_, 0, sizeof(Stored) * rows * sizes_.channels);
    memset(float_queries_, 0, sizeof(float) * rows * sizes_.channels);
    memset(grads_, 0, sizeof(Stored) * rows * sizes_.depth * kPack);
    memset(grad_rows_, 0, sizeof(Stored) * rows * sizes_.channels);
    memset(shift_, 0, sizeof(float) * kBackwardGroup);
    memset(delta_, 0, sizeof(float) * kBackwardGroup);
    memset(grad_queries_, 0, sizeof(float) * rows * sizes_.channels);
    memset(grad_h_, 0, sizeof(float) * rows * forward_.window_height);
    memset(grad_w_, 0, sizeof(float) * rows * sizes_.key_width);
    memset(grad_products_, 0, sizeof(float) * (kBackwardGroup * sizes_.distances + kRows));
    for (int64_t i = 0; i < count; ++i) begin_query(task, first + i, i);
  }

  void begin_query(const Task& task, int64_t query, int64_t place) {
    const int64_t y = query / task.width, x = query % task.width;
    const Element* const token = token_at<Element>(forward_, task, y, x, 0);
    pack_row<Operand>(token, forward_, sizes_, place, query_rows_);
    pack_row<Fp32Operand>(token, forward_, sizes_, place, float_queries_);
    const int64_t channel = output_channel(task, query);
    const Element* const grad = static_cast<const Element*>(call_.grad_out) + channel;
    const Element* const out = static_cast<const Element*>(forward_.out) + channel;
    pack_row<Operand>(grad, forward_, sizes_, place, grad_rows_);
    for (int64_t k = 0; k < forward_.head_dim; ++k) {
      grads_[place * sizes_.depth * kPack + k] = Operand::pack(grad[k]);
      delta_[place] += to_float(grad[k]) * to_float(out[k]);
    }
    shift_[place] = forward_.log_sum_exp[statistic_place(forward_, task, query)] * kLog2E;
  }

  int64_t output_channel(const Task& task, int64_t query) const {
    return (token_place(forward_, task, query) * forward_.heads + task.head) * forward_.head_dim;
  }

  // For kRows queries of the group and a block of keys: p and ds, dq, dh and dw.
  void attend(int64_t query, KeyBlock block) {
    compute_scores<Operand>(
        queries_ + query * sizes_.depth * kPack, key_columns_, sizes_.depth, relative_.terms(query),
        block, [scores = scores_](int row, int64_t vector, Vector value) REFSAM_INLINE_LAMBDA {
          store(scores + row * kBlockRow + vector * kLanes, value);
        });
    multiply_grads(query, block);
    for (int row = 0; row < kRows; row += kPack) differentiate(query, row, block);
    float one[kRows];
    for (int row = 0; row < kRows; ++row) one[row] = 1;
    multiply_add<Operand>(
        {reinterpret_cast<Stored*>(grad_scores_), kBlockRow * kPack, kPack},
        {key_rows_ + block.first * kLanes * sizes_.channels, sizes_.channels * kPack},
        block.count * kLanes / kPack, sizes_.channels, one, grad_queries_ + query * sizes_.channels,
        sizes_.channels);
  }

  // grad v^T - delta
  void multiply_grads(int64_t query, KeyBlock block) {
    for (int64_t vector = 0; vector < block.count; vector += kVectors) {
      multiply_panel<Operand>(
          {grads_ + query * sizes_.depth * kPack, sizes_.depth * kPack, kPack},
          {value_columns_ + (block.first + vector) * kLanes * sizes_.depth * kPack, kPanel * kPack},
          sizes_.depth, smaller(kVectors, block.count - vector),
          [to = grad_scores_ + vector * kLanes, delta = delta_ + query](int row, int v, Vector sum)
              REFSAM_INLINE_LAMBDA { store(to + row * kBlockRow + v * kLanes, sum - delta[row]); });
    }
  }

  // Scores and grad v^T - delta of kPack rows to p and ds: by rows for the sums over queries, and
  // ds in its place for the sum over keys.
  void differentiate(int64_t query, int first_row, KeyBlock block) {
    const float exponent_scale = scale_ * kLog2E;
    Stored* const probabilities = probabilities_ + (query + first_row) * kBlockRow;
    Stored* const differences = differences_ + (query + first_row) * kBlockRow;
    Vector sum_h[kPack]{};
    for (int64_t v = 0; v < block.count; ++v) {
      const int64_t row_of_keys = relative_.row_of(block.first + v);
      Vector p[kPack], ds[kPack];
      for (int i = 0; i < kPack; ++i) {
        const int64_t row = first_row + i;
        float* const in_place = grad_scores_ + row * kBlockRow;
        float* const w =
            grad_w_ + (query + row) * sizes_.key_width + relative_.column_of(block.first + v);
        const Vector score = load(scores_ + row * kBlockRow + v * kLanes);
        p[i] = exp2_of(score * exponent_scale - shift_[query + row]);
        ds[i] = p[i] * load(in_place + v * kLanes);
        Operand::pack(ds[i], reinterpret_cast<Stored*>(in_place) + v * kLanes);
        store(w, load(w) + ds[i]);
        sum_h[i] += ds[i];
      }
      Operand::pack_rows(p, probabilities + v * kLanes * kPack);
      Operand::pack_rows(ds, differences + v * kLanes * kPack);
      if (v + 1 == block.count || relative_.row_of(block.first + v + 1) != row_of_keys) {
        for (int i = 0; i < kPack; ++i) {
          grad_h_[(query + first_row + i) * forward_.window_height + row_of_keys] +=
              sum_of(sum_h[i]);
          sum_h[i] = Vector{};
        }
      }
    }
  }

  // dk and dv of a block of keys, from `rows` queries.
  void add_to_keys(int64_t rows, KeyBlock block) {
    float one[kRows];
    for (int row = 0; row < kRows; ++row) one[row] = 1;
    const int64_t keys = block.count * kLanes;
    for (int64_t key = 0; key < keys; key += kRows) {
      const int64_t to = (block.first * kLanes + key) * sizes_.channels;
      const int valid = static_cast<int>(smaller(kRows, keys - key));
      multiply_add<Operand>({probabilities_ + key * kPack, kPack, kBlockRow * kPack},
                            {grad_rows_, sizes_.channels * kPack}, rows / kPack, sizes_.channels,
                            one, grad_values_ + to, sizes_.channels, valid);
      multiply_add<Operand>({differences_ + key * kPack, kPack, kBlockRow * kPack},
                            {query_rows_, sizes_.channels * kPack}, rows / kPack, sizes_.channels,
                            one, grad_keys_ + to, sizes_.channels, valid);
    }
  }

  // The tables' part of dq and the queries' part of the tables' gradients, both by products with
  // the gradients of the relative terms, spread over all distances.
  void end_queries(const Task& task, int64_t first, int64_t count) {
    float scale[kRows];
    for (int row = 0; row < kRows; ++row) scale[row] = scale_;
    for (int64_t i = 0; i < count; ++i) {
      const Offsets offsets = offsets_of(forward_, task, first + i);
      float* const products = grad_products_ + i * sizes_.distances;
      memcpy(products + offsets.h, grad_h_ + i * forward_.window_height,
             sizeof(float) * task.key_height);
      memcpy(products + offsets.w, grad_w_ + i * sizes_.key_width, sizeof(float) * task.key_width);
    }
    for (int64_t i = 0; i < count; i += kRows) {
      multiply_add<Fp32Operand>({grad_products_ + i * sizes_.distances, sizes_.distances, 1},
                                {distance_rows_, sizes_.channels}, sizes_.distances,
                                sizes_.channels, scale, grad_queries_ + i * sizes_.channels,
                                sizes_.channels);
    }
    if (call_.grad_tables) add_to_tables(round_up(count, kRows));
    for (int64_t i = 0; i < count; ++i) {
      write(task, (first + i) / task.width, (first + i) % task.width, 0,
            grad_queries_ + i * sizes_.channels, 1);
    }
  }

  void add_to_tables(int64_t rows) {
    float one[kRows];
    for (int row = 0; row < kRows; ++row) one[row] = 1;
    for (int64_t distance = 0; distance < sizes_.distances; distance += kRows) {
      multiply_add<Fp32Operand>({grad_products_ + distance, 1, sizes_.distances},
                                {float_queries_, sizes_.channels}, rows, sizes_.channels, one,
                                grad_distances_ + distance * sizes_.channels, sizes_.channels,
                                static_cast<int>(smaller(kRows, sizes_.distances - distance)));
    }
  }

  // The gradients of a task's keys and values; those of padding go to the slot's sum.
  void end_keys(const Task& task, int64_t slot) {
    for (int64_t y = 0; y < task.key_height; ++y) {
      for (int64_t x = 0; x < task.key_width; ++x) {
        const int64_t from = (y * task.padded_key_width() + x) * sizes_.channels;
        if (y < task.height && x < task.width) {
          write(task, y, x, 1, grad_keys_ + from, scale_);
          write(task, y, x, 2, grad_values_ + from, 1);
        } else {
          add_to_padding(task, slot, 0, grad_keys_ + from, scale_);
          add_to_padding(task, slot, 1, grad_values_ + from, 1);
        }
      }
    }
  }

  void write(const Task& task, int64_t y, int64_t x, int64_t which, const float* from,
             float factor) const {
    const int64_t token = token_place(forward_, task, y * task.width + x);
    Element* const to = static_cast<Element*>(call_.grad_qkv) +
                        ((token * 3 + which) * forward_.heads + task.head) * forward_.head_dim;
    store_row(to, from, factor, forward_.head_dim);
  }

  void add_to_padding(const Task& task, int64_t slot, int64_t which, const float* from,
                      float factor) const {
    float* const to =
        call_.grad_padding + ((slot * 2 + which) * forward_.heads + task.head) * forward_.head_dim;
    for (int64_t k = 0; k < forward_.head_dim; ++k) to[k] += from[k] * factor;
  }

  // The slot's gradients of the tables, whose rows are in the order of for_each_distance.
  void write_tables(int64_t slot) const {
    const int64_t heights = 2 * forward_.window_height - 1, widths = 2 * forward_.window_width - 1;
    float* const to = call_.grad_tables + slot * (heights + widths) * forward_.head_dim;
    for (int64_t i = 0; i < heights + widths; ++i) {
      const int64_t row = i < heights ? heights - 1 - i : 2 * heights + widths - 1 - i;
      memcpy(to + row * forward_.head_dim, grad_distances_ + i * sizes_.channels,
             sizeof(float) * forward_.head_dim);
    }
  }

  const RelPosAttentionBackward& call_;
  const RelPosAttention& forward_;
  const Sizes sizes_;
  const float scale_;
  Relative<Element, Operand> relative_;
  // For each task
  Stored *const key_columns_, *const value_columns_;  // panels
  Stored* const key_rows_;                            // (keys, channels)
  float *const grad_keys_, *const grad_values_;       // (keys, channels), read kRows beyond
  // For each group of queries
  Stored* const queries_;                             // (group, depth)
  Stored* const query_rows_;                          // (group, channels)
  Stored* const grads_;                               // (group, depth)
  Stored* const grad_rows_;                           // (group, channels)
  float* const shift_;                                // the statistic, to base 2
  float* const delta_;                                // sum of grad * out
  float *const scores_, *const grad_scores_;          // (kRows, kBlockRow)
  Stored *const probabilities_, *const differences_;  // (group, kBlockRow)
  float* const grad_queries_;                         // (group, channels), not scaled
  float* const grad_h_;                               // (group, window_height)
  float* const grad_w_;                               // (group, key_width)
  float* const distance_rows_;                        // (distances, channels)
  float* const float_queries_;                        // (group, channels)
  float* const grad_products_;                        // (group, distances), read kRows beyond
  float* const grad_distances_;                       // (distances, channels), likewise
};

}  // namespace
}  // namespace refsam::cpu
