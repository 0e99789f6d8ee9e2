#include "torch/cpu_call.h"

namespace ilnas {
namespace {

// All operands are contiguous; rows of x are channels.
std::tuple<Tensor, Tensor> relu_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, Tensor running_mean,
                                     Tensor running_var, Tensor out, bool training, double momentum, double eps,
                                     const std::string& isa) {
  const Allocator memory("relu_norm", x);
  const Tensor mean = memory.empty({x.size(0)}), inverse_std = memory.empty({x.size(0)});
  const ReluNorm r{x.size(0),
                   x.size(1),
                   x.data_ptr(),
                   weight.data_ptr(),
                   bias.data_ptr(),
                   running_mean.data_ptr(),
                   running_var.data_ptr(),
                   training,
                   momentum,
                   eps,
                   mean.data_ptr(),
                   inverse_std.data_ptr(),
                   out.data_ptr()};
  kernels_named(isa).relu_norm(dtype_of(x), r, torch_parallel());
  return {mean, inverse_std};
}

std::tuple<Tensor, Tensor, Tensor> relu_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                      const Tensor& mean, const Tensor& inverse_std, bool training,
                                                      const std::string& isa) {
  const Allocator memory("relu_norm_backward", x);
  const Tensor grad_x = memory.empty({x.size(0), x.size(1)});
  const Tensor grad_weight = memory.empty({x.size(0)}), grad_bias = memory.empty({x.size(0)});
  const ReluNormBackward r{x.size(0),
                           x.size(1),
                           grad_out.data_ptr(),
                           x.data_ptr(),
                           weight.data_ptr(),
                           mean.data_ptr(),
                           inverse_std.data_ptr(),
                           training,
                           grad_x.data_ptr(),
                           grad_weight.data_ptr(),
                           grad_bias.data_ptr()};
  kernels_named(isa).relu_norm_backward(dtype_of(x), r, torch_parallel());
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ilnas, m) {
  m.def(
      "relu_norm(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor(c!) out, bool training, float momentum, float eps, str isa) -> (Tensor, Tensor)");
  m.def(
      "relu_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor mean, Tensor inverse_std, bool training, "
      "str isa) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ilnas, CPU, m) {
  m.impl("relu_norm", TORCH_BOX(&relu_norm));
  m.impl("relu_norm_backward", TORCH_BOX(&relu_norm_backward));
}

}  // namespace ilnas
