// Every pixel is made from 4 x 4 low-resolution pixels, which stay in the L2 cache; nothing of full
// size but the mask itself is written. A thread makes four neighbouring bytes of a row, or one
// word, which is 32 rows of a column. What tells masks of different sizes apart travels as the
// kernels' parameter.
#include <algorithm>

#include "launch.h"
#include "mask_postprocess.h"
#include "warp.h"

namespace refsam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPixels = 4;    // of a thread that writes bytes
constexpr int kRunWords = 4;  // of a thread that looks for runs
constexpr int kScanThreads = 1024;
constexpr int kMasks = 128;  // of a launch
constexpr int32_t kNone = 0x7fffffff;

// The only way in which four pixels become one, so that bytes and bits are the same.
__device__ float weighted(const float (&weight)[kTaps], const float (&value)[kTaps]) {
  return fmaf(weight[3], value[3],
              fmaf(weight[2], value[2], fmaf(weight[1], value[1], weight[0] * value[0])));
}

// One pixel of a low-resolution row that is widened to the output's width.
__device__ float widened(const float* __restrict__ row, const Taps& columns) {
  float value[kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) value[tap] = __ldg(row + columns.index[tap]);
  return weighted(columns.weight, value);
}

__global__ void bytes_kernel(const float* __restrict__ logits,  // (P, 4h, 4w)
                             MaskPostprocessSizes sizes, float threshold,
                             uint8_t* __restrict__ masks) {  // (P, H, W)
  const int64_t height = sizes.rows.output, width = sizes.columns.output;
  const int64_t left = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPixels;
  if (left >= width) return;
  Taps columns[kPixels];
#pragma unroll
  for (int pixel = 0; pixel < kPixels; ++pixel) {
    const int64_t x = left + pixel < width ? left + pixel : width - 1;
    columns[pixel] = two_resize_taps(x, sizes.columns);
  }
  for (int64_t row = blockIdx.y; row < sizes.masks * height; row += gridDim.y) {
    const float* mask = logits + row / height * (sizes.rows.low * sizes.columns.low);
    const Taps rows = two_resize_taps(row % height, sizes.rows);
    bool inside[kPixels];
#pragma unroll
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      float value[kTaps];
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
        value[tap] = widened(mask + rows.index[tap] * sizes.columns.low, columns[pixel]);
      inside[pixel] = weighted(rows.weight, value) > threshold;
    }
    uint8_t* target = masks + row * width + left;
    if (width % kPixels == 0) {
      *reinterpret_cast<uchar4*>(target) = make_uchar4(inside[0], inside[1], inside[2], inside[3]);
    } else {
      for (int pixel = 0; pixel < kPixels && left + pixel < width; ++pixel)
        target[pixel] = inside[pixel];
    }
  }
}

// One mask of a launch: how much of the image it shows, its size, where its words begin.
struct MaskPlace {
  int32_t cropped_height, cropped_width, height, width;
  int64_t words;

  __device__ MaskSize size() const { return {height, width}; }
};

struct MaskPlaces {
  MaskPlace masks[kMasks];
};

struct LowSize {
  int64_t height, width, image;
};

// How the numbers of two parts of a mask make those of both.
template <typename T>
__device__ T combined(int statistic, T a, T b) {
  if (statistic == 3 || statistic == 4) return a < b ? a : b;  // left, top
  if (statistic == 5 || statistic == 6) return a > b ? a : b;  // right, bottom
  return a + b;
}

// The numbers of a block's threads together, number i in thread i.
template <typename T>
__device__ T combine_block(T (&numbers)[kStatistics], T (*shared)[kStatistics]) {
#pragma unroll
  for (int i = 0; i < kStatistics; ++i) {
    const auto combine = [i](T a, T b) { return combined(i, a, b); };
    numbers[i] = warp_reduce(numbers[i], combine);
    if (lane_id() == 0) shared[warp_id()][i] = numbers[i];
  }
  __syncthreads();
  if (threadIdx.x >= kStatistics) return T{};
  T result = shared[0][threadIdx.x];
  for (int warp = 1; warp < kWarps; ++warp)
    result = combined(static_cast<int>(threadIdx.x), result, shared[warp][threadIdx.x]);
  return result;
}

