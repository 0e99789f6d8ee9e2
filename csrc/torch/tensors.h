// What every CPU binding needs: tensors to views, torch's thread pool, the instruction set asked for.
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

inline const Kernels& kernels_named(const std::string& isa) {
  InstructionSet set = best_instruction_set();
  if (!isa.empty()) {
    if (isa == "avx512")
      set = InstructionSet::kAvx512;
    else if (isa == "avx2")
      set = InstructionSet::kAvx2;
    else {
      STD_TORCH_CHECK(isa == "baseline", "ilnas: isa must be avx512, avx2 or baseline, got ", isa);
      set = InstructionSet::kBaseline;
    }
    STD_TORCH_CHECK(runs_here(set), "ilnas: isa ", isa, " is not compiled in or does not run on this processor");
  }
  return *kernels(set);
}

inline Parallel torch_parallel() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t tasks, void* context, void (*body)(void*, int64_t)) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(context, task);
            });
          }};
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

inline Tensor empty_in_layout(const Tensor& like, const Ints& sizes, const Ints& order) {
  Ints strides(4);
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    strides[order[i]] = stride;
    stride *= sizes[order[i]];
  }
  return empty_strided(like, sizes, strides);
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

// padding is top, bottom, left, right.
inline Conv2dShape conv2d_shape(const Tensor& x, int64_t out_channels, const Ints& kernel_size, const Ints& stride,
                                const Ints& padding, const Ints& dilation, int64_t groups) {
  Conv2dShape s{};
  s.batch = x.size(0), s.in_channels = x.size(1), s.height = x.size(2), s.width = x.size(3);
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

}  // namespace ilnas
