#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace ilnas::simt {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

// The lowest page of each stack is a guard: an overflow stops the process instead of corrupting a neighbour.
unsigned char* stack(std::size_t number) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= number) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[number];
}

}  // namespace

void run_fiber(Fiber* fiber) {
  fiber->entry_(fiber->argument_);
  __builtin_trap();
}

#ifdef __x86_64__

// Saves the registers that a call preserves on the present stack, stores its pointer in *from, and takes up at `to`.
extern "C" void ilnas_simt_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type ilnas_simt_switch, @function
ilnas_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ilnas_simt_switch, .-ilnas_simt_switch
.type ilnas_simt_start, @function
ilnas_simt_start:
  movq %r12, %rdi
  jmp *%r13
.size ilnas_simt_start, .-ilnas_simt_start
)");
extern "C" void ilnas_simt_start();

void Fiber::prepare(std::size_t number, Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  auto* top = reinterpret_cast<std::uintptr_t*>(stack(number) + kStackBytes);
  *--top = 0;  // where a return address would be: functions find the stack aligned as after a call
  *--top = reinterpret_cast<std::uintptr_t>(&ilnas_simt_start);
  *--top = 0;                                             // rbp
  *--top = 0;                                             // rbx
  *--top = reinterpret_cast<std::uintptr_t>(this);        // r12
  *--top = reinterpret_cast<std::uintptr_t>(&run_fiber);  // r13
  *--top = 0;                                             // r14
  *--top = 0;                                             // r15
  stack_pointer_ = top;
}
void Fiber::enter() { ilnas_simt_switch(&caller_, stack_pointer_); }
void Fiber::leave() { ilnas_simt_switch(&stack_pointer_, caller_); }

#else

namespace {
struct Contexts {
  ucontext_t self, caller;
};
void start(unsigned high, unsigned low) {
  run_fiber(reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>(high) << 32 | low));
}
}  // namespace

void Fiber::prepare(std::size_t number, Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  if (!context_) context_ = new Contexts;
  auto* contexts = static_cast<Contexts*>(context_);
  getcontext(&contexts->self);
  contexts->self.uc_stack.ss_sp = stack(number);
  contexts->self.uc_stack.ss_size = kStackBytes;
  contexts->self.uc_link = nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&contexts->self, reinterpret_cast<void (*)()>(start), 2, static_cast<unsigned>(address >> 32),
              static_cast<unsigned>(address));
}
void Fiber::enter() {
  auto* contexts = static_cast<Contexts*>(context_);
  swapcontext(&contexts->caller, &contexts->self);
}
void Fiber::leave() {
  auto* contexts = static_cast<Contexts*>(context_);
  swapcontext(&contexts->self, &contexts->caller);
}

#endif

}  // namespace ilnas::simt
