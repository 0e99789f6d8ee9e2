#include "torch/cuda_call.h"

namespace ilnas {
namespace {

// (index int64 [k], grad float32 [k], non_finite int64 [1])
std::tuple<Tensor, Tensor, Tensor> absent_topk(const Tensor& x, const Tensor& grad_out, const Tensor& row_ptr,
                                               const Tensor& col, int64_t k, const Ints& kernel_size,
                                               const Ints& stride, const Ints& padding, const Ints& dilation,
                                               int64_t groups, bool by_kernel, double floor, const std::string& isa) {
  const Conv2dShape s = conv2d_shape(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups);
  const DType dtype = cuda_dtype_of("absent_topk", x);
  check_extents("absent_topk", s);
  Tensor index = torch::stable::new_empty(row_ptr, {k}, ScalarType::Long);
  Tensor grad = torch::stable::new_empty(row_ptr, {k}, ScalarType::Float);
  Tensor non_finite = torch::stable::new_empty(row_ptr, {1}, ScalarType::Long);
  const TopkQuery query{k,
                        by_kernel,
                        static_cast<float>(floor),
                        index.mutable_data_ptr<int64_t>(),
                        grad.mutable_data_ptr<float>(),
                        non_finite.mutable_data_ptr<int64_t>()};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream("absent_topk", x);
  int64_t bytes = 0;
  check_status("absent_topk", isa, cuda::absent_topk_workspace(s, k, by_kernel, &bytes));
  const Tensor workspace = cuda_workspace(x, bytes);
  check_status("absent_topk", isa,
               cuda::launch_absent_topk(dtype, s, pattern_view(row_ptr, col), image_view(grad_out), image_view(x),
                                        query, workspace.data_ptr(), stream));
  return {index, grad, non_finite};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ilnas, CUDA, m) { m.impl("absent_topk", TORCH_BOX(&absent_topk)); }

}  // namespace ilnas
