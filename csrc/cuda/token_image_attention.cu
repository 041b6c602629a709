// Two kernels. The first attends: a block has up to 64 queries of one head and one part of the
// keys, through which it goes in tiles with an online softmax. Few queries meet many keys in many
// blocks then. The second joins the parts in their order, projects, adds the residual and
// normalises: a block has 16 queries.
#include <algorithm>
#include <cmath>

#include "launch.h"
#include "tile.h"
#include "token_image_attention.h"

namespace refsam::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMostAttendWarps = 4;
constexpr int kFewQueries = 64;  // beyond which there are blocks enough without splitting the keys
constexpr int kSmallestPart = 128;
constexpr int kFinishWarps = 8;
constexpr int kFinishRows = kFragment;

// Keys of a tile: in single precision tiles of wide heads would not fit the shared memory.
template <typename T>
constexpr int kKeys = sizeof(T) == sizeof(float) ? 32 : 64;

// Shared memory of the first kernel: queries, keys and values, channels first, then each warp's
// weights. kHead is the head's width in whole fragments.
template <typename T, int kHead>
constexpr size_t attend_bytes(int warps) {
  const int key_stride = tile_stride<T>(kKeys<T>);
  const int elements = kHead * tile_stride<T>(warps * kFragment) + 2 * kHead * key_stride +
                       warps * kFragment * key_stride;
  return elements * sizeof(T);
}

// The online softmax of a lane's two rows.
struct RowState {
  float highest = -INFINITY;  // in units of log(2)
  float total = 0.0f;         // of this lane's columns

  // Takes the largest logit of further keys; returns the factor of everything that was summed.
  __device__ float raise(float logit) {
    const float before = highest;
    highest = fmaxf(highest, logit);
    const float factor = exp2f(before - highest);
    total *= factor;
    return factor;
  }
};

// Where a block of the first kernel is.
struct Place {
  int64_t expression;
  int head, part, first_query;

  __device__ Place(const TokenImageAttention& call, int queries_of_block) {
    const int tiles = (call.queries + queries_of_block - 1) / queries_of_block;
    unsigned index = blockIdx.x;
    first_query = static_cast<int>(index % tiles) * queries_of_block;
    index /= tiles;
    part = static_cast<int>(index % call.key_parts);
    index /= call.key_parts;
    head = static_cast<int>(index % call.heads);
    expression = index / call.heads;
  }

  // The first element of the head's rows in (expressions, internal width, tokens).
  __device__ int64_t of_head(const TokenImageAttention& call, int tokens) const {
    return (expression * call.heads + head) * call.head_width * static_cast<int64_t>(tokens);
  }
};

// Sets logits of keys from `count` on to -inf, the others to units of log(2), and turns them into
// weights; multiplies what was summed before accordingly.
template <int kLogits, int kSums>
__device__ inline void soften(float (&logits)[kLogits][4], float (&sums)[kSums][4],
                              RowState (&rows)[2], int count, float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLogits; ++i)
#pragma unroll
      for (int j = 2 * half; j < 2 * half + 2; ++j) {
        const bool is_key = 8 * i + fragment_column() + j % 2 < count;
        logits[i][j] = is_key ? logits[i][j] * scale : -INFINITY;
        highest = fmaxf(highest, logits[i][j]);
      }
    const float factor = rows[half].raise(warp_max<4>(highest));
#pragma unroll
    for (int i = 0; i < kLogits; ++i)
#pragma unroll
      for (int j = 2 * half; j < 2 * half + 2; ++j) {
        logits[i][j] = exp2f(logits[i][j] - rows[half].highest);
        rows[half].total += logits[i][j];
      }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i][2 * half] *= factor;
      sums[i][2 * half + 1] *= factor;
    }
  }
}

