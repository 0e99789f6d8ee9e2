// From run-time arguments to templates: the stored type of a DType, and lambdas for the thread pool.
#pragma once
#include "cpu/kernels.h"

namespace ilnas {
namespace ILNAS_ISA {

template <class F>
static inline void with_stored_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

// parallel.run for a lambda taking the task's number.
template <class Body>
static inline void parallel_for(const Parallel& parallel, int64_t tasks, const Body& body) {
  parallel.run(tasks, const_cast<Body*>(&body),
               [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); });
}

}  // namespace ILNAS_ISA
}  // namespace ilnas
