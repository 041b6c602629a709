#include "fibres.h"

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

#include "races.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace refsam::emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPageBytes = 4096;
// A block's shared memory on sm_86, sm_89 and sm_120.
constexpr size_t kMostSharedBytes = 99 * 1024;
constexpr uint64_t kMostThreads = 1024;
constexpr uint64_t kMostBlocks = 65535;  // along y and z

struct Copy {
  char* destination;
  const char* source;
  bool valid;
};

// A stack of a thread's own, with a page below it that must not be touched.
class Stack {
 public:
  Stack() {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK;
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for threads");
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, kPageBytes, PROT_NONE);
  }
  Stack(const Stack&) = delete;
  ~Stack() { munmap(memory_, kStackBytes); }
  char* bottom() const { return memory_ + kPageBytes; }
  size_t size() const { return kStackBytes - kPageBytes; }

 private:
  char* memory_;
};

// Where something that can be left and resumed goes on.
struct Fibre {
  ucontext_t beginning;
  bool begun = false;
  void* place[5];  // of __builtin_setjmp
  // For AddressSanitizer.
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};

// Stacks of earlier launches, to be used again.
std::vector<std::unique_ptr<Stack>> spare_stacks;

std::unique_ptr<Stack> take_stack() {
  if (spare_stacks.empty()) return std::make_unique<Stack>();
  std::unique_ptr<Stack> stack = std::move(spare_stacks.back());
  spare_stacks.pop_back();
  return stack;
}

void give_back(std::unique_ptr<Stack> stack) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack->bottom(), stack->size());
#endif
  spare_stacks.push_back(std::move(stack));
}

struct Thread {
  Thread() : stack(take_stack()) {}
  ~Thread() { give_back(std::move(stack)); }

  std::unique_ptr<Stack> stack;
  Fibre fibre;
  uint3 index;
  bool ended, waits;
  Meeting meeting;  // while it waits
  void* operand;
  std::vector<std::vector<Copy>> copies;  // groups, the last of which is not committed
};

// One launch: its threads serve one block after another.
struct Launch {
  Launch(const std::function<void()>& kernel, size_t shared_bytes, std::span<char> static_shared);
  ~Launch();

  const std::function<void()>& kernel;
  std::vector<std::unique_ptr<Thread>> threads;
  std::unique_ptr<char[]> shared_memory;  // aligned to 16 bytes, watched by AddressSanitizer
  std::span<char> shared, static_shared;
  WatchedMemory watched, watched_static;
  uint32_t block_barriers = 0;
  std::array<uint32_t, kMostThreads / kLanes> warp_barriers{};
  Fibre program;
  std::deque<size_t> ready;
  size_t current;
  std::minstd_rand order;
  std::string error;
};

Launch* launch = nullptr;

Launch::Launch(const std::function<void()>& kernel, size_t shared_bytes,
               std::span<char> static_shared)
    : kernel(kernel),
      shared_memory(new char[shared_bytes]),
      shared(shared_memory.get(), shared_bytes),
      static_shared(static_shared),
      watched(shared),
      watched_static(static_shared) {
  launch = this;
}

Launch::~Launch() { launch = nullptr; }

// Memory of this library alone that is thread_local, for this thread: what kernels call __shared__.
thread_local char shared_anchor;

std::span<char> static_shared_memory() {
  std::span<char> found;
  const auto visit = [](dl_phdr_info* info, size_t, void* result) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      char* begin = static_cast<char*>(info->dlpi_tls_data);
      if (header.p_type != PT_TLS || begin == nullptr) continue;
      if (begin <= &shared_anchor && &shared_anchor < begin + header.p_memsz)
        *static_cast<std::span<char>*>(result) = {begin, header.p_memsz};
    }
    return 0;
  };
  shared_anchor = 0;  // an address exists from the first use on
  dl_iterate_phdr(visit, &found);
  return found;
}

// __builtin_longjmp is not to stand in the function of its __builtin_setjmp.
[[gnu::noinline, gnu::no_sanitize("address")]] void resume(Fibre& fibre) {
  if (fibre.begun) __builtin_longjmp(fibre.place, 1);
  fibre.begun = true;
  setcontext(&fibre.beginning);
}