// Writes the attended values of the warp's 16 queries: the result where the keys are one part.
template <typename T, int kEights>
__device__ inline void store_part(const TokenImageAttention& call, const Place& place, int query,
                                  const float (&sums)[kEights][4], RowState (&rows)[2]) {
  const bool is_whole = call.key_parts == 1;
  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = warp_sum<4>(rows[half].total);
    factors[half] = is_whole ? 1.0f / total : 1.0f;
    const int row = query + fragment_row() + 8 * half;
    if (lane_id() % 4 != 0 || row >= call.queries) continue;
    const int64_t head = place.expression * call.heads + place.head;
    if (!is_whole) {
      const int64_t index = (head * call.key_parts + place.part) * call.queries + row;
      call.highest[index] = rows[half].highest;
      call.totals[index] = total;
    } else if (call.log_sum_exp) {
      call.log_sum_exp[head * call.queries + row] = kLn2 * (rows[half].highest + log2f(total));
    }
  }
  T* attended = static_cast<T*>(call.attended) + place.of_head(call, call.queries);
  const int64_t part = place.expression * call.key_parts + place.part;
  float* parts = call.parts + (part * call.internal() + place.head * call.head_width) *
                                  static_cast<int64_t>(call.queries);
  for_each(sums, [&](int row, int inner, float sum) {
    if (query + row >= call.queries || inner >= call.head_width) return;
    const int64_t index = static_cast<int64_t>(inner) * call.queries + query + row;
    if (is_whole)
      attended[index] = static_cast<T>(sum * (row < 8 ? factors[0] : factors[1]));
    else
      parts[index] = sum;
  });
}

template <typename T, int kHead>
__global__ void __launch_bounds__(kMostAttendWarps* kWarpSize, 1)
    attend_kernel(TokenImageAttention call) {
  constexpr int kStride = tile_stride<T>(kKeys<T>);
  const int threads = static_cast<int>(blockDim.x), queries = threads / kWarpSize * kFragment;
  const int query_stride = tile_stride<T>(queries);
  const Place place(call, queries);
  const int length = call.lengths ? static_cast<int>(call.lengths[place.expression]) : call.keys;
  const int begin = place.part * call.keys_of_part;
  const int end = min(min(begin + call.keys_of_part, length), call.keys);
  const float scale = kLog2E * rsqrtf(static_cast<float>(call.head_width));
  T* q = reinterpret_cast<T*>(dynamic_shared());               // (kHead, queries)
  T* k = q + kHead * query_stride;                             // (kHead, kKeys)
  T* v = k + kHead * kStride;                                  // (kHead, kKeys)
  T* weights = v + (kHead + warp_id() * kFragment) * kStride;  // (16, kKeys)

  const auto rows_of = [&](const void* tokens, int count, int first, int exist) {
    const T* data = static_cast<const T*>(tokens) + place.of_head(call, count) + first;
    return Matrix<T>{data, count, 1, call.head_width, exist};
  };
  if (begin < end) {  // else all of the part's keys are padding
    const int count = min(queries, call.queries - place.first_query);
    load_tile(q, query_stride, rows_of(call.q, call.queries, place.first_query, count), kHead,
              queries, threads);
  }
  float sums[kHead / 8][4] = {};
  RowState rows[2];
  for (int first = begin; first < end; first += kKeys<T>) {
    const int count = min(end - first, kKeys<T>);
    load_tile(k, kStride, rows_of(call.k, call.keys, first, count), kHead, kKeys<T>, threads);
    load_tile(v, kStride, rows_of(call.v, call.keys, first, count), kHead, kKeys<T>, threads);
    tile_loaded();
    float logits[kKeys<T> / 8][4] = {};
    multiply<true, true>(logits, q + warp_id() * kFragment, query_stride, k, kStride, kHead);
    soften(logits, sums, rows, count, scale);
    for_each(logits, [&](int row, int key, float weight) {
      weights[row * kStride + key] = static_cast<T>(weight);
    });
    __syncwarp();
    multiply<false, false>(sums, weights, kStride, v, kStride, kKeys<T>);
    __syncthreads();
  }
  store_part<T>(call, place, place.first_query + warp_id() * kFragment, sums, rows);
}

