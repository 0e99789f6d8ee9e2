#include "torch/tensors.h"

namespace ilnas {
namespace {

Tensor masked_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& row_ptr,
                     const Tensor& col, const Tensor& t_row_ptr, const Tensor& t_col, const Tensor& t_perm,
                     const std::string& isa) {
  const LinearShape s{x.size(0), x.size(1), row_ptr.numel() - 1};
  Tensor out = torch::stable::new_empty(x, {s.batch, s.out_features});
  if (out.numel() == 0) return out;
  const Tensor packed = torch::stable::contiguous(values);
  const std::optional<Tensor> offset = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  kernels_named(isa).masked_linear(dtype_of(x), s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm), matrix_view(x),
                                   packed.data_ptr(), offset ? offset->data_ptr() : nullptr, matrix_view(out),
                                   torch_parallel());
  return out;
}

// A gradient that output_mask leaves out is an empty tensor.
std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& values,
                                                          const Tensor& row_ptr, const Tensor& col,
                                                          const Tensor& t_row_ptr, const Tensor& t_col,
                                                          const Tensor& t_perm, const std::vector<bool>& output_mask,
                                                          const std::string& isa) {
  const LinearShape s{x.size(0), x.size(1), row_ptr.numel() - 1};
  Tensor grad_x =
      output_mask[0] ? torch::stable::new_empty(x, {s.batch, s.in_features}) : torch::stable::new_empty(x, {0});
  Tensor grad_values = torch::stable::new_empty(x, {output_mask[1] ? col.numel() : 0});
  Tensor grad_bias = torch::stable::new_empty(x, {output_mask[2] ? s.out_features : 0});
  if (grad_out.numel() == 0) {
    torch::stable::zero_(grad_x), torch::stable::zero_(grad_values), torch::stable::zero_(grad_bias);
    return {grad_x, grad_values, grad_bias};
  }
  const Tensor packed = torch::stable::contiguous(values);
  const MatrixView grad_x_view = output_mask[0] ? matrix_view(grad_x) : MatrixView{};
  kernels_named(isa).masked_linear_backward(dtype_of(x), s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm),
                                            matrix_view(grad_out), matrix_view(x), packed.data_ptr(),
                                            output_mask[0] && grad_x.numel() ? &grad_x_view : nullptr,
                                            output_mask[1] ? grad_values.data_ptr() : nullptr,
                                            output_mask[2] ? grad_bias.data_ptr() : nullptr, torch_parallel());
  return {grad_x, grad_values, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ilnas, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward));
}

}  // namespace ilnas
