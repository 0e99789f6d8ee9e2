// What every CUDA binding needs: device and stream of a call, workspaces, the route asked for, checks of the arguments.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <limits>
#include <string>

#include "cuda/kernels.h"
#include "torch/tensors.h"

namespace ilnas {

// The current stream of the tensor's device, which must be the current one.
inline cudaStream_t current_stream(const char* op, const Tensor& x) {
  int arch = 0;
  STD_CUDA_CHECK(cuda::compute_capability(&arch));
  STD_TORCH_CHECK(arch >= 75, op, ": the CUDA kernels need compute capability 7.5 or newer, device ",
                  x.get_device_index(), " has ", arch / 10, ".", arch % 10);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// From torch's allocator, so that it may be freed while the stream still uses it.
inline Tensor cuda_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
}

inline DType cuda_dtype_of(const char* op, const Tensor& x) {
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype != DType::kFloat64, op,
                  ": the CUDA kernels take x of float32, float16 or bfloat16, got float64");
  return dtype;
}

// `isa` names a route on CUDA; a name of a CPU instruction set leaves the choice to the kernels.
inline cuda::Route route_named(const std::string& isa) {
  if (isa == "general") return cuda::Route::kGeneral;
  if (isa == "direct") return cuda::Route::kDirect;
  if (isa == "condensed") return cuda::Route::kCondensed;
  return cuda::Route::kBest;
}

// Kernels count pixels and channels in 32 bits and elements in 64.
inline void check_extents(const char* op, const Conv2dShape& s) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / 4;
  const auto reach = [](int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
    return out * stride + kernel * dilation;
  };
  for (const int64_t extent :
       {s.height, s.width, s.in_channels, s.out_channels, s.out_height, s.out_width, s.kernel_height * s.kernel_width,
        s.pad_top, s.pad_left, reach(s.out_height, s.stride_height, s.kernel_height, s.dilation_height),
        reach(s.out_width, s.stride_width, s.kernel_width, s.dilation_width)})
    STD_TORCH_CHECK(extent <= most, op, ": the CUDA kernels take extents of at most ", most, ", got ", extent);
}

inline void check_status(const char* op, const std::string& isa, cudaError_t error) {
  STD_TORCH_CHECK(error != cudaErrorNotSupported, op, ": the route '", isa, "'",
                  " does not serve this shape, dtype or device");
  STD_CUDA_CHECK(error);
}

// A linear layer is a 1x1 convolution over 1x1 images.
inline Conv2dShape linear_shape(int64_t batch, int64_t in_features, int64_t out_features) {
  return {batch, in_features, 1, 1, out_features, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
}
inline ImageView linear_view(const Tensor& t) {
  const MatrixView v = matrix_view(t);
  return {v.data, v.row_stride, v.col_stride, 0, 0};
}

// One layer's operands, as the launchers take them.
struct CudaOperands {
  const char* op;
  const std::string& isa;
  DType dtype;
  Conv2dShape shape;
  PatternView pattern;
};

// values and bias contiguous; `like` tells where workspaces live.
inline void cuda_forward(const CudaOperands& o, const Tensor& like, const ImageView& x, const Tensor& values,
                         const std::optional<Tensor>& bias, const ImageView& out) {
  check_extents(o.op, o.shape);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(o.op, like);
  const Tensor packed = torch::stable::contiguous(values);
  const std::optional<Tensor> offset = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const cuda::Route route = route_named(o.isa);
  int64_t bytes = 0;
  check_status(o.op, o.isa,
               cuda::masked_conv2d_workspace(route, o.dtype, o.shape, o.pattern.nnz, /*backward=*/false, &bytes));
  const Tensor workspace = cuda_workspace(like, bytes);
  check_status(o.op, o.isa,
               cuda::launch_masked_conv2d(route, o.dtype, o.shape, o.pattern, x, packed.data_ptr(),
                                          offset ? offset->data_ptr() : nullptr, out, workspace.data_ptr(), stream));
}

// A gradient whose pointer is null is not computed.
inline void cuda_backward(const CudaOperands& o, const Tensor& like, const ImageView& grad_out, const ImageView& x,
                          const Tensor& values, const ImageView* grad_x, void* grad_values, void* grad_bias) {
  check_extents(o.op, o.shape);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(o.op, like);
  const cuda::Route route = route_named(o.isa);
  int64_t bytes = 0;
  if (grad_x != nullptr) {
    const Tensor packed = torch::stable::contiguous(values);
    check_status(o.op, o.isa,
                 cuda::masked_conv2d_workspace(route, o.dtype, o.shape, o.pattern.nnz, /*backward=*/true, &bytes));
    const Tensor workspace = cuda_workspace(like, bytes);
    check_status(o.op, o.isa,
                 cuda::launch_masked_conv2d_grad_x(route, o.dtype, o.shape, o.pattern, grad_out, packed.data_ptr(),
                                                   *grad_x, workspace.data_ptr(), stream));
  }
  if (grad_values != nullptr) {
    check_status(o.op, o.isa,
                 cuda::masked_conv2d_grad_values_workspace(route, o.dtype, o.shape, o.pattern.nnz, &bytes));
    const Tensor workspace = cuda_workspace(like, bytes);
    check_status(o.op, o.isa,
                 cuda::launch_masked_conv2d_grad_values(route, o.dtype, o.shape, o.pattern, grad_out, x, grad_values,
                                                        workspace.data_ptr(), stream));
  }
  if (grad_bias != nullptr) {
    const Tensor workspace = cuda_workspace(like, cuda::grad_bias_workspace(o.shape));
    check_status(o.op, o.isa,
                 cuda::launch_grad_bias(o.dtype, o.shape, grad_out, grad_bias, workspace.data_ptr(), stream));
  }
}

}  // namespace ilnas