// Turns the parts' largest logits into factors by which the parts are added, of all heads of the
// block's queries; each is made and read in this block only.
__device__ inline void make_factors(const TokenImageAttention& call, int64_t expression,
                                    int first_query) {
  for (int i = static_cast<int>(threadIdx.x); i < call.heads * kFinishRows; i += blockDim.x) {
    const int query = first_query + i % kFinishRows;
    if (query >= call.queries) continue;
    const int64_t head = expression * call.heads + i / kFinishRows;
    const int64_t start = head * call.key_parts * call.queries + query;
    float highest = -INFINITY, total = 0.0f;
    for (int part = 0; part < call.key_parts; ++part)
      highest = fmaxf(highest, call.highest[start + static_cast<int64_t>(part) * call.queries]);
    for (int part = 0; part < call.key_parts; ++part) {
      const int64_t index = start + static_cast<int64_t>(part) * call.queries;
      total += exp2f(call.highest[index] - highest) * call.totals[index];
    }
    for (int part = 0; part < call.key_parts; ++part) {
      const int64_t index = start + static_cast<int64_t>(part) * call.queries;
      call.highest[index] = exp2f(call.highest[index] - highest) / total;
    }
    if (call.log_sum_exp)
      call.log_sum_exp[head * call.queries + query] = kLn2 * (highest + log2f(total));
  }
}

// Adds up the parts: the attended values of the block's queries, to a tile (internal width, 16).
template <typename T>
__device__ inline void join_parts(const TokenImageAttention& call, int64_t expression,
                                  int first_query, T* tile, int stride) {
  make_factors(call, expression, first_query);
  __syncthreads();
  const int internal = call.internal();
  for (int i = static_cast<int>(threadIdx.x); i < round_up(internal, kFragment) * kFinishRows;
       i += blockDim.x) {
    const int inner = i / kFinishRows, query = first_query + i % kFinishRows;
    float sum = 0.0f;
    if (inner < internal && query < call.queries) {
      const int64_t head = expression * call.heads + inner / call.head_width;
      for (int part = 0; part < call.key_parts; ++part) {
        const int64_t of_head = (head * call.key_parts + part) * call.queries + query;
        const int64_t row = (expression * call.key_parts + part) * internal + inner;
        sum += call.highest[of_head] * call.parts[row * call.queries + query];
      }
      if (call.attended)
        static_cast<T*>(call.attended)[(expression * internal + inner) * call.queries + query] =
            static_cast<T>(sum);
    }
    tile[inner * stride + i % kFinishRows] = static_cast<T>(sum);
  }
  __syncthreads();
}

// The residual, the layer norm and the results of one query by one warp; `update` is overwritten.
__device__ inline void normalise(const TokenImageAttention& call, int64_t row, float* update) {
  const int64_t start = row * call.channels;
  float sum = 0.0f, squares = 0.0f;
  for (int channel = lane_id(); channel < call.channels; channel += kWarpSize) {
    const float x = update[channel] + call.added[channel] + call.residual[start + channel];
    update[channel] = x;
    sum += x;
    if (call.x) call.x[start + channel] = x;
  }
  const float mean = warp_sum(sum) / static_cast<float>(call.channels);
  for (int channel = lane_id(); channel < call.channels; channel += kWarpSize) {
    const float centred = update[channel] - mean;
    squares += centred * centred;
  }
  const float rstd = rsqrtf(warp_sum(squares) / static_cast<float>(call.channels) + call.eps);
  for (int channel = lane_id(); channel < call.channels; channel += kWarpSize)
    call.out.store(start + channel, (update[channel] - mean) * rstd * call.norm_weight[channel] +
                                        call.norm_bias[channel]);
  if (call.statistics && lane_id() == 0) {
    call.statistics[2 * row] = mean;
    call.statistics[2 * row + 1] = rstd;
  }
}

