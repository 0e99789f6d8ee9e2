#include "torch/tensors.h"

namespace ilnas {
namespace {

// (index int64 [k], grad float32 [k], non_finite int64 [1])
std::tuple<Tensor, Tensor, Tensor> absent_topk(const Tensor& x, const Tensor& grad_out, const Tensor& row_ptr,
                                               const Tensor& col, int64_t k, const Ints& kernel_size,
                                               const Ints& stride, const Ints& padding, const Ints& dilation,
                                               int64_t groups, bool by_kernel, double floor, const std::string& isa) {
  const int64_t in_per_group = x.size(1) / (groups > 0 ? groups : 1);
  STD_TORCH_CHECK((row_ptr.numel() - 1) * in_per_group * kernel_size[0] * kernel_size[1] <= int64_t{1} << 32,
                  "absent_topk: a weight of more than 2**32 elements cannot be ranked, got [", row_ptr.numel() - 1,
                  ", ", in_per_group, ", ", kernel_size[0], ", ", kernel_size[1], "]");
  Tensor index = torch::stable::new_empty(row_ptr, {k}, ScalarType::Long);
  Tensor grad = torch::stable::new_empty(row_ptr, {k}, ScalarType::Float);
  Tensor non_finite = torch::stable::new_empty(row_ptr, {1}, ScalarType::Long);
  const TopkQuery query{k,
                        by_kernel,
                        static_cast<float>(floor),
                        index.mutable_data_ptr<int64_t>(),
                        grad.mutable_data_ptr<float>(),
                        non_finite.mutable_data_ptr<int64_t>()};
  kernels_named(isa).absent_topk(
      dtype_of(x), conv2d_shape(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups),
      pattern_view(row_ptr, col), image_view(grad_out), image_view(x), query, torch_parallel());
  return {index, grad, non_finite};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ilnas, CPU, m) { m.impl("absent_topk", TORCH_BOX(&absent_topk)); }

}  // namespace ilnas
