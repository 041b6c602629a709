// Tensor cores and asynchronous copies of sm_80 and later, one warp at a time: every lane of a warp
// must call these together, except cp_async_*. Fragments lie as the PTX manual has them for
// mma.m16n8k16: of lane l, group g = l / 4 and place p = l % 4,
//   a (16 x 16): a[0] row g, columns 2p, 2p+1; a[1] row g+8; a[2] row g, columns +8; a[3] both
//   b (16 x 8):  b[0] rows 2p, 2p+1 of column g; b[1] rows +8
//   d (16 x 8):  d[0], d[1] row g, columns 2p, 2p+1; d[2], d[3] row g+8
// The emulator replaces this header (see launch.h).
#ifndef REFSAM_CUDA_MMA_H
#define REFSAM_CUDA_MMA_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace refsam::cuda {

// d += a b with products and sums in float; Element is __half or __nv_bfloat16.
template <typename Element>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<Element, __half> || std::is_same_v<Element, __nv_bfloat16>);
  if constexpr (std::is_same_v<Element, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: `row` of lane l is row l % 8 of matrix
// l / 8, 16 bytes, aligned to 16; matrices[i] of a lane is row l / 4, columns 2 (l % 4) and the
// next.
__device__ inline void ldmatrix_x4(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: matrices[i] is rows 2 (l % 4) and the next of column l / 4.
__device__ inline void ldmatrix_x4_trans(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts to copy 16 bytes to shared memory, zeros if the source is not valid (then it is not read).
// Both addresses are aligned to 16 bytes.
__device__ inline void cp_async_16(void* shared_destination, const void* global_source,
                                   bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared_destination)),
                 "l"(__cvta_generic_to_global(global_source)), "r"(valid ? 16 : 0)
               : "memory");
}

// Ends the thread's group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the thread's groups but the `kPending` last; __syncthreads() shows them to the others.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

}  // namespace refsam::cuda

#endif  // REFSAM_CUDA_MMA_H
