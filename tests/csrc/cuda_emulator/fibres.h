// The emulator's blocks and threads: who runs, who waits where, what shared memory is.
#ifndef REFSAM_CUDA_EMULATOR_FIBRES_H
#define REFSAM_CUDA_EMULATOR_FIBRES_H

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <typeinfo>
#include <vector>

namespace refsam::emulator {

// The position of the thread that runs now.
struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
inline Position position;

constexpr int kLanes = 32;

int lane_id();

// Runs the kernel for every thread of the grid; raises std::runtime_error for what a device would
// refuse, and for what would hang or be undefined there.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

char* dynamic_shared();

// Ends the launch with std::runtime_error; not to be called outside a kernel.
[[noreturn]] void fail(const std::string& message);

// Fails unless it is the address of `bytes` of shared memory, aligned to their number.
void check_shared(const char* operation, const void* address, size_t bytes);

// A function whose accesses to memory are not shown to use_memory.
#define REFSAM_NOT_WATCHED [[gnu::no_sanitize("thread")]]

// The thread that runs now is about to use memory; fails where that is shared memory which another
// one uses too, one of them writing, without a barrier between.
void use_memory(const void* address, size_t bytes, bool writes);

// All threads of the block, or of the warp that runs now, have come to a barrier. Partial masks
// count as the whole warp. No other operation of a warp orders what its lanes do to memory.
void pass_block_barrier();
void pass_warp_barrier();

// Where threads meet: the operation's name and type, which must be the same for all of them, and
// what is done with their operands (null for threads that have ended or are not named).
struct Meeting {
  const char* operation;
  const std::type_info* type;
  uint32_t mask;  // of lanes; 0: the whole block
  void (*combine)(void* const* operands, size_t count);

  bool operator==(const Meeting& other) const { return *type == *other.type && mask == other.mask; }
};

// Waits until all have come; the last one combines.
void meet(const Meeting& meeting, void* operand);

// All lanes of the mask; returns the lane's operand after combine(std::array<Operand*, 32>&).
template <typename Operand, typename Combine>
Operand meet_warp(const char* operation, uint32_t mask, Operand operand, Combine) {
  const auto combine = [](void* const* operands, size_t) {
    std::array<Operand*, kLanes> lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<Operand*>(operands[lane]);
    Combine{}(lanes);
  };
  meet({operation, &typeid(Combine), mask, combine}, &operand);
  return operand;
}

// All threads of the block; combine gets a std::vector<Operand*>&.
template <typename Operand, typename Combine>
Operand meet_block(const char* operation, Operand operand, Combine) {
  const auto combine = [](void* const* operands, size_t count) {
    std::vector<Operand*> threads(count);
    for (size_t i = 0; i < count; ++i) threads[i] = static_cast<Operand*>(operands[i]);
    Combine{}(threads);
    pass_block_barrier();
  };
  meet({operation, &typeid(Combine), 0, combine}, &operand);
  return operand;
}

// cp.async of the thread that runs now.
void copy_later(void* shared_destination, const void* global_source, bool valid);
void commit_copies();
void wait_for_copies(int pending);

}  // namespace refsam::emulator

#endif  // REFSAM_CUDA_EMULATOR_FIBRES_H
