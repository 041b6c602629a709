// Shared by the forward and the backward kernel of rel_pos_attention: the tokens of a task, and
// their layout as operands of products.
#pragma once

#include "rel_pos_attention.h"
#include "rel_pos_attention_simd.h"

namespace refsam::cpu {
namespace {

constexpr float kLn2 = 0.69314718055994530942f;

// A head of a window; its queries are its real tokens, its keys may be padding too.
struct Task {
  int64_t image, top, left, height, width, key_height, key_width, head;
  int64_t first_query, last_query;

  int64_t padded_key_width() const { return round_up(key_width, kLanes); }
  int64_t key_vectors() const { return key_height * padded_key_width() / kLanes; }
};

REFSAM_INLINE int64_t count_of(int64_t length, int64_t size) { return (length + size - 1) / size; }

inline int64_t count_tasks(const RelPosAttention& call) {
  return call.images * count_of(call.height, call.window_height) *
         count_of(call.width, call.window_width) * call.heads * call.parts;
}

inline Task task_of(const RelPosAttention& call, int64_t index) {
  const int64_t down = count_of(call.height, call.window_height);
  const int64_t across = count_of(call.width, call.window_width);
  Task task;
  const int64_t part = index % call.parts;
  index /= call.parts;
  task.head = index % call.heads;
  index /= call.heads;
  task.left = index % across * call.window_width;
  index /= across;
  task.top = index % down * call.window_height;
  task.image = index / down;
  task.height = smaller(call.window_height, call.height - task.top);
  task.width = smaller(call.window_width, call.width - task.left);
  task.key_height = call.padding_is_key ? call.window_height : task.height;
  task.key_width = call.padding_is_key ? call.window_width : task.width;
  const int64_t queries = task.height * task.width;
  const int64_t share = count_of(queries, call.parts);
  task.first_query = smaller(part * share, queries);
  task.last_query = smaller(task.first_query + share, queries);
  return task;
}

// Lanes, rows and columns of a call's operands, the largest window's where windows differ.
struct Sizes {
  int64_t depth;      // lanes that hold a token's channels
  int64_t channels;   // channels of a token, padded to vectors
  int64_t keys;       // keys of a window, each row padded to vectors, and all to panels
  int64_t key_width;  // of a row of them
  int64_t distances;  // rows of both tables, padded to panels
};

template <class Operand>
Sizes sizes_of(const RelPosAttention& call) {
  // A window larger than the grid has more keys than the grid only if padding counts.
  const int64_t height =
      call.padding_is_key ? call.window_height : smaller(call.window_height, call.height);
  const int64_t width =
      call.padding_is_key ? call.window_width : smaller(call.window_width, call.width);
  const int64_t key_width = round_up(width, kLanes);
  return {round_up(call.head_dim, Operand::kPack) / Operand::kPack, round_up(call.head_dim, kLanes),
          round_up(height * key_width, kPanel), key_width,
          round_up(2 * call.window_height - 1 + 2 * call.window_width - 1, kPanel)};
}

// q (0), k (1) or v (2) of a window's token, padding included; null for zeros.
template <class Element>
REFSAM_INLINE const Element* token_at(const RelPosAttention& call, const Task& task, int64_t y,
                                      int64_t x, int64_t which) {
  const int64_t channel = (which * call.heads + task.head) * call.head_dim;
  if (y < task.height && x < task.width) {
    return static_cast<const Element*>(call.qkv) + task.image * call.image_stride +
           (task.top + y) * call.row_stride + (task.left + x) * call.column_stride + channel;
  }
  return call.qkv_bias ? static_cast<const Element*>(call.qkv_bias) + channel : nullptr;
}

// The place of a query's token among all tokens, and of its head's statistic.
inline int64_t token_place(const RelPosAttention& call, const Task& task, int64_t query) {
  const int64_t y = task.top + query / task.width, x = task.left + query % task.width;
  return (task.image * call.height + y) * call.width + x;
}

inline int64_t statistic_place(const RelPosAttention& call, const Task& task, int64_t query) {
  const int64_t y = task.top + query / task.width, x = task.left + query % task.width;
  return ((task.image * call.heads + task.head) * call.height + y) * call.width + x;
}

// The transpose of a right operand, in panels of kPanel columns: the token becomes a column.
template <class Operand, class Element>
REFSAM_INLINE void pack_column(const Element* token, const RelPosAttention& call,
                               const Sizes& sizes, int64_t column,
                               typename Operand::Stored* panels) {
  constexpr int64_t kPack = Operand::kPack;
  panels += (column / kPanel * sizes.depth * kPanel + column % kPanel) * kPack;
  const int64_t whole = call.head_dim / kPack * kPack;
  for (int64_t k = 0; k < whole; k += kPack) {
    for (int64_t i = 0; i < kPack; ++i) panels[k * kPanel + i] = Operand::pack(token[k + i]);
  }
  if (whole < call.head_dim) panels[whole * kPanel] = Operand::pack(token[whole]);
}

// A right operand: the token becomes a row.
template <class Operand, class Element>
REFSAM_INLINE void pack_row(const Element* token, const RelPosAttention& call, const Sizes& sizes,
                            int64_t row, typename Operand::Stored* rows) {
  constexpr int64_t kPack = Operand::kPack;
  rows += row / kPack * sizes.channels * kPack + row % kPack;
  for (int64_t k = 0; k < call.head_dim; ++k) rows[k * kPack] = Operand::pack(token[k]);
}

// Asks for a token that is read soon: a head's part of neighbouring tokens is too far apart for the
// processor to guess it.
template <class Element>
REFSAM_INLINE void prefetch(const Element* token, int64_t head_dim) {
  const char* const bytes = reinterpret_cast<const char*>(token);
  const int64_t size = head_dim * static_cast<int64_t>(sizeof(Element));
  for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(bytes + line);
}
constexpr int64_t kTokensAhead = 8;

// Calls body(token, index) for every key (which 1) or value (2) that is not zero.
template <class Element, class Body>
REFSAM_INLINE void for_each_key(const RelPosAttention& call, const Task& task, int64_t which,
                                const Body& body) {
  const int64_t count = task.key_height * task.key_width;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y = i / task.key_width, x = i % task.key_width;
    const int64_t ahead = smaller(i + kTokensAhead, count - 1);
    const Element* const next =
        token_at<Element>(call, task, ahead / task.key_width, ahead % task.key_width, which);
    if (next) prefetch(next, call.head_dim);
    const Element* const token = token_at<Element>(call, task, y, x, which);
    if (token) body(token, y * task.padded_key_width() + x);
  }
}

// Calls body(row, index) for the rows of both tables, distances descending: the rows for a query's
// keys then ascend from one offset.
template <class Element, class Body>
REFSAM_INLINE void for_each_distance(const RelPosAttention& call, const Body& body) {
  const int64_t heights = 2 * call.window_height - 1, widths = 2 * call.window_width - 1;
  const Element* const rel_pos_h = static_cast<const Element*>(call.rel_pos_h);
  const Element* const rel_pos_w = static_cast<const Element*>(call.rel_pos_w);
  for (int64_t i = 0; i < heights; ++i) body(rel_pos_h + (heights - 1 - i) * call.head_dim, i);
  for (int64_t i = 0; i < widths; ++i) {
    body(rel_pos_w + (widths - 1 - i) * call.head_dim, heights + i);
  }
}

// Where, among the distances, the rows for a query's first key row and first key column are.
struct Offsets {
  int64_t h, w;
};

inline Offsets offsets_of(const RelPosAttention& call, const Task& task, int64_t query) {
  const int64_t y = query / task.width, x = query % task.width;
  return {call.window_height - 1 - y, 2 * call.window_height - 1 + call.window_width - 1 - x};
}

// Left operands of a task's queries from `first` on, the last kRows filled up with zeros.
template <class Operand, class Element>
void pack_queries(const RelPosAttention& call, const Task& task, const Sizes& sizes, int64_t first,
                  int64_t count, typename Operand::Stored* queries) {
  const int64_t row = sizes.depth * Operand::kPack;
  memset(queries, 0, sizeof(*queries) * round_up(count, kRows) * row);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t query = first + i;
    const Element* const token =
        token_at<Element>(call, task, query / task.width, query % task.width, 0);
    for (int64_t k = 0; k < call.head_dim; ++k) queries[i * row + k] = Operand::pack(token[k]);
  }
}

