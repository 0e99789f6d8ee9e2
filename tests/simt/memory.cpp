#include "simt/memory.h"

#include <algorithm>
#include <cstring>

#include "simt/machine.h"

namespace ilnas::simt {
namespace {

const char* verb(Touch kind) { return kind == Touch::kRead ? "read" : kind == Touch::kWrite ? "write" : "atomic"; }

constexpr const char* kReadOnly = "reads by load_readonly: no thread of the grid may write it";

std::string named(const Region& region) {
  return (region.shared ? "shared array '" : "global array '") + region.name + "' (" + std::to_string(region.bytes) +
         " bytes)";
}

}  // namespace

// ---- what there is ----

void Machine::register_global(const std::string& name, void* begin, size_t bytes, bool writable, bool initialised) {
  auto region = std::make_unique<Region>();
  region->name = name;
  region->begin = static_cast<unsigned char*>(begin);
  region->bytes = bytes;
  region->writable = writable;
  if ((writable || !initialised) && !profiling) {
    region->state.assign(bytes + 1, initialised ? kInitialised : 0);
    region->history.resize(bytes);
  }
  globals_[region->begin] = std::move(region);
}

Region* Machine::find_global(const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  auto after = globals_.upper_bound(byte);
  if (after == globals_.begin()) return nullptr;
  Region* region = std::prev(after)->second.get();
  return byte <= region->begin + region->bytes ? region : nullptr;
}

bool Machine::fully_written(const void* begin, size_t* offset) {
  const Region* region = find_global(begin);
  if (!region || !region->watched()) return true;
  for (size_t i = 0; i < region->bytes; ++i)
    if (!(region->state[i] & kInitialised)) return *offset = i, false;
  return true;
}

bool Machine::fill(void* begin, int value, size_t bytes) {
  if (bytes == 0) return true;
  Region* region = find_global(begin);
  auto* first = static_cast<unsigned char*>(begin);
  if (!region || !region->writable || first + bytes > region->begin + region->bytes) {
    error = "cudaMemsetAsync of " + std::to_string(bytes) + " bytes: not inside one writable allocation";
    return false;
  }
  std::memset(begin, value, bytes);
  if (region->watched()) std::fill_n(region->state.begin() + (first - region->begin), bytes, kInitialised);
  return true;
}

// Static shared arrays come into being when the first thread meets their declaration, and stay for the grid.
Region* Machine::shared_array(const void* key, const char* name, size_t bytes) {
  auto& slot = shared_arrays_[key];
  if (slot) return slot.get();
  constexpr size_t kStaticLimit = 48 * 1024;
  const size_t rounded = (bytes + 15) / 16 * 16, dynamic = (dynamic_.bytes + 15) / 16 * 16;
  if (shared_used_ - dynamic + rounded > kStaticLimit)
    fail(std::string("shared array '") + name + "': more than 49152 bytes of static shared memory");
  if (shared_used_ + rounded > shared_limit)
    fail(std::string("shared array '") + name + "': the block needs " + std::to_string(shared_used_ + rounded) +
         " bytes of shared memory, the device has " + std::to_string(shared_limit));
  slot = std::make_unique<Region>();
  slot->shared = true;
  slot->name = name;
  slot->begin = dynamic_.begin + shared_used_;
  slot->bytes = bytes;
  slot->state.resize(bytes + 1);
  slot->history.resize(bytes);
  shared_used_ += rounded;
  return slot.get();
}

// ---- the rules ----

bool Machine::allowed(const Region* region, const void* address, size_t bytes, size_t alignment, Touch kind) const {
  const auto* byte = static_cast<const unsigned char*>(address);
  return region && byte >= region->begin && byte + bytes <= region->begin + region->bytes &&
         reinterpret_cast<uintptr_t>(address) % alignment == 0 && (kind == Touch::kRead || region->writable);
}

void Machine::reject(const Thread& thread, const Region* region, const void* address, size_t bytes, size_t alignment,
                     Touch kind) {
  const std::string what = std::string(verb(kind)) + " of " + std::to_string(bytes) + " bytes";
  if (!region) {
    char text[32];
    snprintf(text, sizeof text, "%p", address);
    fail_as(thread, what + " at " + text + ": out of bounds: the pointer belongs to no array of this grid");
  }
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - region->begin;
  const std::string where = what + " at byte " + std::to_string(offset) + " of " + named(*region);
  if (offset < 0 || static_cast<size_t>(offset) + bytes > region->bytes) fail_as(thread, where + ": out of bounds");
  if (kind != Touch::kRead && !region->writable) fail_as(thread, where + ": the array is registered read-only");
  fail_as(thread, where + ": misaligned: the address must be a multiple of " + std::to_string(alignment));
}

// Nothing in this grid (or, for shared memory, this block) can conflict with so old an access.
bool Machine::stale(const Access& access, const Region& region) const {
  return access.epoch < (region.shared ? block_epoch_ : grid_epoch_);
}

bool Machine::ordered(const Access& access, const Thread& thread, const Region& region) const {
  if (stale(access, region)) return true;
  if (access.epoch < block_epoch_) return false;  // another block of this grid
  if (access.epoch < epoch_ || access.thread == thread.number) return true;
  return access.thread / 32 == thread.number / 32 && thread.seen[access.thread % 32] >= access.time;
}

void Machine::race(const Thread& thread, const Region& region, size_t offset, Touch kind, const Access& earlier,
                   bool earlier_wrote) {
  std::string who = "thread " + describe(thread_index(earlier.thread));
  std::string rule = "no barrier orders them";
  if (earlier.epoch < block_epoch_) {
    const auto start = std::prev(std::upper_bound(block_starts_.begin(), block_starts_.end(), earlier.epoch,
                                                  [](uint32_t e, const auto& s) { return e < s.first; }));
    who += " of block " + describe(block_at(start->second));
    rule = "nothing orders the blocks of a grid";
  }
  fail_as(thread, std::string("race: ") + verb(kind) + " at byte " + std::to_string(offset) + " of " + named(region) +
                      " after a" +
                      (!earlier_wrote   ? " read"
                       : earlier.atomic ? "n atomic"
                                        : " write") +
                      " by " + who + ": " + rule);
}

void Machine::remember_read(ByteHistory& history, const Access& access, const Thread& thread, const Region& region) {
  for (Access& read : history.reads)
    if (ordered(read, thread, region)) {
      read = access;
      return;
    }
  // Both are concurrent with this one. Two readers of different warps conflict with any writer; else make them so.
  const auto same_warp = [&](const Access& a, const Access& b) {
    return a.thread / 32 == b.thread / 32 && (a.epoch >= block_epoch_) == (b.epoch >= block_epoch_);
  };
  if (same_warp(history.reads[0], history.reads[1]))
    history.reads[1] = access;
  else if (same_warp(history.reads[0], access))
    history.reads[0] = access;
  else if (same_warp(history.reads[1], access))
    history.reads[1] = access;
}

void Machine::record(const Thread& thread, Region& region, size_t offset, size_t bytes, Touch kind) {
  if (kind != Touch::kRead) {
    if (region.read_only_in == grid_epoch_)
      fail_as(thread, "write to " + named(region) + ", which this grid " + kReadOnly);
    region.written_in = grid_epoch_;
  }
  Access access;
  access.epoch = epoch_;
  access.time = thread.time;
  access.thread = thread.number;
  access.atomic = kind == Touch::kAtomic;
  for (size_t i = offset; i < offset + bytes; ++i) {
    unsigned char& state = region.state[i];
    ByteHistory& history = region.history[i];
    if (state & kInFlight)
      fail_as(thread, std::string(verb(kind)) + " at byte " + std::to_string(i) + " of " + named(region) +
                          ": the target of a cp_async that has not been waited for");
    if (kind != Touch::kWrite && !(state & kInitialised))
      fail_as(thread, std::string(verb(kind)) + " at byte " + std::to_string(i) + " of " + named(region) +
                          ": uninitialised: the byte was never written");
    const bool both_atomic = kind == Touch::kAtomic && history.write.atomic;
    if (!both_atomic && !ordered(history.write, thread, region)) race(thread, region, i, kind, history.write, true);
    if (kind == Touch::kRead) {
      remember_read(history, access, thread, region);
      continue;
    }
    for (const Access& read : history.reads)
      if (!ordered(read, thread, region)) race(thread, region, i, kind, read, false);
    history.write = access;
    history.reads[0] = history.reads[1] = Access{};
    state |= kInitialised;
  }
}

void Machine::count(const Region& region, uintptr_t address, size_t bytes, Touch kind, const void* place) {
  if (kind == Touch::kAtomic) {
    ++counts.atomics;
    return;
  }
  const bool load = kind == Touch::kRead;
  Traffic traffic;
  if (region.shared) {
    ++(load ? counts.shared_loads : counts.shared_stores);
    traffic = load ? Traffic::kSharedLoad : Traffic::kSharedStore;
  } else {
    ++(load ? counts.global_loads : counts.global_stores);
    (load ? counts.global_load_bytes : counts.global_store_bytes) += bytes;
    traffic = load ? Traffic::kGlobalLoad : Traffic::kGlobalStore;
  }
  if (profiling) coalescer_.note(current_->number, place, traffic, address, static_cast<unsigned>(bytes));
}

void Machine::touch(Region* region, const void* address, size_t bytes, size_t alignment, Touch kind,
                    const void* place) {
  const Thread& self = thread();
  if (!allowed(region, address, bytes, alignment, kind)) reject(self, region, address, bytes, alignment, kind);
  count(*region, reinterpret_cast<uintptr_t>(address), bytes, kind,
        place ? place : __builtin_extract_return_addr(__builtin_return_address(0)));
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - region->begin);
  if (region->watched() && !profiling) record(self, *region, offset, bytes, kind);
}

