// Memory that is watched byte by byte: bounds, alignment, initialisation, and which thread touched what since when.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ilnas::simt {

// One past access. epoch counts block barriers (and block starts) over the grid; time counts the warp barriers that the
// thread has passed. epoch 0: none.
struct Access {
  uint32_t epoch = 0;
  uint32_t time : 21 = 0, thread : 10 = 0, atomic : 1 = 0;
};

// What is remembered of a byte: its last write, and two reads since, by threads as far apart as possible, so that any
// later write finds one of them to conflict with if it conflicts with any.
struct ByteHistory {
  Access write, reads[2];
};

enum ByteState : unsigned char { kInitialised = 1, kInFlight = 2 };  // in flight: the target of a pending cp_async

// An array that kernels may touch. Without a history (read-only memory) only bounds and alignment are checked.
struct Region {
  bool shared = false;
  std::string name;
  unsigned char* begin = nullptr;
  size_t bytes = 0;
  bool writable = true;
  uint32_t written_in = 0, read_only_in = 0;  // the grids (their first epochs) that wrote it, or read it as read-only
  std::vector<unsigned char> state;
  std::vector<ByteHistory> history;
  bool watched() const { return !state.empty(); }
};

enum class Touch { kRead, kWrite, kAtomic };

}  // namespace ilnas::simt
