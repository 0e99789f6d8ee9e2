#include <initializer_list>

#include "cpu/kernels.h"

namespace ilnas {
namespace baseline {
extern const Kernels kernel_table;
}
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
extern const Kernels kernel_table;
}
namespace avx512 {
extern const Kernels kernel_table;
}
#endif

const Kernels* kernels(InstructionSet set) {
  switch (set) {
    case InstructionSet::kBaseline:
      return &baseline::kernel_table;
#if defined(__x86_64__) && defined(__GNUC__)
    case InstructionSet::kAvx2:
      return &avx2::kernel_table;
    case InstructionSet::kAvx512:
      return &avx512::kernel_table;
#endif
    default:
      return nullptr;
  }
}

bool runs_here(InstructionSet set) {
  if (kernels(set) == nullptr) return false;
#if defined(__x86_64__) && defined(__GNUC__)
  // These ask the operating system too: a register file it does not save counts as absent.
  if (set == InstructionSet::kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (set == InstructionSet::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs_here(InstructionSet::kAvx2);
#endif
  return true;
}

bool mkl_is_slower() {
#if defined(__x86_64__) && defined(__GNUC__)
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

InstructionSet best_instruction_set() {
  for (auto set : {InstructionSet::kAvx512, InstructionSet::kAvx2})
    if (runs_here(set)) return set;
  return InstructionSet::kBaseline;
}

}  // namespace ilnas
