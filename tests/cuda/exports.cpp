// The launchers with the plain arguments of the emulator's harness.
#include <vector>

#include "cuda/kernels.h"

using namespace ilnas;
using namespace ilnas::cuda;

namespace {

// batch, in_channels, height, width, out_channels, out_height, out_width, kernel_height, kernel_width, stride_height,
// stride_width, pad_top, pad_left, dilation_height, dilation_width, groups
Conv2dShape shape_of(const int64_t* v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]};
}
// batch, channel, row, col
ImageView view_of(const void* data, const int64_t* strides) {
  return {const_cast<void*>(data), strides[0], strides[1], strides[2], strides[3]};
}
PatternView pattern_of(const int32_t* row_ptr, const int32_t* col, const int32_t* perm, bool transposed, int64_t nnz) {
  if (transposed) return {nullptr, nullptr, row_ptr, col, perm, nnz};
  return {row_ptr, col, nullptr, nullptr, nullptr, nnz};
}

}  // namespace

extern "C" {

int form_bytes(const int64_t* shape, int64_t nnz, int64_t backward, int64_t* bytes) {
  return condensed_form_bytes(shape_of(shape), nnz, backward != 0, bytes);
}

int form(const int64_t* shape, int64_t backward, const int32_t* row_ptr, const int32_t* col, int64_t nnz,
         void* result) {
  const PatternView pattern = pattern_of(row_ptr, col, nullptr, backward != 0, nnz);
  return launch_condensed_form(shape_of(shape), pattern, backward != 0, result, nullptr);
}

int gather_workspace(int64_t route, int64_t dtype, const int64_t* shape, int64_t nnz, int64_t backward,
                     int64_t has_form, int64_t* bytes) {
  return masked_conv2d_workspace(static_cast<Route>(route), static_cast<DType>(dtype), shape_of(shape), nnz,
                                 backward != 0, has_form != 0, bytes);
}

int gather(int64_t route, int64_t dtype, int64_t backward, const int64_t* shape, const void* source,
           const int64_t* source_strides, const void* values, const void* bias, const int32_t* row_ptr,
           const int32_t* col, const int32_t* perm, int64_t nnz, void* target, const int64_t* target_strides,
           const void* form, void* workspace) {
  const PatternView pattern = pattern_of(row_ptr, col, perm, backward != 0, nnz);
  const ImageView from = view_of(source, source_strides), to = view_of(target, target_strides);
  const Route how = static_cast<Route>(route);
  const DType type = static_cast<DType>(dtype);
  if (backward != 0)
    return launch_masked_conv2d_grad_x(how, type, shape_of(shape), pattern, from, values, to, form, workspace, nullptr);
  return launch_masked_conv2d(how, type, shape_of(shape), pattern, from, values, bias, to, form, workspace, nullptr);
}

int grad_values_workspace(int64_t route, int64_t dtype, const int64_t* shape, int64_t nnz, int64_t* bytes) {
  return masked_conv2d_grad_values_workspace(static_cast<Route>(route), static_cast<DType>(dtype), shape_of(shape), nnz,
                                             bytes);
}

int grad_values(int64_t route, int64_t dtype, const int64_t* shape, const void* grad_out,
                const int64_t* grad_out_strides, const void* x, const int64_t* x_strides, const int32_t* row_ptr,
                const int32_t* col, int64_t nnz, void* result, void* workspace) {
  return launch_masked_conv2d_grad_values(static_cast<Route>(route), static_cast<DType>(dtype), shape_of(shape),
                                          pattern_of(row_ptr, col, nullptr, false, nnz),
                                          view_of(grad_out, grad_out_strides), view_of(x, x_strides), result, workspace,
                                          nullptr);
}

int bias_workspace(const int64_t* shape, int64_t* bytes) {
  *bytes = grad_bias_workspace(shape_of(shape));
  return 0;
}

int grad_bias(int64_t dtype, const int64_t* shape, const void* grad_out, const int64_t* strides, void* result,
              void* workspace) {
  return launch_grad_bias(static_cast<DType>(dtype), shape_of(shape), view_of(grad_out, strides), result, workspace,
                          nullptr);
}
}

extern "C" {

int topk_workspace(const int64_t* shape, int64_t k, int64_t by_kernel, int64_t* bytes) {
  return absent_topk_workspace(shape_of(shape), k, by_kernel != 0, bytes);
}

int topk(int64_t dtype, const int64_t* shape, const int32_t* row_ptr, const int32_t* col, int64_t nnz,
         const void* grad_out, const int64_t* grad_out_strides, const void* x, const int64_t* x_strides, int64_t k,
         int64_t by_kernel, float floor, int64_t* index, float* grad, int64_t* non_finite, void* workspace) {
  const TopkQuery query{k, by_kernel != 0, floor, index, grad, non_finite};
  return launch_absent_topk(static_cast<DType>(dtype), shape_of(shape), pattern_of(row_ptr, col, nullptr, false, nnz),
                            view_of(grad_out, grad_out_strides), view_of(x, x_strides), query, workspace, nullptr);
}
}
