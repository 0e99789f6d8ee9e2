// Tensors as the kernels see them: types, views, shapes.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace ilnas {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "ilnas: x must be float32, float64, float16 or bfloat16");
  }
}

// A new tensor of the given strides, otherwise like `like`.
inline Tensor empty_strided(const Tensor& like, const Ints& sizes, const Ints& strides) {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// The strides of a dimension of size 1 mean nothing; kernels may rely on 0 there.
inline ImageView image_view(const Tensor& t) {
  const auto stride = [&](int d) { return t.size(d) == 1 ? int64_t{0} : t.stride(d); };
  return {t.data_ptr(), stride(0), stride(1), stride(2), stride(3)};
}
inline MatrixView matrix_view(const Tensor& t) {
  const auto stride = [&](int d) { return t.size(d) == 1 ? int64_t{0} : t.stride(d); };
  return {t.data_ptr(), stride(0), stride(1)};
}

inline PatternView pattern_view(const Tensor& row_ptr, const Tensor& col) {
  return {row_ptr.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>(), nullptr, nullptr, nullptr, col.numel()};
}
inline PatternView pattern_view(const Tensor& row_ptr, const Tensor& col, const Tensor& t_row_ptr, const Tensor& t_col,
                                const Tensor& t_perm) {
  return {row_ptr.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>(),    t_row_ptr.const_data_ptr<int32_t>(),
          t_col.const_data_ptr<int32_t>(),   t_perm.const_data_ptr<int32_t>(), col.numel()};
}

// x_size [N, C, H, W]; padding is top, bottom, left, right.
inline Conv2dShape conv2d_shape(const Ints& x_size, int64_t out_channels, const Ints& kernel_size, const Ints& stride,
                                const Ints& padding, const Ints& dilation, int64_t groups) {
  Conv2dShape s{};
  s.batch = x_size[0], s.in_channels = x_size[1], s.height = x_size[2], s.width = x_size[3];
  s.out_channels = out_channels;
  s.kernel_height = kernel_size[0], s.kernel_width = kernel_size[1];
  s.stride_height = stride[0], s.stride_width = stride[1];
  s.pad_top = padding[0], s.pad_left = padding[2];
  s.dilation_height = dilation[0], s.dilation_width = dilation[1];
  s.groups = groups;
  s.out_height = (s.height + padding[0] + padding[1] - s.dilation_height * (s.kernel_height - 1) - 1) / stride[0] + 1;
  s.out_width = (s.width + padding[2] + padding[3] - s.dilation_width * (s.kernel_width - 1) - 1) / stride[1] + 1;
  return s;
}

inline Conv2dShape conv2d_shape(const Tensor& x, int64_t out_channels, const Ints& kernel_size, const Ints& stride,
                                const Ints& padding, const Ints& dilation, int64_t groups) {
  return conv2d_shape(Ints{x.size(0), x.size(1), x.size(2), x.size(3)}, out_channels, kernel_size, stride, padding,
                      dilation, groups);
}

}  // namespace ilnas
