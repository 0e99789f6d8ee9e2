// The emulated multiprocessor: blocks one after another in shuffled order, the threads of a block as fibers that run in
// shuffled order from one barrier or warp function to the next, and the rules of CUDA checked on the way.
//
// One machine, one host thread: it is test equipment and keeps its state in one global object, as a device would.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/memory.h"
#include "simt/profile.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace ilnas::simt {

using Site = std::source_location;

// Thrown inside a kernel's thread; ends the grid. The text names kernel, block, thread, place and rule.
struct Fault {
  std::string text;
};

// The operand of a lane in a warp function; the results are written back into it.
struct Lane {
  const void* address = nullptr;  // ldmatrix
  Region* region = nullptr;
  uint64_t value = 0;
  int source = 0, width = 32;
  uint32_t a[4] = {}, b[2] = {}, fragment[4] = {};
  float d[4] = {};
};

struct Thread {
  Fiber fiber;
  unsigned number = 0;  // in the block, x fastest
  uint3 index{};
  enum { kRunnable, kAtBarrier, kInWarpFunction, kExited } state = kRunnable;
  const char* waits_for = "";
  Site site;
  unsigned mask = 0;
  uint32_t time = 1;       // warp barriers passed, plus one
  uint32_t seen[32] = {};  // for every lane of the warp: the time of its latest access known to precede this thread
  int vote = 0;
  struct Copy {
    Region* to_region;
    unsigned char* to;
    unsigned bytes;
    unsigned char data[16];
  };
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

// A warp function that waits for the rest of its lanes.
struct Exchange {
  unsigned mask, arrived;
  const char* name;
  Site site;
  Lane* lanes[32];
};

class Machine {
 public:
  // ---- host side ----
  int arch = 80;
  int multiprocessors = 4;
  size_t shared_limit = 64 * 1024;  // Turing's; a block of more than that runs on newer devices only
  uint64_t seed = 0;
  // Profiling counts traffic as the hardware would see it, and leaves out the checks of each byte, so that a few blocks
  // of a problem of full size can be run: blocks_to_run of every grid (0: all) but those in whose kernel's name
  // run_in_full occurs.
  bool profiling = false;
  uint64_t blocks_to_run = 0;
  std::string run_in_full;
  std::vector<Launch> launches;
  Counts counts{};
  std::string error;  // of the first grid that failed; later launches are refused until it is cleared

  void register_global(const std::string& name, void* begin, size_t bytes, bool writable, bool initialised);
  void clear_globals() { globals_.clear(); }
  Region* find_global(const void* address);
  // Whether every byte of the allocation has been written or was initialised; the first that was not in *offset.
  bool fully_written(const void* begin, size_t* offset);
  bool fill(void* begin, int value, size_t bytes);
  // Runs the grid. False, with `error` set, when a thread broke a rule.
  bool run(const char* kernel, const void* address, dim3 grid, dim3 block, size_t shared_bytes,
           const std::function<void()>& body);

  // ---- called by the threads ----
  uint3 block_index{};
  dim3 block_size, grid_size;
  Thread& thread() {
    if (!current_) fail_on_host();
    return *current_;
  }
  unsigned lane() { return thread().number % 32; }
  [[noreturn]] void fail(const std::string& text) { fail_as(thread(), text); }

  // Like fail, for callers that must not throw: leaves the thread where it is. On the host it notes the error.
  void abandon(const std::string& text);

  // place: where in the code the access stands, for the profile.
  void touch(Region* region, const void* address, size_t bytes, size_t alignment, Touch kind,
             const void* place = nullptr);
  // Notes that the array is read through the read-only path, which does not see writes of the same grid.
  void read_only(Region* region);
  Region* shared_array(const void* key, const char* name, size_t bytes);
  Region* dynamic_shared() { return &dynamic_; }

  // Waits for all threads of the block; returns the sum of their votes.
  int sync_block(const char* name, int vote, Site site);
  void sync_warp(unsigned mask, Site site);
  // Waits for the lanes of mask; the last to come runs finish(lanes, mask), lanes[i] null outside the mask.
  template <class Finish>
  void exchange(const char* name, unsigned mask, Lane* operand, Site site, Finish finish) {
    Exchange* joined = join(name, mask, operand, site);
    if (joined->arrived != mask) return wait_in_warp(name, mask, site);
    finish(joined->lanes);
    release(joined);
  }
  // A row of ldmatrix, 16 bytes given by lane `number`: bounds and alignment; then, with the receivers as the readers,
  // the rest. row: its number in the matrix.
  void check_row(const Lane& lane, unsigned number);
  void count_matrices(Lane* const* lanes, int matrices);
  void touch_row(const Lane& lane, unsigned row, bool transposed);

  void copy_async(Region* to_region, void* to, Region* from_region, const void* from, unsigned bytes, bool valid);
  void copy_commit();
  void copy_wait(unsigned groups);

 private:
  std::string located(const Thread& thread, const std::string& text) const;
  [[noreturn]] void fail_as(const Thread& thread, const std::string& text);
  [[noreturn]] void fail_on_host();
  static void thread_main(void* thread);
  void run_block(unsigned threads);
  void start_block(unsigned threads);
  void explain_stall(unsigned threads);
  void leave() { current_->fiber.leave(); }
  void make_runnable(Thread& thread);
  uint64_t random();
  std::string refusal(dim3 grid, dim3 block, size_t shared_bytes) const;
  void prepare_shared(size_t dynamic_bytes);
  void count(const Region& region, uintptr_t address, size_t bytes, Touch kind, const void* place);
  Exchange* join(const char* name, unsigned mask, Lane* operand, Site site);
  void wait_in_warp(const char* name, unsigned mask, Site site);
  void release(Exchange* exchange);
  bool allowed(const Region* region, const void* address, size_t bytes, size_t alignment, Touch kind) const;
  [[noreturn]] void reject(const Thread& thread, const Region* region, const void* address, size_t bytes,
                           size_t alignment, Touch kind);
  void record(const Thread& thread, Region& region, size_t offset, size_t bytes, Touch kind);
  bool ordered(const Access& access, const Thread& thread, const Region& region) const;
  bool stale(const Access& access, const Region& region) const;
  [[noreturn]] void race(const Thread& thread, const Region& region, size_t offset, Touch kind, const Access& earlier,
                         bool earlier_wrote);
  void remember_read(ByteHistory& history, const Access& access, const Thread& thread, const Region& region);
  std::string describe(const Thread& thread) const;
  std::string describe(uint3 index) const;
  uint3 thread_index(unsigned number) const;
  uint3 block_at(uint64_t number) const;

  std::map<const unsigned char*, std::unique_ptr<Region>> globals_;
  std::map<const void*, std::unique_ptr<Region>> shared_arrays_;
  std::vector<uint64_t> shared_storage_;
  size_t shared_used_ = 0;
  Region dynamic_;

  const char* kernel_ = "";
  const std::function<void()>* body_ = nullptr;
  std::string fault_;
  Thread* current_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> runnable_;
  std::vector<std::vector<std::unique_ptr<Exchange>>> exchanges_;  // by warp
  unsigned live_ = 0, at_barrier_ = 0, barrier_votes_ = 0, last_votes_ = 0;
  uint32_t epoch_ = 0, grid_epoch_ = 1, block_epoch_ = 1;
  Coalescer coalescer_{counts};
  std::vector<std::pair<uint32_t, uint64_t>> block_starts_;  // epoch, block number
  uint64_t random_state_ = 0;
};

Machine& machine();

}  // namespace ilnas::simt
