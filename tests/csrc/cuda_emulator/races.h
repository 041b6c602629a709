// Shared memory that two threads of a block use, one of them writing, without a barrier between: on
// a GPU what is read then depends on who comes first, whatever the emulator's own order is.
#ifndef REFSAM_CUDA_EMULATOR_RACES_H
#define REFSAM_CUDA_EMULATOR_RACES_H

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace refsam::emulator {

// A thread between two barriers, which are counted through a whole launch.
struct Moment {
  unsigned warp, lane;
  uint32_t block_barriers, warp_barriers;
};

// The threads that used a byte in one way since the last barrier of their block.
class Users {
 public:
  // Whether no barrier parts one of them, another thread, from now.
  bool has_other(const Moment& now) const {
    return block_barriers_ == now.block_barriers && (other_warps(now) | other_lanes(now)) != 0;
  }
  // That one, in words.
  std::string other(const Moment& now) const;
  void add(const Moment& now);

 private:
  uint32_t other_warps(const Moment& now) const { return warps_ & ~(1u << now.warp); }
  // Lanes of its own warp. If another warp came later, its lanes were forgotten.
  uint32_t other_lanes(const Moment& now) const {
    const bool same = warp_ == now.warp && warp_barriers_ == now.warp_barriers;
    return same ? lanes_ & ~(1u << now.lane) : 0;
  }

  uint32_t block_barriers_ = 0, warps_ = 0;
  uint32_t warp_ = 0, warp_barriers_ = 0, lanes_ = 0;  // of the warp that came last
};

// A part of memory with its users.
class WatchedMemory {
 public:
  explicit WatchedMemory(std::span<char> memory) : memory_(memory), bytes_(memory.size()) {}

  bool holds(const void* address) const {
    const auto* first = static_cast<const char*>(address);
    return memory_.data() <= first && first < memory_.data() + memory_.size();
  }
  // Remembers the use; returns what is wrong with it, or "".
  std::string use(const void* address, size_t bytes, bool writes, const Moment& now);

 private:
  struct Byte {
    Users readers, writers;
  };

  std::span<char> memory_;
  std::vector<Byte> bytes_;
};

}  // namespace refsam::emulator

#endif  // REFSAM_CUDA_EMULATOR_RACES_H