// Leaves one fibre for another; returns when somebody comes back.
[[gnu::noinline, gnu::no_sanitize("address")]] void change(Fibre& from, Fibre& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_size);
#endif
  if (__builtin_setjmp(from.place) == 0) resume(to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

std::string in_words(const uint3& index) {
  std::ostringstream text;
  text << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return text.str();
}

Thread& running() { return *launch->threads[launch->current]; }

// Lets the next thread run that can, or the program if none can; returns when it is this one's
// turn.
void pass_on() {
  Thread& self = running();
  if (launch->ready.empty()) {
    change(self.fibre, launch->program);
  } else {
    const size_t next = launch->ready.front();
    launch->ready.pop_front();
    launch->current = next;
    position.thread = launch->threads[next]->index;
    if (launch->threads[next].get() != &self) change(self.fibre, launch->threads[next]->fibre);
  }
}

// If all whom a waiting thread waits for have come: combines, and lets them go.
bool complete(size_t waiting) {
  const Meeting meeting = launch->threads[waiting]->meeting;
  const size_t count = launch->threads.size();
  const size_t begin = meeting.mask != 0 ? waiting / kLanes * kLanes : 0;
  const size_t end = meeting.mask != 0 ? std::min(begin + kLanes, count) : count;
  const auto takes_part = [&](size_t i) {
    const bool named = meeting.mask == 0 || (meeting.mask >> (i - begin) & 1) != 0;
    return named && !launch->threads[i]->ended;
  };
  for (size_t i = begin; i < end; ++i) {
    const Thread& thread = *launch->threads[i];
    if (takes_part(i) && !(thread.waits && thread.meeting == meeting)) return false;
  }
  std::vector<void*> operands(meeting.mask != 0 ? kLanes : count);
  std::vector<size_t> together;
  for (size_t i = begin; i < end; ++i) {
    if (!takes_part(i)) continue;
    operands[i - begin] = launch->threads[i]->operand;
    together.push_back(i);
  }
  meeting.combine(operands.data(), operands.size());
  if (launch->order() % 2 != 0) std::reverse(together.begin(), together.end());
  for (size_t i : together) {
    launch->threads[i]->waits = false;
    if (i != launch->current || running().ended) launch->ready.push_back(i);
  }
  return true;
}

void end_thread() {
  Thread& self = running();
  for (const auto& group : self.copies)
    if (!group.empty()) fail("a thread ends with copies that it did not wait for");
  self.ended = true;
  for (size_t i = 0; i < launch->threads.size(); ++i)
    if (launch->threads[i]->waits) complete(i);
  pass_on();
}

// The work of a thread's fibre: one block after another.
void work() {
#ifdef __SANITIZE_ADDRESS__
  Fibre& program = launch->program;
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (program.stack_bottom == nullptr) {
    program.stack_bottom = bottom;
    program.stack_size = size;
  }
#endif
  for (;;) {
    launch->kernel();
    end_thread();
  }
}

// Where the threads of a block wait that none of them can leave.
std::string deadlock() {
  std::map<std::string, std::vector<const Thread*>> places;
  for (const auto& thread : launch->threads)
    if (!thread->ended) places[thread->meeting.operation].push_back(thread.get());
  std::ostringstream text;
  text << "deadlock:";
  for (const auto& [operation, threads] : places)
    text << " " << threads.size() << " threads, first " << in_words(threads[0]->index)
         << ", wait at " << operation << ";";
  return text.str();
}

void run_block(uint64_t number) {
  launch->order.seed(static_cast<unsigned>(number + 1));
  launch->ready.clear();
  for (size_t i = 0; i < launch->threads.size(); ++i) {
    Thread& thread = *launch->threads[i];
    thread.ended = thread.waits = false;
    thread.copies.assign(1, {});
    launch->ready.push_back(i);
  }
  std::shuffle(launch->ready.begin(), launch->ready.end(), launch->order);
  pass_block_barrier();
  std::memset(launch->shared.data(), 0xff, launch->shared.size());
  std::memset(launch->static_shared.data(), 0xff, launch->static_shared.size());
  launch->current = launch->ready.front();
  launch->ready.pop_front();
  position.thread = running().index;
  change(launch->program, running().fibre);
  const auto ended = [](const auto& thread) { return thread->ended; };
  if (launch->error.empty() && !std::ranges::all_of(launch->threads, ended))
    launch->error = deadlock();
  if (!launch->error.empty())
    throw std::runtime_error("emulated kernel, block " + in_words(position.block) + ": " +
                             launch->error);
}

void check_launch(const dim3& grid, const dim3& block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool fits = threads > 0 && threads <= kMostThreads && block.z <= 64 && grid.x > 0 &&
                    grid.y > 0 && grid.z > 0 && grid.x < 1u << 31 && grid.y <= kMostBlocks &&
                    grid.z <= kMostBlocks && shared_bytes <= kMostSharedBytes;
  if (fits) return;
  std::ostringstream text;
  text << "launch of a kernel: got a grid of (" << grid.x << ", " << grid.y << ", " << grid.z
       << "), blocks of (" << block.x << ", " << block.y << ", " << block.z << ") threads and "
       << shared_bytes << " bytes of shared memory, which not every device takes";
  throw std::runtime_error(text.str());
}

void begin_at(Fibre& fibre, const Stack& stack) {
  getcontext(&fibre.beginning);
  fibre.beginning.uc_stack.ss_sp = stack.bottom();
  fibre.beginning.uc_stack.ss_size = stack.size();
  fibre.beginning.uc_link = nullptr;
  fibre.stack_bottom = stack.bottom();
  fibre.stack_size = stack.size();
  makecontext(&fibre.beginning, work, 0);
}

void make_threads(const dim3& block) {
  for (unsigned z = 0; z < block.z; ++z)
    for (unsigned y = 0; y < block.y; ++y)
      for (unsigned x = 0; x < block.x; ++x) {
        Thread& thread = *launch->threads.emplace_back(std::make_unique<Thread>());
        thread.index = {x, y, z};
        begin_at(thread.fibre, *thread.stack);
      }
}

}  // namespace

