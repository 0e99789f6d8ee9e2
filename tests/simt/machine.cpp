#include "simt/machine.h"

#include <algorithm>
#include <cstring>

namespace ilnas::simt {
namespace {

std::string at(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

std::string hex(unsigned value) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

}  // namespace

Machine& machine() {
  static Machine instance;
  return instance;
}

// ---- naming what went wrong ----

std::string Machine::describe(uint3 index) const {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}
std::string Machine::describe(const Thread& thread) const { return "thread " + describe(thread.index); }

std::string Machine::located(const Thread& thread, const std::string& text) const {
  return std::string(kernel_) + ", block " + describe(block_index) + ", " + describe(thread) + ": " + text;
}
void Machine::fail_as(const Thread& thread, const std::string& text) { throw Fault{located(thread, text)}; }
void Machine::abandon(const std::string& text) {
  if (!current_) {
    if (error.empty()) error = "host code of a launcher: " + text;
    return;
  }
  fault_ = located(*current_, text);
  leave();
}
void Machine::fail_on_host() { throw Fault{"a device function or a checked pointer was used outside a kernel"}; }

uint3 Machine::thread_index(unsigned number) const {
  return {number % block_size.x, number / block_size.x % block_size.y, number / block_size.x / block_size.y};
}
uint3 Machine::block_at(uint64_t number) const {
  return {static_cast<unsigned>(number % grid_size.x), static_cast<unsigned>(number / grid_size.x % grid_size.y),
          static_cast<unsigned>(number / grid_size.x / grid_size.y)};
}

// ---- grids and blocks ----

uint64_t Machine::random() {
  random_state_ += 0x9e3779b97f4a7c15u;  // SplitMix64
  uint64_t z = random_state_;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

std::string Machine::refusal(dim3 grid, dim3 block, size_t shared_bytes) const {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64)
    return ": a block has 1 to 1024 threads, 64 at most along z; got " + std::to_string(threads);
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return ": a grid has at most 2^31-1, 65535, 65535 blocks";
  if (shared_bytes > shared_limit)
    return ": " + std::to_string(shared_bytes) + " bytes of dynamic shared memory, the device has " +
           std::to_string(shared_limit);
  return "";
}

void Machine::prepare_shared(size_t dynamic_bytes) {
  shared_arrays_.clear();
  shared_storage_.assign((shared_limit + 15) / 16 * 2 + 2, 0);
  auto* arena = reinterpret_cast<unsigned char*>(shared_storage_.data());
  arena += -reinterpret_cast<uintptr_t>(arena) % 16;
  shared_used_ = (dynamic_bytes + 15) / 16 * 16;
  dynamic_ = Region{};
  dynamic_.shared = true;
  dynamic_.name = "dynamic shared memory";
  dynamic_.begin = arena;
  dynamic_.bytes = dynamic_bytes;
  dynamic_.state.resize(dynamic_bytes + 1);
  dynamic_.history.resize(dynamic_bytes);
}

bool Machine::run(const char* kernel, const void* address, dim3 grid, dim3 block, size_t shared_bytes,
                  const std::function<void()>& body) {
  if (!error.empty()) return false;
  kernel_ = kernel;
  body_ = &body;
  grid_size = grid;
  block_size = block;
  const std::string refused = refusal(grid, block, shared_bytes);
  if (!refused.empty()) {
    error = kernel + refused;
    return false;
  }
  random_state_ = seed;
  prepare_shared(shared_bytes);
  block_starts_.clear();
  grid_epoch_ = epoch_ + 1;

  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  const bool in_full = !run_in_full.empty() && std::strstr(kernel, run_in_full.c_str());
  if (blocks_to_run > 0 && blocks_to_run < blocks && !in_full) order.resize(blocks_to_run);
  const unsigned threads = block.x * block.y * block.z;
  counts = {};
  fault_.clear();
  for (uint64_t number : order) {
    block_index = block_at(number);
    block_starts_.emplace_back(epoch_ + 1, number);
    run_block(threads);
    if (profiling) coalescer_.finish();
    if (!fault_.empty()) break;
  }
  current_ = nullptr;
  error = fault_;
  launches.push_back({kernel, address, blocks, order.size(), threads, shared_bytes,
                      shared_used_ - (shared_bytes + 15) / 16 * 16, counts});
  return error.empty();
}

void Machine::thread_main(void* self) {
  Machine& m = machine();
  auto* thread = static_cast<Thread*>(self);
  try {
    (*m.body_)();
  } catch (const Fault& fault) {
    m.fault_ = fault.text;
  }
  thread->state = Thread::kExited;
  --m.live_;
  thread->fiber.leave();
}

void Machine::start_block(unsigned threads) {
  block_epoch_ = ++epoch_;
  for (auto& [key, region] : shared_arrays_) std::fill(region->state.begin(), region->state.end(), 0);
  std::fill(dynamic_.state.begin(), dynamic_.state.end(), 0);
  while (threads_.size() < threads) threads_.push_back(std::make_unique<Thread>());
  exchanges_.clear();
  exchanges_.resize((threads + 31) / 32);
  runnable_.clear();
  live_ = threads;
  at_barrier_ = barrier_votes_ = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Thread& t = *threads_[i];
    t.number = i;
    t.index = thread_index(i);
    t.state = Thread::kRunnable;
    t.time = 1;
    std::fill(t.seen, t.seen + 32, 0);
    t.uncommitted.clear();
    t.groups.clear();
    t.fiber.prepare(i, &Machine::thread_main, &t);
    runnable_.push_back(&t);
  }
}

void Machine::run_block(unsigned threads) {
  start_block(threads);
  while (!runnable_.empty()) {
    const size_t pick = random() % runnable_.size();
    current_ = runnable_[pick];
    runnable_[pick] = runnable_.back();
    runnable_.pop_back();
    current_->fiber.enter();
    if (!fault_.empty()) return;
  }
  if (live_ != 0) explain_stall(threads);
}

// Nobody can go on: some threads wait for others that have exited or wait elsewhere.
void Machine::explain_stall(unsigned threads) {
  std::map<std::string, std::pair<unsigned, const Thread*>> groups;
  for (unsigned i = 0; i < threads; ++i) {
    const Thread& t = *threads_[i];
    std::string what = "exited";
    if (t.state == Thread::kAtBarrier) what = std::string("wait at ") + t.waits_for + " (" + at(t.site) + ")";
    if (t.state == Thread::kInWarpFunction)
      what = std::string("wait in ") + t.waits_for + " (" + at(t.site) + ") for the lanes of mask " + hex(t.mask);
    auto& group = groups.try_emplace(what, 0u, &t).first->second;
    ++group.first;
  }
  std::string text = std::string(kernel_) + ", block " + describe(block_index) + ": divergent barrier:";
  for (const auto& [what, group] : groups)
    text += " " + std::to_string(group.first) + " threads " + what + ", first " + describe(*group.second) + ";";
  fault_ = text + " every thread that others wait for must reach the same barrier";
}

void Machine::make_runnable(Thread& thread) {
  thread.state = Thread::kRunnable;
  runnable_.push_back(&thread);
}

// ---- barriers and warp functions ----

int Machine::sync_block(const char* name, int vote, Site site) {
  Thread& self = thread();
  for (unsigned i = 0; at_barrier_ > 0 && i < block_size.x * block_size.y * block_size.z; ++i) {
    const Thread& other = *threads_[i];
    if (other.state != Thread::kAtBarrier) continue;
    if (other.site.line() != site.line() || std::strcmp(other.site.file_name(), site.file_name()) != 0)
      fail(std::string("divergent barrier: waits at ") + name + " (" + at(site) + "), while " + describe(other) +
           " waits at " + other.waits_for + " (" + at(other.site) +
           "); all threads of a block must meet at the same one");
    break;
  }
  barrier_votes_ += static_cast<unsigned>(vote);
  ++at_barrier_;
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  if (at_barrier_ < threads) {
    self.state = Thread::kAtBarrier;
    self.waits_for = name;
    self.site = site;
    leave();
    return static_cast<int>(last_votes_);
  }
  ++counts.barriers;
  ++epoch_;
  last_votes_ = barrier_votes_;
  at_barrier_ = barrier_votes_ = 0;
  for (unsigned i = 0; i < threads; ++i)
    if (threads_[i]->state == Thread::kAtBarrier) make_runnable(*threads_[i]);
  return static_cast<int>(last_votes_);
}

Exchange* Machine::join(const char* name, unsigned mask, Lane* operand, Site site) {
  Thread& self = thread();
  const unsigned bit = 1u << self.number % 32, first = self.number / 32 * 32;
  const auto called = [&] { return std::string(name) + " (" + at(site) + ") with mask " + hex(mask); };
  if (!(mask & bit)) fail(called() + ", which does not name the calling lane " + std::to_string(self.number % 32));
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= threads)
      fail(called() + ", which names lane " + std::to_string(lane) + ", but the block ends before it");
    if (threads_[first + lane]->state == Thread::kExited)
      fail("divergent barrier: " + called() + ", which names lane " + std::to_string(lane) + ", which has exited");
  }
  auto& active = exchanges_[self.number / 32];
  for (auto& e : active) {
    // Another mask is no fault by itself: lanes may come to this function after one of a part of the warp.
    if (e->mask != mask) continue;
    if (std::strcmp(e->name, name) != 0 || e->site.line() != site.line() ||
        std::strcmp(e->site.file_name(), site.file_name()) != 0)
      fail("divergent warp: " + called() + ", while other lanes of it wait in " + e->name + " (" + at(e->site) +
           ") with mask " + hex(e->mask));
    e->arrived |= bit;
    e->lanes[self.number % 32] = operand;
    return e.get();
  }
  active.push_back(std::make_unique<Exchange>());
  Exchange* e = active.back().get();
  e->mask = mask;
  e->arrived = bit;
  e->name = name;
  e->site = site;
  e->lanes[self.number % 32] = operand;
  return e;
}

