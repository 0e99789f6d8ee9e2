// What the bindings of all devices share: operands as the kernels take them, results, memory.
//
// An operator is a template over a Device: an Allocator with the kernels of that device on raw pointers.
#pragma once
#include <tuple>

#include "torch/tensors.h"

namespace ilnas {

// Throws the error that names the operator and the bytes asked for; every extension module has its own.
[[noreturn]] void allocation_failed(const char* op, const Tensor& like, int64_t bytes);

// The order of dimensions in memory, outermost first, that a result takes over from its input.
inline const Ints& layout_of(const Tensor& image) {
  static const Ints nchw{0, 1, 2, 3}, nhwc{0, 2, 3, 1}, chwn{1, 2, 3, 0};
  const auto dense_in = [&](const Ints& order) {
    int64_t expected = 1;
    for (int i = 3; i >= 0; --i) {
      if (image.size(order[i]) != 1 && image.stride(order[i]) != expected) return false;
      expected *= image.size(order[i]);
    }
    return true;
  };
  if (dense_in(nchw)) return nchw;
  if (dense_in(nhwc)) return nhwc;
  if (dense_in(chwn)) return chwn;
  return nchw;
}

// New tensors on the device of `like`.
class Allocator {
 public:
  Allocator(const char* op, const Tensor& like) : op_(op), like_(like) {}

  Tensor empty(const Ints& sizes, std::optional<ScalarType> dtype = std::nullopt) const {
    return or_explain(sizes, [&] { return torch::stable::new_empty(like_, sizes, dtype); });
  }
  // [N, C, H, W] in the layout of `like`.
  Tensor empty_image(const Ints& sizes) const {
    Ints strides(4);
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
      const int64_t d = layout_of(like_)[i];
      strides[d] = stride;
      stride *= sizes[d];
    }
    return or_explain(sizes, [&] { return empty_strided(like_, sizes, strides); });
  }

 protected:
  const char* op() const { return op_; }
  const Tensor& like() const { return like_; }

 private:
  // The stable ABI tells that an allocation failed, but not that it failed for want of memory.
  template <class Allocate>
  Tensor or_explain(const Ints& sizes, const Allocate& allocate) const {
    try {
      return allocate();
    } catch (const std::exception&) {
      int64_t bytes = like_.element_size();
      for (const int64_t size : sizes) bytes *= size;
      allocation_failed(op_, like_, bytes);
    }
  }

  const char* op_;
  const Tensor& like_;
};

// grad_x, grad_values, grad_bias. A gradient that output_mask leaves out is an empty tensor.
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Packed values and bias, contiguous.
class Weights {
 public:
  Weights(const Tensor& values, const std::optional<Tensor>& bias)
      : values_(torch::stable::contiguous(values)),
        bias_(bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt) {}
  const void* values() const { return values_.data_ptr(); }
  const void* bias() const { return bias_ ? bias_->data_ptr() : nullptr; }

 private:
  Tensor values_;
  std::optional<Tensor> bias_;
};

// Where the gradients of the weights go; null where they are not wanted.
struct WeightGradients {
  void *values, *bias;
};

// The gradients, compute(weight gradients) having filled them; zeros where there is nothing to sum.
template <class Device, class Compute>
Gradients gradients(const Device& device, const Tensor& grad_out, Tensor grad_x, int64_t nnz, int64_t rows,
                    const std::vector<bool>& output_mask, const Compute& compute) {
  Tensor grad_values = device.empty({output_mask[1] ? nnz : 0});
  Tensor grad_bias = device.empty({output_mask[2] ? rows : 0});
  const auto pointer = [](const Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; };
  if (grad_out.numel() != 0)
    compute(WeightGradients{pointer(grad_values), pointer(grad_bias)});
  else
    torch::stable::zero_(grad_x), torch::stable::zero_(grad_values), torch::stable::zero_(grad_bias);
  return {grad_x, grad_values, grad_bias};
}

}  // namespace ilnas
