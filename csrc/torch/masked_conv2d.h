#pragma once
#include "torch/operands.h"

namespace ilnas {

template <class Device>
Tensor masked_conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& row_ptr,
                     const Tensor& col, const Tensor& t_row_ptr, const Tensor& t_col, const Tensor& t_perm,
                     const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                     int64_t groups, const std::string& isa, const std::optional<Tensor>& form) {
  const Device device("masked_conv2d", x, isa);
  const Conv2dShape s = conv2d_shape(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups);
  Tensor out = device.empty_image({s.batch, s.out_channels, s.out_height, s.out_width});
  if (out.numel() != 0)
    device.masked_conv2d(s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm), image_view(x), Weights(values, bias),
                         image_view(out), form);
  return out;
}

template <class Device>
Gradients masked_conv2d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                                 const Tensor& col, const Tensor& t_row_ptr, const Tensor& t_col, const Tensor& t_perm,
                                 const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                                 int64_t groups, const std::vector<bool>& output_mask, const std::string& isa,
                                 const std::optional<Tensor>& form) {
  const Device device("masked_conv2d_backward", x, isa);
  const Conv2dShape s = conv2d_shape(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups);
  const Tensor grad_x =
      output_mask[0] ? device.empty_image({s.batch, s.in_channels, s.height, s.width}) : device.empty({0});
  const auto compute = [&](const WeightGradients& to) {
    const ImageView grad_x_view = grad_x.numel() ? image_view(grad_x) : ImageView{};
    device.masked_conv2d_backward(s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm), image_view(grad_out),
                                  image_view(x), Weights(values, std::nullopt), grad_x.numel() ? &grad_x_view : nullptr,
                                  to, form);
  };
  return gradients(device, grad_out, grad_x, col.numel(), s.out_channels, output_mask, compute);
}

}  // namespace ilnas
