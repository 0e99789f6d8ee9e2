// The operators on the CPU.
#include "torch/absent_topk.h"
#include "torch/masked_conv2d.h"
#include "torch/masked_linear.h"

namespace ilnas {

void allocation_failed(const char* op, const Tensor&, int64_t bytes) {
  STD_TORCH_CHECK(false, op, ": out of memory. Tried to allocate ", bytes, " bytes");
}

namespace {

const Kernels& kernels_named(const std::string& isa) {
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

Parallel torch_parallel() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t tasks, void* context, void (*body)(void*, int64_t)) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(context, task);
            });
          }};
}

// There are no condensed forms here.
class Cpu : public Allocator {
 public:
  Cpu(const char* op, const Tensor& x, const std::string& isa)
      : Allocator(op, x), kernels_(kernels_named(isa)), dtype_(dtype_of(x)) {}

  void masked_conv2d(const Conv2dShape& s, const PatternView& pattern, const ImageView& x, const Weights& weights,
                     const ImageView& out, const std::optional<Tensor>&) const {
    kernels_.masked_conv2d(dtype_, s, pattern, x, weights.values(), weights.bias(), out, torch_parallel());
  }
  void masked_conv2d_backward(const Conv2dShape& s, const PatternView& pattern, const ImageView& grad_out,
                              const ImageView& x, const Weights& weights, const ImageView* grad_x,
                              const WeightGradients& to, const std::optional<Tensor>&) const {
    kernels_.masked_conv2d_backward(dtype_, s, pattern, grad_out, x, weights.values(), grad_x, to.values, to.bias,
                                    torch_parallel());
  }
  void masked_linear(const LinearShape& s, const PatternView& pattern, const MatrixView& x, const Weights& weights,
                     const MatrixView& out, const std::optional<Tensor>&) const {
    kernels_.masked_linear(dtype_, s, pattern, x, weights.values(), weights.bias(), out, torch_parallel());
  }
  void masked_linear_backward(const LinearShape& s, const PatternView& pattern, const MatrixView& grad_out,
                              const MatrixView& x, const Weights& weights, const MatrixView* grad_x,
                              const WeightGradients& to, const std::optional<Tensor>&) const {
    kernels_.masked_linear_backward(dtype_, s, pattern, grad_out, x, weights.values(), grad_x, to.values, to.bias,
                                    torch_parallel());
  }
  void absent_topk(const Conv2dShape& s, const PatternView& blocked, const ImageView& grad_out, const ImageView& x,
                   const TopkQuery& query) const {
    const int64_t in_per_group = s.in_channels / std::max<int64_t>(s.groups, 1);
    STD_TORCH_CHECK(s.out_channels * in_per_group * s.kernel_height * s.kernel_width <= int64_t{1} << 32,
                    "absent_topk: a weight of more than 2**32 elements cannot be ranked, got [", s.out_channels, ", ",
                    in_per_group, ", ", s.kernel_height, ", ", s.kernel_width, "]");
    kernels_.absent_topk(dtype_, s, blocked, grad_out, x, query, torch_parallel());
  }

 private:
  const Kernels& kernels_;
  DType dtype_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ilnas, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d<Cpu>));
  m.impl("masked_conv2d_backward", TORCH_BOX(&masked_conv2d_backward<Cpu>));
  m.impl("masked_linear", TORCH_BOX(&masked_linear<Cpu>));
  m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward<Cpu>));
  m.impl("absent_topk", TORCH_BOX(&absent_topk<Cpu>));
}

}  // namespace ilnas
