// What a launch did, as the resource model needs it: instructions by kind, and how well the lanes' addresses fit
// together.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace ilnas::simt {

// Over the blocks that ran. Accesses and fused multiply-adds are counted per thread, warp functions per warp, barriers
// per block; the traffic, only when profiling, in units of the hardware:
//   *_requests: warp instructions; *_wavefronts: turns that they take in shared memory, one where no banks conflict
//   (four for 32 lanes of 16 bytes); *_sectors: distinct 32-byte pieces of global memory, of one request;
//   global_block_sectors: those that the loads of a block touch, each once (what a perfect L1 cache would fetch).
struct Counts {
  uint64_t fma, shared_loads, shared_stores, global_loads, global_stores, global_load_bytes, global_store_bytes,
      atomics;
  uint64_t ldmatrix, mma_k8, mma_k16, shuffles, barriers;
  uint64_t shared_load_requests, shared_load_wavefronts, shared_store_requests, shared_store_wavefronts;
  uint64_t ldmatrix_requests, ldmatrix_wavefronts;
  uint64_t global_load_requests, global_load_sectors, global_store_requests, global_store_sectors;
  uint64_t global_block_sectors;
};

struct Launch {
  std::string kernel;
  const void* address;
  uint64_t blocks, blocks_run, threads, dynamic_shared, static_shared;
  Counts counts;
};

enum class Traffic { kSharedLoad, kSharedStore, kGlobalLoad, kGlobalStore };

// Puts the accesses of a warp's lanes together again: the k-th time that each lane comes to one place in the code is
// one instruction. Exact where lanes do not diverge between warp functions, an estimate elsewhere.
class Coalescer {
 public:
  explicit Coalescer(Counts& counts) : counts_(counts) {}
  void note(unsigned thread, const void* place, Traffic kind, uintptr_t address, unsigned bytes);
  // Ends the block: what lacks lanes is counted as it is.
  void finish();

 private:
  struct Request {
    Traffic kind;
    unsigned mask = 0, bytes = 0;
    uintptr_t address[32];
  };
  void account(const Request& request);
  Counts& counts_;
  std::unordered_map<uint64_t, std::deque<Request>> open_;  // by warp and place
  std::unordered_set<uintptr_t> loaded_;                    // sectors, by this block
};

// Turns in shared memory of the addresses of the lanes in mask: the lanes of 128 bytes go together, and each group
// takes as many turns as the most distinct 4-byte words that fall into one of the 32 banks.
unsigned wavefronts(const uintptr_t (&address)[32], unsigned mask, unsigned bytes);

}  // namespace ilnas::simt
