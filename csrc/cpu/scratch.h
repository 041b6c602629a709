// A thread's scratch, aligned to a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace refsam::cpu {

constexpr std::align_val_t kAlignment{64};

struct Release {
  void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
};
using Scratch = std::unique_ptr<char, Release>;

inline Scratch allocate(int64_t bytes) {
  return Scratch(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment)));
}

}  // namespace refsam::cpu