// A thread's word and the statistics of its pixels; `rows` (32) are the taps of its rows.
__device__ uint32_t pack_word(const float* __restrict__ mask, int64_t low_width,
                              const Taps& columns, const Taps* rows, int32_t count,
                              const Thresholds& limits, int32_t (&numbers)[kStatistics]) {
  uint32_t word = 0;
  float value[kTaps];
  int32_t from[kTaps] = {-1, -1, -1, -1};  // which row `value` is of: neighbours share theirs
  for (int row = 0; row < count; ++row) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int32_t index = rows[row].index[tap];
      if (index == from[tap]) continue;
      from[tap] = index;
      value[tap] = widened(mask + index * low_width, columns);
    }
    const float logit = weighted(rows[row].weight, value);
    word |= static_cast<uint32_t>(logit > limits.threshold) << row;
    numbers[1] += logit > limits.certain;
    numbers[2] += logit > limits.possible;
    numbers[7] += isnan(logit);
  }
  return word;
}

// Block x: a word of kThreads columns, blocks column by column. Block y: a mask of the launch.
__global__ void __launch_bounds__(kThreads)
    bits_kernel(const float* __restrict__ logits,  // (P, 4h, 4w), from the launch's first mask on
                LowSize low, const __grid_constant__ MaskPlaces places, Thresholds limits,
                uint32_t* __restrict__ words,     // (n,)
                int32_t* __restrict__ partial) {  // (P, blocks, kStatistics), likewise
  __shared__ Taps rows[kWordBits];
  __shared__ int32_t shared[kWarps][kStatistics];
  const MaskPlace& place = places.masks[blockIdx.y];
  const int32_t column_words = static_cast<int32_t>(place.size().column_words());
  const int32_t i_word = static_cast<int32_t>(blockIdx.x) % column_words;
  const int32_t left = static_cast<int32_t>(blockIdx.x) / column_words * kThreads;
  if (left >= place.width) return;
  const int32_t top = i_word * kWordBits, x = left + threadIdx.x;
  if (threadIdx.x < kWordBits) {
    const int32_t y = min(top + static_cast<int32_t>(threadIdx.x), place.height - 1);
    rows[threadIdx.x] =
        two_resize_taps(y, {low.height, low.image, place.cropped_height, place.height});
  }
  __syncthreads();
  int32_t numbers[kStatistics] = {0, 0, 0, kNone, kNone, 0, 0, 0};
  if (x < place.width) {
    const Taps columns =
        two_resize_taps(x, {low.width, low.image, place.cropped_width, place.width});
    const float* mask = logits + blockIdx.y * low.height * low.width;
    const int32_t count = min(static_cast<int32_t>(kWordBits), place.height - top);
    const uint32_t word = pack_word(mask, low.width, columns, rows, count, limits, numbers);
    words[place.words + static_cast<int64_t>(x) * column_words + i_word] = word;
    numbers[0] = __popc(word);
    if (word != 0) {
      numbers[3] = x;
      numbers[4] = top + __ffs(word) - 1;
      numbers[5] = x + 1;
      numbers[6] = top + kWordBits - __clz(word);
    }
  }
  const int32_t number = combine_block(numbers, shared);
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x < kStatistics) partial[block * kStatistics + threadIdx.x] = number;
}

// One block for one mask.
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const int32_t* __restrict__ partial,  // (P, blocks, kStatistics)
                      const __grid_constant__ MaskPlaces places, int64_t blocks,
                      int64_t* __restrict__ statistics) {  // (P, kStatistics)
  __shared__ int64_t shared[kWarps][kStatistics];
  const MaskSize size = places.masks[blockIdx.x].size();
  const int64_t used = size.column_words() * ((size.width + kThreads - 1) / kThreads);
  const int32_t* source = partial + blockIdx.x * blocks * kStatistics;
  int64_t numbers[kStatistics] = {0, 0, 0, kNone, kNone, 0, 0, 0};
  for (int64_t block = threadIdx.x; block < used; block += kThreads) {
#pragma unroll
    for (int i = 0; i < kStatistics; ++i)
      numbers[i] = combined<int64_t>(i, numbers[i], source[block * kStatistics + i]);
  }
  const int64_t number = combine_block(numbers, shared);
  if (threadIdx.x >= kStatistics) return;
  const bool is_missing = (threadIdx.x == 3 || threadIdx.x == 4) && number == kNone;
  statistics[blockIdx.x * kStatistics + threadIdx.x] = is_missing ? 0 : number;
}