void Machine::read_only(Region* region) {
  if (!region) return;
  if (region->written_in == grid_epoch_) fail(named(*region) + ", which this grid writes, " + kReadOnly);
  region->read_only_in = grid_epoch_;
}

void Machine::touch_row(const Lane& lane, unsigned row, bool transposed) {
  if (profiling) return;
  const unsigned warp = thread().number / 32;
  const auto* byte = static_cast<const unsigned char*>(lane.address);
  for (unsigned element = 0; element < 8; ++element) {
    const unsigned receiver = transposed ? element * 4 + row / 2 : row * 4 + element / 2;
    record(*threads_[warp * 32 + receiver], *lane.region, static_cast<size_t>(byte - lane.region->begin) + 2 * element,
           2, Touch::kRead);
  }
}

void Machine::check_row(const Lane& lane, unsigned number) {
  const Thread& provider = *threads_[thread().number / 32 * 32 + number];
  if (!allowed(lane.region, lane.address, 16, 16, Touch::kRead))
    reject(provider, lane.region, lane.address, 16, 16, Touch::kRead);
  if (!lane.region->shared) fail_as(provider, "ldmatrix reads shared memory only, got " + named(*lane.region));
}

void Machine::count_matrices(Lane* const* lanes, int matrices) {
  uintptr_t address[32];
  for (int i = 0; i < 32; ++i) address[i] = reinterpret_cast<uintptr_t>(lanes[i]->address);
  ++counts.ldmatrix_requests;
  counts.ldmatrix_wavefronts += wavefronts(address, matrices == 4 ? 0xffffffffu : (1u << 8 * matrices) - 1, 16);
}

