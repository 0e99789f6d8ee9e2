#pragma once
#include "torch/operands.h"

namespace ilnas {

template <class Device>
Tensor masked_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& row_ptr,
                     const Tensor& col, const Tensor& t_row_ptr, const Tensor& t_col, const Tensor& t_perm,
                     const std::string& isa, const std::optional<Tensor>& form) {
  const Device device("masked_linear", x, isa);
  const LinearShape s{x.size(0), x.size(1), row_ptr.numel() - 1};
  Tensor out = device.empty({s.batch, s.out_features});
  if (out.numel() != 0)
    device.masked_linear(s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm), matrix_view(x), Weights(values, bias),
                         matrix_view(out), form);
  return out;
}

template <class Device>
Gradients masked_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                                 const Tensor& col, const Tensor& t_row_ptr, const Tensor& t_col, const Tensor& t_perm,
                                 const std::vector<bool>& output_mask, const std::string& isa,
                                 const std::optional<Tensor>& form) {
  const Device device("masked_linear_backward", x, isa);
  const LinearShape s{x.size(0), x.size(1), row_ptr.numel() - 1};
  const Tensor grad_x = output_mask[0] ? device.empty({s.batch, s.in_features}) : device.empty({0});
  const auto compute = [&](const WeightGradients& to) {
    const MatrixView grad_x_view = grad_x.numel() ? matrix_view(grad_x) : MatrixView{};
    device.masked_linear_backward(s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm), matrix_view(grad_out),
                                  matrix_view(x), Weights(values, std::nullopt),
                                  grad_x.numel() ? &grad_x_view : nullptr, to, form);
  };
  return gradients(device, grad_out, grad_x, col.numel(), s.out_features, output_mask, compute);
}

}  // namespace ilnas