int lane_id() { return static_cast<int>(launch->current) % kLanes; }

char* dynamic_shared() { return launch->shared.data(); }

void fail(const std::string& message) {
  launch->error = "thread " + in_words(running().index) + ": " + message;
  change(running().fibre, launch->program);
  __builtin_unreachable();
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  check_launch(grid, block, shared_bytes);
  Launch all(kernel, shared_bytes, static_shared_memory());
  all.program.begun = true;
  make_threads(block);
  position.block_size = block;
  position.grid_size = grid;
  uint64_t number = 0;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        position.block = {x, y, z};
        run_block(number++);
      }
}

void meet(const Meeting& meeting, void* operand) {
  Thread& self = running();
  if (meeting.mask != 0 && (meeting.mask >> lane_id() & 1) == 0)
    fail(std::string(meeting.operation) + ": the mask leaves out the lane that calls");
  self.meeting = meeting;
  self.operand = operand;
  self.waits = true;
  if (!complete(launch->current)) pass_on();
}

void pass_block_barrier() { ++launch->block_barriers; }

void pass_warp_barrier() { ++launch->warp_barriers[launch->current / kLanes]; }

void use_memory(const void* address, size_t bytes, bool writes) {
  if (launch == nullptr) return;
  for (WatchedMemory* memory : {&launch->watched, &launch->watched_static}) {
    if (!memory->holds(address)) continue;
    const unsigned warp = static_cast<unsigned>(launch->current) / kLanes;
    const Moment now{warp, static_cast<unsigned>(lane_id()), launch->block_barriers,
                     launch->warp_barriers[warp]};
    const std::string wrong = memory->use(address, bytes, writes, now);
    if (!wrong.empty()) fail(wrong);
  }
}

void check_shared(const char* operation, const void* address, size_t bytes) {
  const auto* begin = static_cast<const char*>(address);
  const auto holds = [&](std::span<char> memory) {
    return memory.data() <= begin && begin + bytes <= memory.data() + memory.size();
  };
  if (!holds(launch->shared) && !holds(launch->static_shared))
    fail(std::string(operation) + ": got an address outside shared memory");
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail(std::string(operation) + ": got an address that is not aligned to " +
         std::to_string(bytes) + " bytes");
}

void copy_later(void* shared_destination, const void* global_source, bool valid) {
  check_shared("cp_async_16", shared_destination, 16);
  if (valid && reinterpret_cast<uintptr_t>(global_source) % 16 != 0)
    fail("cp_async_16: got a source that is not aligned to 16 bytes");
  use_memory(shared_destination, 16, true);
  std::memset(shared_destination, 0xff, 16);
  running().copies.back().push_back(
      {static_cast<char*>(shared_destination), static_cast<const char*>(global_source), valid});
}

void commit_copies() { running().copies.emplace_back(); }

void wait_for_copies(int pending) {
  auto& groups = running().copies;
  const size_t committed = groups.size() - 1;
  const size_t done = committed - std::min(committed, static_cast<size_t>(pending));
  for (size_t i = 0; i < done; ++i)
    for (const Copy& copy : groups[i]) {
      use_memory(copy.destination, 16, true);
      if (copy.valid) std::memcpy(copy.destination, copy.source, 16);
      if (!copy.valid) std::memset(copy.destination, 0, 16);
    }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace refsam::emulator
