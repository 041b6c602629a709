// The kernels of int8_linear for the instruction set that the including file is
// compiled for. A block of rows goes through all steps before the next one starts, so that what
// lies between the steps stays in the cache.
#pragma once

#include "int8_linear_tile.h"

namespace refsam::cpu {
namespace {

// x * (1 + erf(x / sqrt(2))) / 2. The error function is Abramowitz and Stegun's 7.1.26 (1.5e-7).
REFSAM_INLINE Vector gelu_of(Vector x) {
  const Vector size = (Vector)((IntVector)x & 0x7fffffff) * 0.70710678118654752f;
  const Vector t = 1.0f / (1.0f + 0.3275911f * size);
  Vector sum = t * 1.061405429f - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  const Vector rest = 0.5f * sum * t * exp2_of(size * size * -kLog2E);  // half of 1 - erf(size)
  return x * (x < 0.0f ? rest : 1.0f - rest);
}

// Rows of unsigned bytes: value = scale * (byte - zero). The scale of a row with a value that is
// not finite is NaN.
struct QuantisedRows {
  uint8_t* bytes;
  int64_t stride;
  float* scale;
  int32_t* zero;
};

// Quantises transform(values) of one row; `values` has zeros behind `count` up to whole vectors,
// and is overwritten. The range always holds zero, which so stays exact.
template <class Transform>
REFSAM_INLINE void quantise(float* values, int64_t count, QuantisedRows to, int64_t row,
                            Transform transform) {
  Vector low{}, high{}, poison{};
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vector value = transform(load(values + k));
    store(values + k, value);
    low = value < low ? value : low;
    high = larger(high, value);
    poison += value * 0.0f;
  }
  const float bottom = -largest_of(-low), top = largest_of(high);
  // Halves: the whole range may be beyond float's.
  const float scale = (0.5f * top - 0.5f * bottom) / (0.5f * kLargest) + sum_of(poison);
  // Also false for NaN. Ranges below float's normal numbers are taken for zero.
  const bool is_usable = scale > 1.2e-38f;
  const float inverse = is_usable ? 1.0f / scale : 0.0f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  const Vector factor = broadcast(inverse);
  const IntVector zero =
      (IntVector)(broadcast(-bottom * inverse) + kRounder) - (IntVector)broadcast(kRounder);
  const bool is_nan = scale != scale;
  to.scale[row] = is_usable || is_nan ? scale : 0.0f;
  to.zero[row] = is_usable ? zero[0] : 0;
  uint8_t* const bytes = to.bytes + row * to.stride;
  if (!is_usable) {
    memset(bytes, 0, static_cast<size_t>(round_up(count, kLanes)));
    return;
  }
  for (int64_t k = 0; k < count; k += kLanes) {
    IntVector value = (IntVector)(load(values + k) * factor + kRounder);
    value += zero - (IntVector)broadcast(kRounder);
    value = value < 0 ? IntVector{} : value;
    value = value > kLargest ? IntVector{} + kLargest : value;
    const ByteVector narrow = __builtin_convertvector(value, ByteVector);
    memcpy(bytes + k, &narrow, sizeof(narrow));
  }
}

// The layer norm of one row (count,) in place; zeros behind it stay.
REFSAM_INLINE void normalise(float* row, int64_t count, const float* weight, const float* bias,
                             float eps) {
  const int64_t whole = count / kLanes * kLanes;
  Vector sums{}, squares{};
  for (int64_t k = 0; k < count; k += kLanes) sums += load(row + k);
  const float mean = sum_of(sums) / static_cast<float>(count);
  for (int64_t k = 0; k < whole; k += kLanes) {
    const Vector value = load(row + k) - mean;
    squares += value * value;
  }
  float square = sum_of(squares);
  for (int64_t k = whole; k < count; ++k) square += (row[k] - mean) * (row[k] - mean);
  const float factor = 1.0f / __builtin_sqrtf(square / static_cast<float>(count) + eps);
  for (int64_t k = 0; k < whole; k += kLanes) {
    store(row + k, (load(row + k) - mean) * factor * load(weight + k) + load(bias + k));
  }
  for (int64_t k = whole; k < count; ++k) row[k] = (row[k] - mean) * factor * weight[k] + bias[k];
}

// Computes blocks of rows of a call, x of type In, the result of type Out.
template <class In, class Out>
class Int8Run {
 public:
  Int8Run(const Int8Call& call, Arena& arena) : call_(call) {
    const int64_t rows = round_up(call.rows_of_block, kTileRows);
    row_ = arena.take<float>(round_up(call.first.in, kLanes));
    input_ = take_rows(rows, call.first.in, arena);
    if (!call.second.packed) return;
    hidden_ = arena.take<float>(rows * hidden_stride());
    activated_ = take_rows(rows, call.first.out, arena);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * call_.rows_of_block;
      const int64_t rows = smaller(call_.rows_of_block, call_.rows - first);
      for (int64_t row = 0; row < rows; ++row) read(first + row, row);
      if (!call_.second.packed) {
        write(input_, call_.first, first, rows);
        continue;
      }
      hide(rows);
      for (int64_t row = 0; row < rows; ++row) {
        quantise(hidden_ + row * hidden_stride(), call_.first.out, activated_, row,
                 [](Vector value) REFSAM_INLINE_LAMBDA { return gelu_of(value); });
      }
      write(activated_, call_.second, first, rows);
    }
  }

