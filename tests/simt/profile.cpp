#include "simt/profile.h"

#include <algorithm>
#include <bit>
#include <set>

namespace ilnas::simt {

unsigned wavefronts(const uintptr_t (&address)[32], unsigned mask, unsigned bytes) {
  const unsigned together = bytes <= 4 ? 32 : 128 / bytes;
  unsigned total = 0;
  for (unsigned first = 0; first < 32; first += together) {
    std::set<uintptr_t> words[32];
    size_t turns = 0;
    for (unsigned lane = first; lane < first + together; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (unsigned word = 0; word < (bytes + 3) / 4; ++word) {
        const uintptr_t at = address[lane] / 4 + word;
        words[at % 32].insert(at);
        turns = std::max(turns, words[at % 32].size());
      }
    }
    total += static_cast<unsigned>(turns);
  }
  return total;
}

void Coalescer::note(unsigned thread, const void* place, Traffic kind, uintptr_t address, unsigned bytes) {
  auto& requests = open_[reinterpret_cast<uint64_t>(place) * 64 + thread / 32];
  const unsigned bit = 1u << thread % 32;
  auto request = std::find_if(requests.begin(), requests.end(), [&](const Request& r) { return !(r.mask & bit); });
  if (request == requests.end()) {
    requests.emplace_back();
    request = std::prev(requests.end());
  }
  request->kind = kind;
  request->mask |= bit;
  request->bytes = bytes;
  request->address[thread % 32] = address;
  while (!requests.empty() && requests.front().mask == 0xffffffffu) {
    account(requests.front());
    requests.pop_front();
  }
}

void Coalescer::finish() {
  for (const auto& [key, requests] : open_)
    for (const Request& request : requests) account(request);
  open_.clear();
  counts_.global_block_sectors += loaded_.size();
  loaded_.clear();
}

void Coalescer::account(const Request& request) {
  if (request.kind == Traffic::kSharedLoad || request.kind == Traffic::kSharedStore) {
    const bool load = request.kind == Traffic::kSharedLoad;
    ++(load ? counts_.shared_load_requests : counts_.shared_store_requests);
    (load ? counts_.shared_load_wavefronts : counts_.shared_store_wavefronts) +=
        wavefronts(request.address, request.mask, request.bytes);
    return;
  }
  std::set<uintptr_t> sectors;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (request.mask >> lane & 1)
      for (uintptr_t s = request.address[lane] / 32; s <= (request.address[lane] + request.bytes - 1) / 32; ++s)
        sectors.insert(s);
  const bool load = request.kind == Traffic::kGlobalLoad;
  ++(load ? counts_.global_load_requests : counts_.global_store_requests);
  (load ? counts_.global_load_sectors : counts_.global_store_sectors) += sectors.size();
  if (load) loaded_.insert(sectors.begin(), sectors.end());
}

}  // namespace ilnas::simt
