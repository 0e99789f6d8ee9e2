// The operators on CUDA devices.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <limits>

#include "cuda/kernels.h"
#include "torch/absent_topk.h"
#include "torch/masked_conv2d.h"
#include "torch/masked_linear.h"

namespace ilnas {

// Begins as torch's own message does: programs look for that, and the Python side makes torch's error type of it.
void allocation_failed(const char* op, const Tensor& like, int64_t bytes) {
  size_t free = 0, total = 0;
  STD_CUDA_CHECK(cudaMemGetInfo(&free, &total));  // shows an earlier error that made the allocation fail
  STD_TORCH_CHECK(false, "CUDA out of memory. ", op, " tried to allocate ", bytes, " bytes on device ",
                  like.get_device_index(), ", where ", free, " of ", total, " bytes are free");
}

namespace {

// Kernels count pixels and channels in 32 bits and elements in 64.
void check_extents(const char* op, const Conv2dShape& s) {
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

// `isa` names a route on CUDA; a name of a CPU instruction set leaves the choice to the kernels.
cuda::Route route_named(const std::string& isa) {
  if (isa == "general") return cuda::Route::kGeneral;
  if (isa == "direct") return cuda::Route::kDirect;
  if (isa == "condensed") return cuda::Route::kCondensed;
  return cuda::Route::kBest;
}

// A linear layer is a 1x1 convolution over 1x1 images.
Conv2dShape as_convolution(const LinearShape& s) {
  return {s.batch, s.in_features, 1, 1, s.out_features, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
}
ImageView as_images(const MatrixView& v) { return {v.data, v.row_stride, v.col_stride, 0, 0}; }

// For the length of a call the device of `like` is the current one.
class OnDevice : public Allocator {
 public:
  OnDevice(const char* op, const Tensor& like) : Allocator(op, like), guard_(like.get_device_index()) {
    int arch = 0;
    STD_CUDA_CHECK(cuda::compute_capability(&arch));
    STD_TORCH_CHECK(arch >= 75, op, ": the CUDA kernels need compute capability 7.5 or newer, device ",
                    like.get_device_index(), " has ", arch / 10, ".", arch % 10);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  // From torch's allocator, so that it may be freed while the stream still uses it.
  Tensor workspace(int64_t bytes) const { return empty({std::max<int64_t>(bytes, 1)}, ScalarType::Byte); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

class Cuda : public OnDevice {
 public:
  Cuda(const char* op, const Tensor& x, const std::string& isa)
      : OnDevice(op, x), isa_(isa), route_(route_named(isa)), dtype_(dtype_of(x)) {
    STD_TORCH_CHECK(dtype_ != DType::kFloat64, op,
                    ": the CUDA kernels take x of float32, float16 or bfloat16, got float64");
  }

  void masked_conv2d(const Conv2dShape& s, const PatternView& pattern, const ImageView& x, const Weights& weights,
                     const ImageView& out, const std::optional<Tensor>& form) const {
    check_extents(op(), s);
    const void* const kept = kept_form(s, pattern, /*backward=*/false, form);
    int64_t bytes = 0;
    check(cuda::masked_conv2d_workspace(route_, dtype_, s, pattern.nnz, /*backward=*/false, kept != nullptr, &bytes));
    const Tensor space = workspace(bytes);
    check(cuda::launch_masked_conv2d(route_, dtype_, s, pattern, x, weights.values(), weights.bias(), out, kept,
                                     space.data_ptr(), stream()));
  }

  void masked_conv2d_backward(const Conv2dShape& s, const PatternView& pattern, const ImageView& grad_out,
                              const ImageView& x, const Weights& weights, const ImageView* grad_x,
                              const WeightGradients& to, const std::optional<Tensor>& form) const {
    check_extents(op(), s);
    int64_t bytes = 0;
    if (grad_x != nullptr) {
      const void* const kept = kept_form(s, pattern, /*backward=*/true, form);
      check(cuda::masked_conv2d_workspace(route_, dtype_, s, pattern.nnz, /*backward=*/true, kept != nullptr, &bytes));
      const Tensor space = workspace(bytes);
      check(cuda::launch_masked_conv2d_grad_x(route_, dtype_, s, pattern, grad_out, weights.values(), *grad_x, kept,
                                              space.data_ptr(), stream()));
    }
    if (to.values != nullptr) {
      check(cuda::masked_conv2d_grad_values_workspace(route_, dtype_, s, pattern.nnz, &bytes));
      const Tensor space = workspace(bytes);
      check(cuda::launch_masked_conv2d_grad_values(route_, dtype_, s, pattern, grad_out, x, to.values, space.data_ptr(),
                                                   stream()));
    }
    if (to.bias != nullptr) {
      const Tensor space = workspace(cuda::grad_bias_workspace(s));
      check(cuda::launch_grad_bias(dtype_, s, grad_out, to.bias, space.data_ptr(), stream()));
    }
  }

  void masked_linear(const LinearShape& s, const PatternView& pattern, const MatrixView& x, const Weights& weights,
                     const MatrixView& out, const std::optional<Tensor>& form) const {
    masked_conv2d(as_convolution(s), pattern, as_images(x), weights, as_images(out), form);
  }
  void masked_linear_backward(const LinearShape& s, const PatternView& pattern, const MatrixView& grad_out,
                              const MatrixView& x, const Weights& weights, const MatrixView* grad_x,
                              const WeightGradients& to, const std::optional<Tensor>& form) const {
    const ImageView grad_x_images = grad_x != nullptr ? as_images(*grad_x) : ImageView{};
    masked_conv2d_backward(as_convolution(s), pattern, as_images(grad_out), as_images(x), weights,
                           grad_x != nullptr ? &grad_x_images : nullptr, to, form);
  }

  void absent_topk(const Conv2dShape& s, const PatternView& blocked, const ImageView& grad_out, const ImageView& x,
                   const TopkQuery& query) const {
    check_extents(op(), s);
    int64_t bytes = 0;
    check(cuda::absent_topk_workspace(s, query.k, query.by_kernel, &bytes));
    const Tensor space = workspace(bytes);
    check(cuda::launch_absent_topk(dtype_, s, blocked, grad_out, x, query, space.data_ptr(), stream()));
  }

 private:
  // Null where the operator builds its own.
  const void* kept_form(const Conv2dShape& s, const PatternView& pattern, bool backward,
                        const std::optional<Tensor>& form) const {
    if (!form || form->numel() == 0) return nullptr;
    int64_t bytes = 0;
    check(cuda::condensed_form_bytes(s, pattern.nnz, backward, &bytes));
    STD_TORCH_CHECK(form->numel() == bytes, op(), ": form was built for another shape or pattern: it has ",
                    form->numel(), " bytes, not ", bytes);
    return form->data_ptr();
  }

  void check(cudaError_t error) const {
    STD_TORCH_CHECK(error != cudaErrorNotSupported, op(), ": the route '", isa_,
                    "' does not serve this shape, dtype or device");
    STD_CUDA_CHECK(error);
  }

  const std::string& isa_;
  cuda::Route route_;
  DType dtype_;
};

// What the tensor-core kernels derive from a pattern and the size of the input; empty where they do not serve it.
Tensor condensed_form(const Tensor& row_ptr, const Tensor& col, const Ints& x_size, int64_t out_channels,
                      const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                      int64_t groups, bool backward) {
  const OnDevice device("condensed_form", row_ptr);
  const Conv2dShape s = conv2d_shape(x_size, out_channels, kernel_size, stride, padding, dilation, groups);
  check_extents("condensed_form", s);
  int64_t bytes = 0;
  const cudaError_t error = cuda::condensed_form_bytes(s, col.numel(), backward, &bytes);
  if (error == cudaErrorNotSupported) return device.empty({0}, ScalarType::Byte);
  STD_CUDA_CHECK(error);
  Tensor form = device.workspace(bytes);
  const int32_t *const rows = row_ptr.const_data_ptr<int32_t>(), *const cols = col.const_data_ptr<int32_t>();
  const PatternView pattern = backward ? PatternView{nullptr, nullptr, rows, cols, nullptr, col.numel()}
                                       : PatternView{rows, cols, nullptr, nullptr, nullptr, col.numel()};
  STD_CUDA_CHECK(cuda::launch_condensed_form(s, pattern, backward, form.data_ptr(), device.stream()));
  return form;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ilnas, CUDA, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d<Cuda>));
  m.impl("masked_conv2d_backward", TORCH_BOX(&masked_conv2d_backward<Cuda>));
  m.impl("masked_linear", TORCH_BOX(&masked_linear<Cuda>));
  m.impl("masked_linear_backward", TORCH_BOX(&masked_linear_backward<Cuda>));
  m.impl("absent_topk", TORCH_BOX(&absent_topk<Cuda>));
  m.impl("condensed_form", TORCH_BOX(&condensed_form));
}

}  // namespace ilnas
