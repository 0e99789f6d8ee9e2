// The C interface through which tests drive the machine.
#include <dlfcn.h>

#include <cstring>

#include "simt/machine.h"

using ilnas::simt::machine;

extern "C" {

void simt_reset(int arch, int multiprocessors, int64_t shared_limit, uint64_t seed) {
  auto& m = machine();
  m.clear_globals();
  m.error.clear();
  m.arch = arch;
  m.multiprocessors = multiprocessors;
  m.shared_limit = static_cast<size_t>(shared_limit);
  m.seed = seed;
  m.launches.clear();
}
void simt_register(const char* name, void* begin, int64_t bytes, int writable, int initialised) {
  machine().register_global(name, begin, static_cast<size_t>(bytes), writable != 0, initialised != 0);
}
// The first byte that nobody wrote, or -1.
int64_t simt_first_unwritten(void* begin) {
  size_t offset = 0;
  return machine().fully_written(begin, &offset) ? -1 : static_cast<int64_t>(offset);
}
const char* simt_error() { return machine().error.c_str(); }
void simt_profile(int profiling, int64_t blocks_to_run, const char* run_in_full) {
  machine().profiling = profiling != 0;
  machine().blocks_to_run = static_cast<uint64_t>(blocks_to_run);
  machine().run_in_full = run_in_full;
}
int simt_launches() { return static_cast<int>(machine().launches.size()); }
const char* simt_launch_name(int i) { return machine().launches[static_cast<size_t>(i)].kernel.c_str(); }
// Where the kernel lies in this library, for its symbol table.
int64_t simt_launch_offset(int i) {
  const void* address = machine().launches[static_cast<size_t>(i)].address;
  Dl_info info;
  return dladdr(address, &info) ? static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase) : -1;
}
// blocks, blocks_run, threads, dynamic_shared, static_shared and the Counts in their order; returns how many there are.
int simt_launch_numbers(int i, uint64_t* values, int capacity) {
  const ilnas::simt::Launch& launch = machine().launches[static_cast<size_t>(i)];
  constexpr int kCounts = sizeof(ilnas::simt::Counts) / sizeof(uint64_t);
  if (capacity >= 5 + kCounts) {
    const uint64_t head[] = {launch.blocks, launch.blocks_run, launch.threads, launch.dynamic_shared,
                             launch.static_shared};
    std::memcpy(values, head, sizeof head);
    std::memcpy(values + 5, &launch.counts, sizeof launch.counts);
  }
  return 5 + kCounts;
}
}
