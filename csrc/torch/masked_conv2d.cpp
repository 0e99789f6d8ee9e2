#include "torch/tensors.h"

namespace ilnas {
namespace {

Tensor masked_conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& row_ptr,
                     const Tensor& col, const Tensor& t_row_ptr, const Tensor& t_col, const Tensor& t_perm,
                     const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                     int64_t groups, const std::string& isa) {
  const Conv2dShape s = conv2d_shape(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups);
  Tensor out = empty_in_layout(x, {s.batch, s.out_channels, s.out_height, s.out_width}, layout_of(x));
  if (out.numel() == 0) return out;
  const Tensor packed = torch::stable::contiguous(values);
  const std::optional<Tensor> offset = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  kernels_named(isa).masked_conv2d(dtype_of(x), s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm), image_view(x),
                                   packed.data_ptr(), offset ? offset->data_ptr() : nullptr, image_view(out),
                                   torch_parallel());
  return out;
}

// A gradient that output_mask leaves out is an empty tensor.
std::tuple<Tensor, Tensor, Tensor> masked_conv2d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& values,
                                                          const Tensor& row_ptr, const Tensor& col,
                                                          const Tensor& t_row_ptr, const Tensor& t_col,
                                                          const Tensor& t_perm, const Ints& kernel_size,
                                                          const Ints& stride, const Ints& padding, const Ints& dilation,
                                                          int64_t groups, const std::vector<bool>& output_mask,
                                                          const std::string& isa) {
  const Conv2dShape s = conv2d_shape(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups);
  Tensor grad_x = output_mask[0] ? empty_in_layout(x, {s.batch, s.in_channels, s.height, s.width}, layout_of(x))
                                 : torch::stable::new_empty(x, {0});
  Tensor grad_values = torch::stable::new_empty(x, {output_mask[1] ? col.numel() : 0});
  Tensor grad_bias = torch::stable::new_empty(x, {output_mask[2] ? s.out_channels : 0});
  if (grad_out.numel() == 0) {
    torch::stable::zero_(grad_x), torch::stable::zero_(grad_values), torch::stable::zero_(grad_bias);
    return {grad_x, grad_values, grad_bias};
  }
  const Tensor packed = torch::stable::contiguous(values);
  const ImageView grad_x_view = output_mask[0] ? image_view(grad_x) : ImageView{};
  kernels_named(isa).masked_conv2d_backward(dtype_of(x), s, pattern_view(row_ptr, col, t_row_ptr, t_col, t_perm),
                                            image_view(grad_out), image_view(x), packed.data_ptr(),
                                            output_mask[0] && grad_x.numel() ? &grad_x_view : nullptr,
                                            output_mask[1] ? grad_values.data_ptr() : nullptr,
                                            output_mask[2] ? grad_bias.data_ptr() : nullptr, torch_parallel());
  return {grad_x, grad_values, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ilnas, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
  m.impl("masked_conv2d_backward", TORCH_BOX(&masked_conv2d_backward));
}

}  // namespace ilnas
