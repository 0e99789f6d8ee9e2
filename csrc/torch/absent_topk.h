#pragma once
#include "torch/operands.h"

namespace ilnas {

// (index int64 [k], grad float32 [k], non_finite int64 [1])
template <class Device>
std::tuple<Tensor, Tensor, Tensor> absent_topk(const Tensor& x, const Tensor& grad_out, const Tensor& row_ptr,
                                               const Tensor& col, int64_t k, const Ints& kernel_size,
                                               const Ints& stride, const Ints& padding, const Ints& dilation,
                                               int64_t groups, bool by_kernel, double floor, const std::string& isa) {
  const Device device("absent_topk", x, isa);
  const Conv2dShape s = conv2d_shape(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups);
  Tensor index = device.empty({k}, ScalarType::Long);
  Tensor grad = device.empty({k}, ScalarType::Float);
  Tensor non_finite = device.empty({1}, ScalarType::Long);
  const TopkQuery query{k,
                        by_kernel,
                        static_cast<float>(floor),
                        index.mutable_data_ptr<int64_t>(),
                        grad.mutable_data_ptr<float>(),
                        non_finite.mutable_data_ptr<int64_t>()};
  device.absent_topk(s, pattern_view(row_ptr, col), image_view(grad_out), image_view(x), query);
  return {index, grad, non_finite};
}

}  // namespace ilnas
