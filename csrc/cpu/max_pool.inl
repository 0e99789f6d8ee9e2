// 2x2 max pooling with stride 2 of batch-last images [channels, height, width, batch].
#pragma once
#include "cpu/call.h"
#include "cpu/kernels.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// NaN if either is.
template <class T>
inline T greater(T a, T b) {
  const T most = a > b ? a : b;
  return a != a ? a : most;
}

template <class T>
void max_pool_channel(const MaxPool& p, int64_t channel) {
  const int64_t batch = p.batch, row = p.width * batch, out_height = p.height / 2, out_width = p.width / 2;
  const T* x = static_cast<const T*>(p.x) + channel * p.height * row;
  T* out = static_cast<T*>(p.out) + channel * out_height * out_width * batch;
  for (int64_t h = 0; h < out_height; ++h)
    for (int64_t w = 0; w < out_width; ++w, out += batch) {
      const T* above = x + 2 * h * row + 2 * w * batch;
      const T* below = above + row;
#pragma GCC ivdep
      for (int64_t n = 0; n < batch; ++n)
        out[n] = greater(greater(above[n], above[batch + n]), greater(below[n], below[batch + n]));
    }
}

// The gradient goes to the first of the largest, as in torch; rows and columns beyond the last window get 0.
template <class T>
void max_pool_backward_channel(const MaxPoolBackward& p, int64_t channel) {
  const int64_t batch = p.batch, row = p.width * batch, out_height = p.height / 2, out_width = p.width / 2;
  const T* x = static_cast<const T*>(p.x) + channel * p.height * row;
  const T* grad = static_cast<const T*>(p.grad_out) + channel * out_height * out_width * batch;
  T* to = static_cast<T*>(p.grad_x) + channel * p.height * row;
  for (int64_t h = 0; h < out_height; ++h) {
    for (int64_t w = 0; w < out_width; ++w, grad += batch) {
      const int64_t first = 2 * h * row + 2 * w * batch;
      const T *a = x + first, *b = a + batch, *c = a + row, *d = c + batch;
      T *grad_a = to + first, *grad_b = grad_a + batch, *grad_c = grad_a + row, *grad_d = grad_c + batch;
#pragma GCC ivdep
      for (int64_t n = 0; n < batch; ++n) {
        const T most = greater(greater(a[n], b[n]), greater(c[n], d[n]));
        const T after_a = a[n] == most ? T(0) : grad[n];
        const T after_b = b[n] == most ? T(0) : after_a;
        grad_a[n] = a[n] == most ? grad[n] : T(0);
        grad_b[n] = b[n] == most ? after_a : T(0);
        grad_c[n] = c[n] == most ? after_b : T(0);
        grad_d[n] = c[n] == most ? T(0) : after_b;
      }
    }
    for (int64_t r = 2 * h; r < 2 * h + 2; ++r)
      for (int64_t i = r * row + 2 * out_width * batch; i < (r + 1) * row; ++i) to[i] = T(0);
  }
  for (int64_t i = 2 * out_height * row; i < p.height * row; ++i) to[i] = T(0);
}

void max_pool(DType dtype, const MaxPool& p, const Parallel& parallel) {
  parallel_for(parallel, p.channels, [&](int64_t channel) {
    dtype == DType::kFloat64 ? max_pool_channel<double>(p, channel) : max_pool_channel<float>(p, channel);
  });
}

void max_pool_backward(DType dtype, const MaxPoolBackward& p, const Parallel& parallel) {
  parallel_for(parallel, p.channels, [&](int64_t channel) {
    dtype == DType::kFloat64 ? max_pool_backward_channel<double>(p, channel)
                             : max_pool_backward_channel<float>(p, channel);
  });
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
