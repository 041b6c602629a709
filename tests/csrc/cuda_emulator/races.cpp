#include "races.h"

#include <algorithm>
#include <bit>

#include "fibres.h"

namespace refsam::emulator {

std::string Users::other(const Moment& now) const {
  if (other_warps(now) != 0) return "warp " + std::to_string(std::countr_zero(other_warps(now)));
  return "lane " + std::to_string(std::countr_zero(other_lanes(now))) + " of its warp";
}

void Users::add(const Moment& now) {
  if (block_barriers_ != now.block_barriers) *this = {};
  if (warp_ != now.warp || warp_barriers_ != now.warp_barriers) lanes_ = 0;
  block_barriers_ = now.block_barriers;
  warp_ = now.warp;
  warp_barriers_ = now.warp_barriers;
  warps_ |= 1u << now.warp;
  lanes_ |= 1u << now.lane;
}

std::string WatchedMemory::use(const void* address, size_t bytes, bool writes, const Moment& now) {
  const size_t first = static_cast<const char*>(address) - memory_.data();
  const size_t end = std::min(first + bytes, bytes_.size());
  for (size_t i = first; i < end; ++i) {
    Byte& byte = bytes_[i];
    const bool was_written = byte.writers.has_other(now);
    if (was_written || (writes && byte.readers.has_other(now)))
      return std::string(writes ? "writes" : "reads") + " byte " + std::to_string(i) +
             " of shared memory, which " +
             (was_written ? byte.writers.other(now) + " writes"
                          : byte.readers.other(now) + " reads") +
             ", without a barrier between";
    (writes ? byte.writers : byte.readers).add(now);
  }
  return "";
}

}  // namespace refsam::emulator

// Code compiled with -fsanitize=thread calls these before every access to memory that other threads
// may see; it is not linked with the library of that name.
#define REFSAM_ACCESS(name, bytes, writes) \
  void __tsan_##name(void* address) { refsam::emulator::use_memory(address, bytes, writes); }
#define REFSAM_ACCESSES(bytes)                       \
  REFSAM_ACCESS(read##bytes, bytes, false)           \
  REFSAM_ACCESS(write##bytes, bytes, true)           \
  REFSAM_ACCESS(unaligned_read##bytes, bytes, false) \
  REFSAM_ACCESS(unaligned_write##bytes, bytes, true)

extern "C" {
REFSAM_ACCESSES(1)
REFSAM_ACCESSES(2)
REFSAM_ACCESSES(4)
REFSAM_ACCESSES(8)
REFSAM_ACCESSES(16)
void __tsan_read_range(void* address, size_t bytes) {
  refsam::emulator::use_memory(address, bytes, false);
}
void __tsan_write_range(void* address, size_t bytes) {
  refsam::emulator::use_memory(address, bytes, true);
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_init() {}
}