// The sum of `value` over the block's threads up to this one.
template <int kAllWarps>
__device__ int64_t sum_up_to_here(int64_t value, int64_t* shared) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int64_t before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane_id() >= distance) value += before;
  }
  if (lane_id() == kWarpSize - 1) shared[warp_id()] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kAllWarps - 1; ++warp)
    if (warp < warp_id()) value += shared[warp];
  return value;
}

// Where a thread's words lie in a packed mask.
struct Words {
  const uint32_t* words;
  int64_t first, last;  // of kRunWords words, less at the end
  MaskSize size;

  __device__ Words(const uint32_t* words, const MaskPlace& place)
      : words(words + place.words), size(place.size()) {
    first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRunWords;
    last = first + kRunWords < size.words() ? first + kRunWords : size.words();
  }

  __device__ int64_t row(int64_t i) const { return i % size.column_words() * kWordBits; }

  // The bits of word i that differ from the pixel before.
  __device__ uint32_t changes(int64_t i) const {
    const int64_t top = row(i);
    const uint32_t word = words[i], before = i > 0 ? words[i - 1] : 0;
    const int last_bit = static_cast<int>(top > 0 ? kWordBits - 1 : (size.height - 1) % kWordBits);
    const int64_t below = size.height - top;
    const uint32_t valid = below < kWordBits ? (1u << below) - 1 : ~0u;
    return (word ^ (word << 1 | (before >> last_bit & 1))) & valid;
  }

  __device__ int64_t count() const {
    int64_t count = 0;
    for (int64_t i = first; i < last; ++i) count += __popc(changes(i));
    return count;
  }
};

__global__ void __launch_bounds__(kThreads)
    count_runs_kernel(const uint32_t* __restrict__ words,  // (n,)
                      const __grid_constant__ MaskPlaces places,
                      int64_t* __restrict__ counts) {  // (P, blocks), of the launch's masks
  __shared__ int64_t shared[kWarps];
  const Words mine(words, places.masks[blockIdx.y]);
  const int64_t count = block_sum<kWarps>(mine.count(), shared);
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) counts[block] = count;
}

// One block: replaces numbers (n,) by their sums from the first one on.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t* numbers, int64_t count) {
  constexpr int kScanWarps = kScanThreads / kWarpSize;
  __shared__ int64_t shared[kScanWarps];
  __shared__ int64_t carry;
  if (threadIdx.x == 0) carry = 0;
  for (int64_t start = 0; start < count; start += kScanThreads) {
    const int64_t i = start + threadIdx.x;
    __syncthreads();  // carry is there, shared is free
    const int64_t sum = sum_up_to_here<kScanWarps>(i < count ? numbers[i] : 0, shared) + carry;
    if (i < count) numbers[i] = sum;
    __syncthreads();  // carry was read
    if (threadIdx.x == kScanThreads - 1) carry = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    write_runs_kernel(const uint32_t* __restrict__ words,  // (n,)
                      const __grid_constant__ MaskPlaces places,
                      const int64_t* __restrict__ behind,  // (P, blocks): runs up to each block
                      int64_t first_mask, int64_t capacity,
                      int32_t* __restrict__ ends,      // (capacity,)
                      int64_t* __restrict__ counts) {  // (P,)
  __shared__ int64_t shared[kWarps];
  const Words mine(words, places.masks[blockIdx.y]);
  const int64_t i_mask = first_mask + blockIdx.y, first = i_mask * gridDim.x;
  const int64_t block = first + blockIdx.x;
  const int64_t count = mine.count();
  int64_t rank = (block > 0 ? behind[block - 1] : 0) - count;
  rank += sum_up_to_here<kWarps>(count, shared);
  for (int64_t i = mine.first; i < mine.last; ++i) {
    const int64_t position = i / mine.size.column_words() * mine.size.height + mine.row(i);
    for (uint32_t changes = mine.changes(i); changes != 0; changes &= changes - 1, ++rank)
      if (rank < capacity) ends[rank] = static_cast<int32_t>(position + __ffs(changes) - 1);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0)
    counts[i_mask] = behind[first + gridDim.x - 1] - (first > 0 ? behind[first - 1] : 0);
}

int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

// Calls use(places, first mask, number of masks) for as many masks at a time as a launch takes.
template <typename Sizes, typename Place, typename Use>
void for_each_launch(const std::vector<Sizes>& masks, const Place& place, const Use& use) {
  const int64_t count = static_cast<int64_t>(masks.size());
  int64_t words = 0;
  for (int64_t first = 0; first < count; first += kMasks) {
    MaskPlaces places{};
    const int64_t last = std::min<int64_t>(first + kMasks, count);
    for (int64_t i = first; i < last; ++i) {
      MaskPlace& entry = places.masks[i - first] = place(masks[i]);
      entry.words = words;
      words += MaskSize{entry.height, entry.width}.words();
    }
    use(places, first, static_cast<unsigned>(last - first));
  }
}

MaskPlace place_of_size(const MaskSize& size) {
  return {0, 0, static_cast<int32_t>(size.height), static_cast<int32_t>(size.width), 0};
}

MaskPlace place_of_axes(const MaskAxes& axes) {
  MaskPlace place = place_of_size(axes.size());
  place.cropped_height = static_cast<int32_t>(axes.rows.cropped);
  place.cropped_width = static_cast<int32_t>(axes.columns.cropped);
  return place;
}

}  // namespace