 private:
  static QuantisedRows take_rows(int64_t rows, int64_t channels, Arena& arena) {
    const int64_t stride = round_up(channels, 64);
    return {arena.take<uint8_t>(rows * stride), stride, arena.take<float>(rows),
            arena.take<int32_t>(rows)};
  }
  int64_t hidden_stride() const { return round_up(call_.first.out, kInt8Block); }

  // Row `index` of x, normalised and quantised, becomes row `row` of the block.
  void read(int64_t index, int64_t row) {
    const int64_t count = call_.first.in;
    read_row(static_cast<const In*>(call_.x) + index * call_.x_stride, count, row_);
    if (call_.norm_weight) {
      normalise(row_, count, call_.norm_weight, call_.norm_bias, call_.eps);
    }
    quantise(row_, count, input_, row, [](Vector value) REFSAM_INLINE_LAMBDA { return value; });
  }

  // hidden = first(input), before the GELU.
  void hide(int64_t rows) {
    const int64_t stride = hidden_stride();
    multiply(input_, call_.first, rows,
             [to = hidden_, stride](int64_t row, int64_t column, Vector value)
                 REFSAM_INLINE_LAMBDA { store(to + row * stride + column, value); });
  }

  // out = residual + layer(from) for rows from `first` on.
  void write(QuantisedRows from, const Int8Weights& layer, int64_t first, int64_t rows) {
    const int64_t channels = layer.out, offset = first * channels;
    Out* const out = static_cast<Out*>(call_.out) + offset;
    const Out* const residual =
        call_.residual ? static_cast<const Out*>(call_.residual) + offset : nullptr;
    multiply(from, layer, rows,
             [=](int64_t row, int64_t column, Vector value) REFSAM_INLINE_LAMBDA {
               const int64_t at = row * channels + column, count = channels - column;
               if (count >= kLanes) {
                 if (residual) value += load_elements(residual + at);
                 store_elements(out + at, value);
               } else if (count > 0) {
                 Out part[kLanes]{};
                 const size_t bytes = sizeof(Out) * static_cast<size_t>(count);
                 if (residual) {
                   memcpy(part, residual + at, bytes);
                   value += load_elements(part);
                 }
                 store_elements(part, value);
                 memcpy(out + at, part, bytes);
               }
             });
  }

  // put(row, column, value) for every vector of layer(from).
  template <class Put>
  static void multiply(QuantisedRows from, const Int8Weights& layer, int64_t rows, Put put) {
    const int64_t groups = (layer.in + kInt8Group - 1) / kInt8Group;
    const int64_t blocks = (layer.out + kInt8Block - 1) / kInt8Block;
    alignas(64) int32_t tile[kTileRows * kTileColumns];
    for (int64_t block = 0; block < blocks; block += kTileBlocks) {
      const int8_t* const weights = layer.packed + block * groups * kGroupBytes;
      const int64_t tile_blocks = smaller(kTileBlocks, blocks - block);
      for (int64_t top = 0; top < rows; top += kTileRows) {
        // A part of the next blocks' weights, which come from the third cache.
        const int8_t* const ahead =
            weights + kTileBlocks * groups * kGroupBytes + top / kTileRows * groups * kAhead;
        multiply_blocks(from.bytes + top * from.stride, from.stride, weights, groups, tile_blocks,
                        ahead, tile, kTileColumns);
        const int64_t tile_rows = smaller(kTileRows, rows - top);
        for (int64_t v = 0; v < tile_blocks * kBlockVectors; ++v) {
          put_column(tile + v * kLanes, from, layer, block * kInt8Block + v * kLanes, top,
                     tile_rows, put);
        }
      }
    }
  }

  // put(row, column, value) for a vector of columns of the tile's rows.
  template <class Put>
  static REFSAM_INLINE void put_column(const int32_t* sums, const QuantisedRows& from,
                                       const Int8Weights& layer, int64_t column, int64_t top,
                                       int64_t tile_rows, const Put& put) {
    const IntVector per_zero = (IntVector)load(layer.sums + column);
    const Vector scale = load(layer.scale + column), bias = load(layer.bias + column);
    for (int64_t row = 0; row < tile_rows; ++row) {
      const IntVector sum =
          (IntVector)load(sums + row * kTileColumns) - from.zero[top + row] * per_zero;
      const Vector value = __builtin_convertvector(sum, Vector) * (from.scale[top + row] * scale);
      put(top + row, column, value + bias);
    }
  }

  const Int8Call call_;
  float* row_;
  float* hidden_ = nullptr;
  QuantisedRows input_{}, activated_{};
};

template <class In, class Out>
int64_t run_blocks(const Int8Call& call, int64_t begin, int64_t end, char* scratch) {
  Arena arena(scratch);
  Int8Run<In, Out> run(call, arena);
  if (scratch) run.run(begin, end);
  return arena.used();
}

int64_t run_any(const Int8Call& call, int64_t begin, int64_t end, char* scratch) {
  if (call.x_is_bfloat16) {
    return call.out_is_bfloat16 ? run_blocks<Bfloat16, Bfloat16>(call, begin, end, scratch)
                                : run_blocks<Bfloat16, float>(call, begin, end, scratch);
  }
  return call.out_is_bfloat16 ? run_blocks<float, Bfloat16>(call, begin, end, scratch)
                              : run_blocks<float, float>(call, begin, end, scratch);
}

int64_t int8_scratch(const Int8Call& call) { return run_any(call, 0, 0, nullptr); }

void int8_run(const Int8Call& call, int64_t begin, int64_t end, char* scratch) {
  run_any(call, begin, end, scratch);
}

const Int8Kernels kInt8Kernels{int8_scratch, int8_run};

}  // namespace
}  // namespace refsam::cpu
