// What the forward and the backward kernel of rel_pos_attention share: which tokens a task is
// about, and how they are laid out as operands of products.
#pragma once

#include "rel_pos_attention.h"
#include "rel_pos_attention_simd.h"

namespace refsam::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

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

// A head of a window; its queries are its real tokens, its keys may be padding too.
struct Task {
  int64_t image, top, left, height, width, key_height, key_width, head;
  int64_t first_query, last_query;

  int64_t padded_key_width() const { return round_up(key_width, kLanes); }
  int64_t key_vectors() const { return key_height * padded_key_width() / kLanes; }
};

REFSAM_INLINE int64_t count_of(int64_t length, int64_t size) { return (length + size - 1) / size; }

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
  const int64_t share = round_up(count_of(queries, call.parts), kRows);
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
  const int64_t key_width = round_up(call.window_width, kLanes);
  return {round_up(call.head_dim, Operand::kPack) / Operand::kPack, round_up(call.head_dim, kLanes),
          round_up(call.window_height * key_width, kPanel), key_width,
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

// The transpose of a right operand, in panels of kPanel columns: the token becomes a column.
template <class Operand, class Element>
REFSAM_INLINE void pack_column(const Element* token, const RelPosAttention& call,
                               const Sizes& sizes, int64_t column,
                               typename Operand::Stored* panels) {
  constexpr int64_t kPack = Operand::kPack;
  panels += (column / kPanel * sizes.depth * kPanel + column % kPanel) * kPack;
  for (int64_t k = 0; k < call.head_dim; ++k) {
    panels[k / kPack * kPanel * kPack + k % kPack] = Operand::pack(token[k]);
  }
}

// A right operand: the token becomes a row.
template <class Operand, class Element>
REFSAM_INLINE void pack_row(const Element* token, const RelPosAttention& call, const Sizes& sizes,
                            int64_t row, typename Operand::Stored* rows) {
  constexpr int64_t kPack = Operand::kPack;
  rows += row / kPack * sizes.channels * kPack + row % kPack;
  for (int64_t k = 0; k < call.head_dim; ++k) rows[k * kPack] = Operand::pack(token[k]);
}

// Both tables as columns, distances descending: the keys of a query then ascend from one offset.
template <class Operand, class Element>
void pack_tables(const RelPosAttention& call, const Sizes& sizes,
                 typename Operand::Stored* panels) {
  memset(panels, 0, sizeof(*panels) * sizes.distances * sizes.depth * Operand::kPack);
  const int64_t rows = 2 * call.window_height - 1, columns = 2 * call.window_width - 1;
  const Element* const rel_pos_h = static_cast<const Element*>(call.rel_pos_h);
  const Element* const rel_pos_w = static_cast<const Element*>(call.rel_pos_w);
  for (int64_t i = 0; i < rows; ++i) {
    pack_column<Operand>(rel_pos_h + (rows - 1 - i) * call.head_dim, call, sizes, i, panels);
  }
  for (int64_t i = 0; i < columns; ++i) {
    pack_column<Operand>(rel_pos_w + (columns - 1 - i) * call.head_dim, call, sizes, rows + i,
                         panels);
  }
}

// Calls body(token, index) for every key (which 1) or value (2) that is not zero.
template <class Element, class Body>
REFSAM_INLINE void for_each_key(const RelPosAttention& call, const Task& task, int64_t which,
                                const Body& body) {
  for (int64_t y = 0; y < task.key_height; ++y) {
    for (int64_t x = 0; x < task.key_width; ++x) {
      const Element* const token = token_at<Element>(call, task, y, x, which);
      if (token) body(token, y * task.padded_key_width() + x);
    }
  }
}

// The relative terms of some queries, divided by the scale of q k.
struct Relative {
  float* h;  // (queries, key_height)
  float* w;  // (queries, padded key_width), -infinity where there is no key

  int64_t h_row, w_row;
};

// The products (kRows, distances) of queries and tables, for queries from `first` of the window on,
// cut to the terms of their keys.
inline void cut_relative(const RelPosAttention& call, const Task& task, const Sizes& sizes,
                         const float* products, int64_t first, const Relative& relative) {
  const float factor = __builtin_sqrtf(static_cast<float>(call.head_dim));
  for (int row = 0; row < kRows; ++row) {
    const int64_t query = smaller(first + row, task.height * task.width - 1);
    const int64_t y = query / task.width, x = query % task.width;
    const float* const h = products + row * sizes.distances + call.window_height - 1 - y;
    const float* const w =
        products + row * sizes.distances + 2 * call.window_height - 1 + call.window_width - 1 - x;
    for (int64_t v = 0; v < task.key_height; ++v)
      relative.h[row * relative.h_row + v] = h[v] * factor;
    for (int64_t u = 0; u < task.padded_key_width(); ++u) {
      relative.w[row * relative.w_row + u] = u < task.key_width ? w[u] * factor : -__builtin_inff();
    }
  }
}

// Which row of keys, and which column of it, a vector of keys begins at.
struct KeyPlaces {
  int32_t *row, *column;
};

inline void place_keys(const Task& task, const KeyPlaces& places) {
  const int64_t across = task.padded_key_width() / kLanes;
  for (int64_t vector = 0; vector < task.key_vectors(); ++vector) {
    places.row[vector] = static_cast<int32_t>(vector / across);
    places.column[vector] = static_cast<int32_t>(vector % across * kLanes);
  }
}

// A stretch of key vectors, at most as many as a block.
struct KeyBlock {
  int64_t first, count;
};

// What q k^T of kRows queries and a block of keys needs.
template <class Operand>
struct Scores {
  const typename Operand::Stored* queries;  // (kRows, depth)
  const typename Operand::Stored* keys;     // panels
  Relative relative;                        // of the first query
  KeyPlaces places;
  int64_t depth;

  // Calls finish(row, vector of the block, scores / scale).
  template <class Finish>
  REFSAM_INLINE void compute(KeyBlock block, const Finish& finish) const {
    constexpr int64_t kPack = Operand::kPack;
    for (int64_t vector = 0; vector < block.count; vector += kVectors) {
      const int64_t first = block.first + vector;
      multiply_panel<Operand>(
          {queries, depth * kPack, kPack}, {keys + first * kLanes * depth * kPack, kPanel * kPack},
          depth, smaller(kVectors, block.count - vector),
          [&](int row, int v) REFSAM_INLINE_LAMBDA {
            return relative.h[row * relative.h_row + places.row[first + v]] +
                   load(relative.w + row * relative.w_row + places.column[first + v]);
          },
          [&](int row, int v, Vector sum) REFSAM_INLINE_LAMBDA { finish(row, vector + v, sum); });
    }
  }
};

}  // namespace
}  // namespace refsam::cpu