int64_t packing_blocks(const MaskSize& size) {
  return size.column_words() * blocks_for(size.width, kThreads);
}

int64_t runs_blocks(const MaskSize& size) { return blocks_for(size.words(), kThreads * kRunWords); }

void launch_mask_postprocess(const float* logits, const MaskPostprocessSizes& sizes,
                             float threshold, bool* masks, cudaStream_t stream) {
  const int64_t rows = sizes.masks * sizes.rows.output;
  const dim3 grid(blocks_for(sizes.columns.output, kThreads * kPixels),
                  std::min(rows, kLargestGrid));
  launch(bytes_kernel, grid, kThreads, 0, stream, logits, sizes, threshold,
         reinterpret_cast<uint8_t*>(masks));
}

void launch_mask_postprocess_bits(const float* logits, const std::vector<MaskAxes>& masks,
                                  const Thresholds& limits, uint32_t* words, int32_t* partial,
                                  int64_t* statistics, cudaStream_t stream) {
  const LowSize low{masks[0].rows.low, masks[0].columns.low, masks[0].rows.image};
  int64_t blocks = 0;
  for (const MaskAxes& mask : masks) blocks = std::max(blocks, packing_blocks(mask.size()));
  for_each_launch(
      masks, place_of_axes, [&](const MaskPlaces& places, int64_t first, unsigned count) {
        int32_t* parts = partial + first * blocks * kStatistics;
        launch(bits_kernel, dim3(blocks, count), kThreads, 0, stream,
               logits + first * low.height * low.width, low, places, limits, words, parts);
        launch(statistics_kernel, count, kThreads, 0, stream, parts, places, blocks,
               statistics + first * kStatistics);
      });
}

void launch_mask_postprocess_runs(const uint32_t* words, const std::vector<MaskSize>& masks,
                                  int64_t capacity, int64_t* behind, int32_t* ends, int64_t* counts,
                                  cudaStream_t stream) {
  int64_t blocks = 0;
  for (const MaskSize& mask : masks) blocks = std::max(blocks, runs_blocks(mask));
  for_each_launch(masks, place_of_size,
                  [&](const MaskPlaces& places, int64_t first, unsigned count) {
                    launch(count_runs_kernel, dim3(blocks, count), kThreads, 0, stream, words,
                           places, behind + first * blocks);
                  });
  launch(scan_kernel, 1, kScanThreads, 0, stream, behind,
         static_cast<int64_t>(masks.size()) * blocks);
  for_each_launch(masks, place_of_size,
                  [&](const MaskPlaces& places, int64_t first, unsigned count) {
                    launch(write_runs_kernel, dim3(blocks, count), kThreads, 0, stream, words,
                           places, behind, first, capacity, ends, counts);
                  });
}

}  // namespace refsam::cuda
