// csrc/cuda/mma.h in the emulator.
#ifndef REFSAM_CUDA_MMA_H
#define REFSAM_CUDA_MMA_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "fibres.h"

namespace refsam::cuda {

namespace emulated {

struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

struct Rows {
  uint32_t* matrices;
  const char* row;
};

// Element 0 or 1 of a register, as float.
template <typename Element>
float element(uint32_t pair, int index) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * index));
  Element value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return static_cast<float>(value);
}

// d += a b of a whole warp.
template <typename Element>
void multiply(const std::array<Product*, 32>& lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, place = lane % 4;
    for (int i = 0; i < 8; ++i)  // register i / 2, element i % 2
      a[group + 8 * (i / 2 % 2)][2 * place + 8 * (i / 4) + i % 2] =
          element<Element>(lanes[lane]->a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i)
      b[2 * place + 8 * (i / 2) + i % 2][group] = element<Element>(lanes[lane]->b[i / 2], i % 2);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->d[i] += sum;
    }
  }
}

// Each lane has used its row as it came.
template <bool kTransposed>
REFSAM_NOT_WATCHED void load_matrices(const std::array<Rows*, 32>& lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        int row = lane / 4, column = 2 * (lane % 4) + i;
        if (kTransposed) std::swap(row, column);
        std::memcpy(&pair[i], lanes[8 * matrix + row]->row + 2 * column, sizeof pair[i]);
      }
      lanes[lane]->matrices[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

template <typename Lanes>
void check_whole_warp(const char* name, const Lanes& lanes) {
  for (const auto* lane : lanes)
    if (lane == nullptr) emulator::fail(std::string(name) + ": got a warp without all its lanes");
}

template <bool kTransposed>
void ldmatrix(const char* name, uint32_t (&matrices)[4], const void* row) {
  emulator::check_shared(name, row, 16);
  emulator::use_memory(row, 16, false);
  const Rows rows{matrices, static_cast<const char*>(row)};
  emulator::meet_warp(name, 0xffffffffu, rows, [](auto& lanes) {
    check_whole_warp("ldmatrix", lanes);
    load_matrices<kTransposed>(lanes);
  });
}

}  // namespace emulated

template <typename Element>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<Element, __half> || std::is_same_v<Element, __nv_bfloat16>);
  const emulated::Product product{d, a, b};
  emulator::meet_warp("mma_m16n8k16", 0xffffffffu, product, [](auto& lanes) {
    emulated::check_whole_warp("mma_m16n8k16", lanes);
    emulated::multiply<Element>(lanes);
  });
}

inline void ldmatrix_x4(uint32_t (&matrices)[4], const void* row) {
  emulated::ldmatrix<false>("ldmatrix_x4", matrices, row);
}

inline void ldmatrix_x4_trans(uint32_t (&matrices)[4], const void* row) {
  emulated::ldmatrix<true>("ldmatrix_x4_trans", matrices, row);
}

inline void cp_async_16(void* shared_destination, const void* global_source, bool valid) {
  emulator::copy_later(shared_destination, global_source, valid);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int kPending>
void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}

}  // namespace refsam::cuda

#endif  // REFSAM_CUDA_MMA_H