void Machine::wait_in_warp(const char* name, unsigned mask, Site site) {
  Thread& self = thread();
  self.state = Thread::kInWarpFunction;
  self.waits_for = name;
  self.site = site;
  self.mask = mask;
  leave();
}

void Machine::release(Exchange* exchange) {
  const unsigned warp = current_->number / 32;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (exchange->mask >> lane & 1 && warp * 32 + lane != current_->number) make_runnable(*threads_[warp * 32 + lane]);
  auto& active = exchanges_[warp];
  active.erase(std::find_if(active.begin(), active.end(), [&](const auto& e) { return e.get() == exchange; }));
}

// After it, everything that a participant had seen or done precedes what any participant does next.
void Machine::sync_warp(unsigned mask, Site site) {
  Lane none;
  const unsigned first = thread().number / 32 * 32;
  exchange("__syncwarp", mask, &none, site, [&](Lane**) {
    uint32_t joined[32] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const Thread& t = *threads_[first + lane];
      for (unsigned other = 0; other < 32; ++other) joined[other] = std::max(joined[other], t.seen[other]);
      joined[lane] = t.time;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& t = *threads_[first + lane];
      std::copy(joined, joined + 32, t.seen);
      ++t.time;
    }
  });
}

}  // namespace ilnas::simt
