// What a call of a CPU kernel needs: the instruction set asked for, and torch's thread pool.
#pragma once
#include "torch/operands.h"

namespace ilnas {

inline const Kernels& kernels_named(const std::string& isa) {
  InstructionSet set = best_instruction_set();
  if (!isa.empty()) {
    if (isa == "avx512")
      set = InstructionSet::kAvx512;
    else if (isa == "avx2")
      set = InstructionSet::kAvx2;
    else {
      STD_TORCH_CHECK(isa == "baseline", "ilnas: isa must be avx512, avx2 or baseline, got ", isa);
      set = InstructionSet::kBaseline;
    }
    STD_TORCH_CHECK(runs_here(set), "ilnas: isa ", isa, " is not compiled in or does not run on this processor");
  }
  return *kernels(set);
}

inline Parallel torch_parallel() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t tasks, void* context, void (*body)(void*, int64_t)) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(context, task);
            });
          }};
}

}  // namespace ilnas
