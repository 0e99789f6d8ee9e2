#include "cpu/best_keys.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <vector>

namespace ilnas {
namespace {

// Enough beyond 2k that a small k is not selected from again and again.
constexpr int64_t spare_keys = 1 << 15;

// Sorts to falling order; `other` has room for as many. Returns where the result lies, in one of the two. A comparison
// sort of a large k would show beside the gradient it follows: three passes of 11 bits order the scores, and only runs
// of equal ones are compared.
uint64_t* sort_falling(uint64_t* keys, uint64_t* other, int64_t count) {
  constexpr int bits = 11, buckets = 1 << bits, first_bit = 64 - 3 * bits;
  for (int shift = first_bit; shift < 64; shift += bits) {
    std::vector<int64_t> start(buckets + 1);
    for (int64_t i = 0; i < count; ++i) ++start[buckets - (keys[i] >> shift & (buckets - 1))];
    for (int b = 0; b < buckets; ++b) start[b + 1] += start[b];
    for (int64_t i = 0; i < count; ++i) other[start[buckets - 1 - (keys[i] >> shift & (buckets - 1))]++] = keys[i];
    std::swap(keys, other);
  }
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && keys[end] >> first_bit == keys[begin] >> first_bit;) ++end;
    if (end - begin > 1) std::sort(keys + begin, keys + end, std::greater<uint64_t>());
  }
  return keys;
}

}  // namespace

struct BestKeys::State {
  int64_t wanted, capacity, held = 0;
  std::vector<uint64_t> keys;
  std::atomic<uint64_t> threshold;
  std::mutex mutex;

  void keep_best() {
    if (held <= wanted) return;
    if (wanted == 0) {
      held = 0;
      return;
    }
    std::nth_element(keys.data(), keys.data() + wanted - 1, keys.data() + held, std::greater<uint64_t>());
    held = wanted;
    threshold.store(keys[wanted - 1], std::memory_order_relaxed);
  }
};

BestKeys::BestKeys(int64_t k, uint64_t floor) : state_(new State) {
  state_->wanted = k;
  state_->capacity = 2 * k + spare_keys;
  state_->threshold = floor;
}

BestKeys::~BestKeys() { delete state_; }

uint64_t BestKeys::threshold() const { return state_->threshold.load(std::memory_order_relaxed); }

void BestKeys::add(const uint64_t* keys, int64_t count) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->keys.empty()) state_->keys.resize(state_->capacity);
  while (count > 0) {
    const int64_t fits = std::min(count, state_->capacity - state_->held);
    std::copy(keys, keys + fits, state_->keys.data() + state_->held);
    state_->held += fits, keys += fits, count -= fits;
    if (state_->held == state_->capacity) state_->keep_best();
  }
}

int64_t BestKeys::held() const { return state_->held; }

int64_t BestKeys::finish(const uint64_t** best) {
  state_->keep_best();
  uint64_t* keys = state_->keys.data();
  *best = state_->held > 0 ? sort_falling(keys, keys + state_->wanted, state_->held) : keys;
  return state_->held;
}

}  // namespace ilnas