// The relative terms of kRows queries, divided by the scale of q k.
struct RelativeTerms {
  const float *h, *w;             // (kRows, h_row), (kRows, w_row)
  int64_t h_row, w_row;           // -infinity in w where no key is
  const int32_t *rows, *columns;  // where a vector of keys begins

  REFSAM_INLINE Vector at(int row, int64_t vector) const {
    return h[row * h_row + rows[vector]] + load(w + row * w_row + columns[vector]);
  }
};

// The relative terms of a group of queries, divided by the scale of q k: products of the queries
// and both tables, of which every query needs a stretch.
template <class Element, class Operand>
class Relative {
 public:
  using Stored = typename Operand::Stored;

  Relative(const RelPosAttention& call, const Sizes& sizes, int64_t group, Arena& arena)
      : call_(call),
        sizes_(sizes),
        tables_(arena.take<Stored>(sizes.distances * sizes.depth * Operand::kPack)),
        products_(arena.take<float>(kRows * sizes.distances)),
        h_(arena.take<float>(group * call.window_height)),
        w_(arena.take<float>(group * sizes.key_width)),
        rows_(arena.take<int32_t>(sizes.keys / kLanes)),
        columns_(arena.take<int32_t>(sizes.keys / kLanes)) {}

  // Once for all tasks.
  void pack() {
    memset(tables_, 0, sizeof(Stored) * sizes_.distances * sizes_.depth * Operand::kPack);
    for_each_distance<Element>(call_, [&](const Element* row, int64_t index) {
      pack_column<Operand>(row, call_, sizes_, index, tables_);
    });
  }