// Shared memory of the second kernel: attended (internal width, 16) and the update (16, channels).
template <typename T>
__host__ __device__ int attended_elements(const TokenImageAttention& call) {
  return round_up(call.internal(), kFragment) * tile_stride<T>(kFinishRows);
}

template <typename T>
__global__ void __launch_bounds__(kFinishWarps* kWarpSize, 1)
    finish_kernel(TokenImageAttention call) {
  constexpr int kStride = tile_stride<T>(kFinishRows);
  const int tiles = (call.queries + kFinishRows - 1) / kFinishRows;
  const int64_t expression = blockIdx.x / tiles;
  const int first_query = static_cast<int>(blockIdx.x % tiles) * kFinishRows;
  const int left = min(call.queries - first_query, kFinishRows);
  const int internal = call.internal(), update_stride = tile_stride<float>(call.channels);
  T* attended = reinterpret_cast<T*>(dynamic_shared());
  float* update = reinterpret_cast<float*>(attended + attended_elements<T>(call));
  if (call.key_parts == 1) {
    const int64_t start = expression * internal * call.queries + first_query;
    const Matrix<T> from{static_cast<const T*>(call.attended) + start, call.queries, 1, internal,
                         left};
    load_tile(attended, kStride, from, round_up(internal, kFragment), kFinishRows,
              static_cast<int>(blockDim.x));
    tile_loaded();
  } else {
    join_parts(call, expression, first_query, attended, kStride);
  }
  const Matrix<T> weight{static_cast<const T*>(call.out_weight), internal, 1, call.channels,
                         internal};
  for (int strip = warp_id() * kFragment; strip < call.channels;
       strip += kFinishWarps * kFragment) {
    float sums[1][2][4] = {};
    multiply<true>(sums, attended, kStride, weight, strip, round_up(internal, kFragment));
    for_each(sums[0], [&](int row, int column, float sum) {
      update[row * update_stride + strip + column] = sum;
    });
  }
  __syncthreads();
  for (int row = warp_id(); row < left; row += kFinishWarps)
    normalise(call, expression * call.queries + first_query + row, update + row * update_stride);
}

template <typename T, int kHead>
void launch_attend(const TokenImageAttention& call, cudaStream_t stream) {
  const int warps = std::min(kMostAttendWarps, (call.queries + kFragment - 1) / kFragment);
  const int tiles = (call.queries + warps * kFragment - 1) / (warps * kFragment);
  const int64_t blocks = call.expressions * call.heads * call.key_parts * tiles;
  launch(attend_kernel<T, kHead>, dim3(static_cast<unsigned>(blocks)), dim3(warps * kWarpSize),
         attend_bytes<T, kHead>(warps), stream, call);
}

template <typename T>
void launch_finish(const TokenImageAttention& call, cudaStream_t stream) {
  const int64_t tiles = (call.queries + kFinishRows - 1) / kFinishRows;
  const size_t shared = attended_elements<T>(call) * sizeof(T) +
                        kFinishRows * tile_stride<float>(call.channels) * sizeof(float);
  launch(finish_kernel<T>, dim3(static_cast<unsigned>(call.expressions * tiles)),
         dim3(kFinishWarps * kWarpSize), shared, stream, call);
}

}  // namespace

int keys_of_part(int64_t queries, int64_t keys) {
  if (queries > kFewQueries) return static_cast<int>(keys);
  const int64_t share = (keys + kMostKeyParts - 1) / kMostKeyParts;
  return std::max(kSmallestPart, round_up(static_cast<int>(share), kKeys<__half>));
}

void launch_token_image_attention(const TokenImageAttention& call, cudaStream_t stream) {
  with_element(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (call.head_width <= 16)
      launch_attend<T, 16>(call, stream);
    else if (call.head_width <= 32)
      launch_attend<T, 32>(call, stream);
    else if (call.head_width <= 64)
      launch_attend<T, 64>(call, stream);
    else
      launch_attend<T, 128>(call, stream);
    launch_finish<T>(call, stream);
  });
}

}  // namespace refsam::cuda