// ---- asynchronous copies ----

void Machine::copy_async(Region* to_region, void* to, Region* from_region, const void* from, unsigned bytes,
                         bool valid) {
  Thread& self = thread();
  const void* place = __builtin_extract_return_addr(__builtin_return_address(0));
  Thread::Copy copy{to_region, static_cast<unsigned char*>(to), bytes, {}};
  if (valid) {
    touch(from_region, from, bytes, bytes, Touch::kRead, place);
    std::memcpy(copy.data, from, bytes);
  }
  touch(to_region, to, bytes, bytes, Touch::kWrite, place);
  if (!to_region->shared || (from_region && from_region->shared)) fail("cp_async copies from global to shared memory");
  if (arch < 80) {
    std::memcpy(to, copy.data, bytes);
    return;
  }
  for (unsigned i = 0; i < bytes; ++i)
    to_region->state[static_cast<size_t>(copy.to - to_region->begin) + i] |= kInFlight;
  self.uncommitted.push_back(copy);
}

void Machine::copy_commit() {
  Thread& self = thread();
  self.groups.push_back(std::move(self.uncommitted));
  self.uncommitted.clear();
}

void Machine::copy_wait(unsigned groups) {
  Thread& self = thread();
  for (; self.groups.size() > groups; self.groups.pop_front())
    for (const Thread::Copy& copy : self.groups.front()) {
      const auto offset = static_cast<size_t>(copy.to - copy.to_region->begin);
      for (unsigned i = 0; i < copy.bytes; ++i)
        copy.to_region->state[offset + i] &= static_cast<unsigned char>(~kInFlight);
      if (!profiling) record(self, *copy.to_region, offset, copy.bytes, Touch::kWrite);
      std::memcpy(copy.to, copy.data, copy.bytes);
    }
}

}  // namespace ilnas::simt
