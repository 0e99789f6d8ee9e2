// The operators on the CPU.
#include "torch/absent_topk.h"
#include "torch/cpu_call.h"
#include "torch/masked_conv2d.h"
#include "torch/masked_linear.h"

namespace ilnas {

void allocation_failed(const char* op, const Tensor&, int64_t bytes) {
  STD_TORCH_CHECK(false, op, ": out of memory. Tried to allocate ", bytes, " bytes");
}

namespace {

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
    kernels_.masked_conv2d_backward(dtype_, s, pattern, grad_out, x, weights.values(), grad_x, false, to.values,
                                    to.bias, torch_parallel());
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

// Adds the gradient of x to grad_x; returns grad_values and grad_bias, each empty where output_mask leaves it out.
std::tuple<Tensor, Tensor> masked_conv2d_backward_add_(const Tensor& grad_out, const Tensor& x, const Tensor& values,
                                                       Tensor grad_x, const Tensor& row_ptr, const Tensor& col,
                                                       const Tensor& t_row_ptr, const Tensor& t_col,
                                                       const Tensor& t_perm, const Ints& kernel_size,
                                                       const Ints& stride, const Ints& padding, const Ints& dilation,
                                                       int64_t groups, const std::vector<bool>& output_mask,
                                                       const std::string& isa) {
  const Allocator memory("masked_conv2d_backward_add_", x);
  const Conv2dShape s = conv2d_shape(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups);
  const auto compute = [&](const WeightGradients& to) {
    const ImageView grad_x_view = image_view(grad_x);
    kernels_named(isa).masked_conv2d_backward(
        dtype_of(x), s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm), image_view(grad_out), image_view(x),
        Weights(values, std::nullopt).values(), grad_x.numel() ? &grad_x_view : nullptr, true, to.values, to.bias,
        torch_parallel());
  };
  const auto [none, grad_values, grad_bias] =
      gradients(memory, grad_out, memory.empty({0}), col.numel(), s.out_channels,
                {false, output_mask[0], output_mask[1]}, compute);
  return {grad_values, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ilnas, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d<Cpu>));
  m.impl("masked_conv2d_backward", TORCH_BOX(&masked_conv2d_backward<Cpu>));
  m.impl("masked_conv2d_backward_add_", TORCH_BOX(&masked_conv2d_backward_add_));
  m.impl("masked_linear", TORCH_BOX(&masked_linear<Cpu>));
  m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward<Cpu>));
  m.impl("absent_topk", TORCH_BOX(&absent_topk<Cpu>));
}

}  // namespace ilnas
