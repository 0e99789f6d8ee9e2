// A fiber: a function on a stack of its own that can be left and entered again.
#pragma once
#include <cstddef>

namespace ilnas::simt {

// Stacks are kept for the life of the process and handed out by number: a grid needs the same ones for every block.
class Fiber {
 public:
  using Entry = void (*)(void* argument);

  // Makes the fiber ready to run entry(argument) on stack `number` when it is next entered. entry must not return.
  void prepare(std::size_t number, Entry entry, void* argument);
  // Called outside every fiber: runs this one until it leaves.
  void enter();
  // Called inside this fiber: returns to the enter() that entered it.
  void leave();

 private:
  void* stack_pointer_ = nullptr;
  void* caller_ = nullptr;
  void* context_ = nullptr;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  friend void run_fiber(Fiber*);
};

}  // namespace ilnas::simt
