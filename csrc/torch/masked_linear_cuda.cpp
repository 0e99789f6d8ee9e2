#include "torch/cuda_call.h"

namespace ilnas {
namespace {

Tensor masked_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& row_ptr,
                     const Tensor& col, const Tensor& t_row_ptr, const Tensor& t_col, const Tensor& t_perm,
                     const std::string& isa) {
  const Conv2dShape s = linear_shape(x.size(0), x.size(1), row_ptr.numel() - 1);
  const DType dtype = cuda_dtype_of("masked_linear", x);
  Tensor out = torch::stable::new_empty(x, {s.batch, s.out_channels});
  if (out.numel() == 0) return out;
  const CudaOperands operands{"masked_linear", isa, dtype, s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm)};
  cuda_forward(operands, x, linear_view(x), values, bias, linear_view(out));
  return out;
}

// A gradient that output_mask leaves out is an empty tensor.
std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& values,
                                                          const Tensor& row_ptr, const Tensor& col,
                                                          const Tensor& t_row_ptr, const Tensor& t_col,
                                                          const Tensor& t_perm, const std::vector<bool>& output_mask,
                                                          const std::string& isa) {
  const Conv2dShape s = linear_shape(x.size(0), x.size(1), row_ptr.numel() - 1);
  const DType dtype = cuda_dtype_of("masked_linear_backward", x);
  Tensor grad_x =
      output_mask[0] ? torch::stable::new_empty(x, {s.batch, s.in_channels}) : torch::stable::new_empty(x, {0});
  Tensor grad_values = torch::stable::new_empty(x, {output_mask[1] ? col.numel() : 0});
  Tensor grad_bias = torch::stable::new_empty(x, {output_mask[2] ? s.out_channels : 0});
  if (grad_out.numel() == 0) {
    torch::stable::zero_(grad_x), torch::stable::zero_(grad_values), torch::stable::zero_(grad_bias);
    return {grad_x, grad_values, grad_bias};
  }
  const CudaOperands operands{"masked_linear_backward", isa, dtype, s,
                              pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm)};
  const ImageView grad_x_view = output_mask[0] ? linear_view(grad_x) : ImageView{};
  cuda_backward(operands, x, linear_view(grad_out), linear_view(x), values,
                output_mask[0] && grad_x.numel() ? &grad_x_view : nullptr,
                grad_values.numel() ? grad_values.data_ptr() : nullptr,
                grad_bias.numel() ? grad_bias.data_ptr() : nullptr);
  return {grad_x, grad_values, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ilnas, CUDA, m) {
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward));
}

}  // namespace ilnas
