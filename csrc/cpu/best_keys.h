// The k greatest of a stream of distinct 64-bit keys, whatever the order and the threads they come from.
#pragma once
#include <cstdint>

namespace ilnas {

// Everything is out of line: the kernels that feed it are compiled for several instruction sets, this is not.
class BestKeys {
 public:
  // Keys below `floor` are never wanted. Takes 16 bytes a key wanted and a fixed half megabyte.
  BestKeys(int64_t k, uint64_t floor);
  ~BestKeys();
  BestKeys(const BestKeys&) = delete;
  BestKeys& operator=(const BestKeys&) = delete;

  // Keys below it are not among the best: callers leave them out. It only ever rises.
  uint64_t threshold() const;
  // Safe from several threads at once.
  void add(const uint64_t* keys, int64_t count);
  // How many keys are held: at least k, or all that came.
  int64_t held() const;
  // The best, greatest first; at most k, fewer where fewer came.
  int64_t finish(const uint64_t** best);

 private:
  struct State;
  State* state_;
};

}  // namespace ilnas