  void begin_task(const Task& task) {
    const int64_t across = task.padded_key_width() / kLanes;
    for (int64_t vector = 0; vector < task.key_vectors(); ++vector) {
      rows_[vector] = static_cast<int32_t>(vector / across);
      columns_[vector] = static_cast<int32_t>(vector % across * kLanes);
    }
  }

  // For `count` queries of a task, from `first` on.
  void compute(const Task& task, int64_t first, int64_t count, const Stored* queries) {
    for (int64_t query = 0; query < count; query += kRows) {
      multiply(queries + query * sizes_.depth * Operand::kPack);
      for (int64_t i = query; i < query + kRows; ++i) cut(task, first + i, i);
    }
  }

  // The terms of the group's queries from `query` on.
  RelativeTerms terms(int64_t query) const {
    return {h_ + query * call_.window_height,
            w_ + query * sizes_.key_width,
            call_.window_height,
            sizes_.key_width,
            rows_,
            columns_};
  }
  // Where a vector of keys begins.
  int64_t row_of(int64_t vector) const { return rows_[vector]; }
  int64_t column_of(int64_t vector) const { return columns_[vector]; }

 private:
  void multiply(const Stored* queries) {
    constexpr int64_t kPack = Operand::kPack;
    for (int64_t column = 0; column < sizes_.distances; column += kPanel) {
      multiply_tile<kVectors, Operand>(
          {queries, sizes_.depth * kPack, kPack},
          {tables_ + column * sizes_.depth * kPack, kPanel * kPack}, sizes_.depth,
          [to = products_ + column, to_row = sizes_.distances](int row, int v, Vector sum)
              REFSAM_INLINE_LAMBDA { store(to + row * to_row + v * kLanes, sum); });
    }
  }

  void cut(const Task& task, int64_t query, int64_t place) {
    query = smaller(query, task.height * task.width - 1);  // rows that fill up are never used
    const Offsets offsets = offsets_of(call_, task, query);
    const float* const products = products_ + place % kRows * sizes_.distances;
    float* const h = h_ + place * call_.window_height;
    float* const w = w_ + place * sizes_.key_width;
    const float factor = __builtin_sqrtf(static_cast<float>(call_.head_dim));
    for (int64_t v = 0; v < task.key_height; ++v) h[v] = products[offsets.h + v] * factor;
    for (int64_t u = 0; u < task.key_width; ++u) w[u] = products[offsets.w + u] * factor;
    for (int64_t u = task.key_width; u < task.padded_key_width(); ++u) w[u] = -__builtin_inff();
  }

  const RelPosAttention& call_;
  const Sizes& sizes_;
  Stored* const tables_;   // panels
  float* const products_;  // (kRows, distances)
  float* const h_;         // (group, window_height)
  float* const w_;         // (group, key_width), rows padded to vectors
  int32_t *const rows_, *const columns_;
};

// A stretch of key vectors, at most as many as a block.
struct KeyBlock {
  int64_t first, count;
};

// q k^T plus the relative terms, all divided by the scale, for kRows queries and a block of keys:
// calls finish(row, vector of the block, scores).
template <class Operand, class Finish>
REFSAM_INLINE void compute_scores(const typename Operand::Stored* queries,
                                  const typename Operand::Stored* keys, int64_t depth,
                                  const RelativeTerms& terms, KeyBlock block, Finish finish) {
  constexpr int64_t kPack = Operand::kPack;
  for (int64_t vector = 0; vector < block.count; vector += kVectors) {
    multiply_panel<Operand>(
        {queries, depth * kPack, kPack},
        {keys + (block.first + vector) * kLanes * depth * kPack, kPanel * kPack}, depth,
        smaller(kVectors, block.count - vector),
        [=](int row, int v, Vector sum) REFSAM_INLINE_LAMBDA {
          finish(row, vector + v, sum + terms.at(row, block.first + vector + v));
        });
  }
}

}  // namespace
}  // namespace refsam::cpu
