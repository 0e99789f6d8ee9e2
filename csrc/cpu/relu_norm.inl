// Batch normalisation of a ReLU, y = (relu(x) - mean) / sqrt(variance + eps) * weight + bias, for channels whose values
// lie side by side: [channels, length], which is a batch-last batch.
#pragma once
#include <math.h>

#include "cpu/call.h"
#include "cpu/convert.inl"
#include "cpu/kernels.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// relu(x), and g where x is above 0; a NaN in x stays, as in torch.
#if defined(ILNAS_ISA_AVX512)
inline Vec<float> relu(Vec<float> x) { return {_mm512_max_ps(_mm512_setzero_ps(), x.v)}; }
inline Vec<double> relu(Vec<double> x) { return {_mm512_max_pd(_mm512_setzero_pd(), x.v)}; }
inline Vec<float> where_positive(Vec<float> x, Vec<float> g) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NLE_UQ), g.v)};
}
inline Vec<double> where_positive(Vec<double> x, Vec<double> g) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x.v, _mm512_setzero_pd(), _CMP_NLE_UQ), g.v)};
}
#elif defined(ILNAS_ISA_AVX2)
inline Vec<float> relu(Vec<float> x) { return {_mm256_max_ps(_mm256_setzero_ps(), x.v)}; }
inline Vec<double> relu(Vec<double> x) { return {_mm256_max_pd(_mm256_setzero_pd(), x.v)}; }
inline Vec<float> where_positive(Vec<float> x, Vec<float> g) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NLE_UQ), g.v)};
}
inline Vec<double> where_positive(Vec<double> x, Vec<double> g) {
  return {_mm256_and_pd(_mm256_cmp_pd(x.v, _mm256_setzero_pd(), _CMP_NLE_UQ), g.v)};
}
#else
template <class A>
Vec<A> relu(Vec<A> x) {
  for (int i = 0; i < Vec<A>::lanes; ++i) x.v[i] = x.v[i] <= 0 ? A(0) : x.v[i];
  return x;
}
template <class A>
Vec<A> where_positive(Vec<A> x, Vec<A> g) {
  for (int i = 0; i < Vec<A>::lanes; ++i) g.v[i] = x.v[i] <= 0 ? A(0) : g.v[i];
  return g;
}
#endif

// So much of a channel is summed in the stored type's sums, before the parts are added up in double; the second look
// at it finds it in the first-level cache.
constexpr int64_t kNormChunk = 2048;
constexpr int kNormSums = 4;  // enough independent sums to hide the latency of an addition

// Calls f(first element, how many, number of the sum) for every register of [begin, end).
template <class A, class F>
ILNAS_INLINE void for_registers(int64_t begin, int64_t end, const F& f) {
  constexpr int lanes = Vec<A>::lanes;
  int64_t i = begin;
  for (; i + kNormSums * lanes <= end; i += kNormSums * lanes)
#pragma GCC unroll 4
    for (int u = 0; u < kNormSums; ++u) f(i + u * lanes, lanes, u);
  for (; i < end; i += lanes) f(i, static_cast<int>(end - i < lanes ? end - i : lanes), 0);
}

template <class S>
ILNAS_INLINE Vec<Sum<S>> load_up_to(const S* p, int n) {
  return n == Vec<Sum<S>>::lanes ? load_widened(p) : load_first_widened(p, n);
}
template <class S>
ILNAS_INLINE void store_up_to(Vec<Sum<S>> v, S* p, int n) {
  n == Vec<Sum<S>>::lanes ? store_narrowed(v, p) : store_first_narrowed(v, p, n);
}

// v with zeros from lane n on.
template <class A>
ILNAS_INLINE Vec<A> first_lanes(Vec<A> v, int n) {
  if (n == Vec<A>::lanes) return v;
  A a[Vec<A>::lanes];
  v.storeu(a);
  return Vec<A>::load_first(a, n);
}

template <class A>
ILNAS_INLINE double total(const Vec<A> (&sums)[kNormSums]) {
  return double((sums[0] + sums[1] + (sums[2] + sums[3])).sum());
}

struct Moments {
  double mean, squares;  // sum of squared distances from the mean
};

// Chunk by chunk, merged as in Chan, Golub and LeVeque (1979): no difference of large sums.
template <class S>
Moments relu_moments(const S* x, int64_t length) {
  using A = Sum<S>;
  using V = Vec<A>;
  Moments all{0, 0};
  for (int64_t begin = 0; begin < length; begin += kNormChunk) {
    const int64_t end = begin + kNormChunk < length ? begin + kNormChunk : length;
    V sums[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for_registers<A>(begin, end, [&](int64_t i, int n, int u) { sums[u] = sums[u] + relu(load_up_to(x + i, n)); });
    const double mean = total(sums) / double(end - begin);
    const V shift = V::set1(static_cast<A>(-mean));
    V squares[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for_registers<A>(begin, end, [&](int64_t i, int n, int u) {
      const V distance = first_lanes(relu(load_up_to(x + i, n)) + shift, n);
      squares[u] = fma(distance, distance, squares[u]);
    });
    const double difference = mean - all.mean, share = double(end - begin) / double(end);
    all.mean += difference * share;
    all.squares += total(squares) + difference * difference * double(begin) * share;
  }
  return all;
}

template <class S>
void relu_norm_channel(const ReluNorm& r, int64_t channel) {
  using A = Sum<S>;
  using V = Vec<A>;
  const S* x = static_cast<const S*>(r.x) + channel * r.length;
  S* out = static_cast<S*>(r.out) + channel * r.length;
  A *running_mean = static_cast<A*>(r.running_mean) + channel, *running_var = static_cast<A*>(r.running_var) + channel;
  double mean = double(*running_mean), variance = double(*running_var);
  if (r.training) {
    const Moments m = relu_moments(x, r.length);
    const double keep = 1 - r.momentum;
    mean = m.mean, variance = m.squares / double(r.length);
    *running_mean = static_cast<A>(keep * double(*running_mean) + r.momentum * mean);
    *running_var =
        static_cast<A>(keep * double(*running_var) + r.momentum * m.squares / double(r.length > 1 ? r.length - 1 : 1));
  }
  const double inverse_std = 1 / __builtin_sqrt(variance + r.eps);
  static_cast<A*>(r.mean)[channel] = static_cast<A>(mean);
  static_cast<A*>(r.inverse_std)[channel] = static_cast<A>(inverse_std);
  const double scale = inverse_std * double(static_cast<const A*>(r.weight)[channel]);
  const V shift = V::set1(static_cast<A>(-mean)), factor = V::set1(static_cast<A>(scale));
  const V offset = V::set1(static_cast<const A*>(r.bias)[channel]);
  for_registers<A>(0, r.length, [&](int64_t i, int n, int) {
    store_up_to(fma(relu(load_up_to(x + i, n)) + shift, factor, offset), out + i, n);
  });
}

template <class S>
void relu_norm_backward_channel(const ReluNormBackward& r, int64_t channel) {
  using A = Sum<S>;
  using V = Vec<A>;
  const S* x = static_cast<const S*>(r.x) + channel * r.length;
  const S* grad_out = static_cast<const S*>(r.grad_out) + channel * r.length;
  S* grad_x = static_cast<S*>(r.grad_x) + channel * r.length;
  const double mean = double(static_cast<const A*>(r.mean)[channel]);
  const double inverse_std = double(static_cast<const A*>(r.inverse_std)[channel]);
  const V shift = V::set1(static_cast<A>(-mean));
  double grad_sum = 0, product_sum = 0;  // of g and of g * (relu(x) - mean)
  for (int64_t begin = 0; begin < r.length; begin += kNormChunk) {
    const int64_t end = begin + kNormChunk < r.length ? begin + kNormChunk : r.length;
    V grads[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
    V products[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for_registers<A>(begin, end, [&](int64_t i, int n, int u) {
      const V g = load_up_to(grad_out + i, n);
      grads[u] = grads[u] + g;
      products[u] = fma(g, relu(load_up_to(x + i, n)) + shift, products[u]);
    });
    grad_sum += total(grads), product_sum += total(products);
  }
  static_cast<A*>(r.grad_weight)[channel] = static_cast<A>(product_sum * inverse_std);
  static_cast<A*>(r.grad_bias)[channel] = static_cast<A>(grad_sum);
  // Where x is above 0: grad_x = scale * (g - mean of g - (relu(x) - mean) * slope).
  const double scale = inverse_std * double(static_cast<const A*>(r.weight)[channel]);
  const double slope = r.training ? product_sum * inverse_std * inverse_std / double(r.length) : 0;
  const double level = r.training ? grad_sum / double(r.length) : 0;
  const V factor = V::set1(static_cast<A>(scale)), incline = V::set1(static_cast<A>(-scale * slope));
  const V offset = V::set1(static_cast<A>(-scale * level));
  for_registers<A>(0, r.length, [&](int64_t i, int n, int) {
    const V value = load_up_to(x + i, n);
    const V g = fma(load_up_to(grad_out + i, n), factor, fma(relu(value) + shift, incline, offset));
    store_up_to(where_positive(value, g), grad_x + i, n);
  });
}

void relu_norm(DType dtype, const ReluNorm& r, const Parallel& parallel) {
  parallel_for(parallel, r.channels, [&](int64_t channel) {
    dtype == DType::kFloat64 ? relu_norm_channel<double>(r, channel) : relu_norm_channel<float>(r, channel);
  });
}

void relu_norm_backward(DType dtype, const ReluNormBackward& r, const Parallel& parallel) {
  parallel_for(parallel, r.channels, [&](int64_t channel) {
    dtype == DType::kFloat64 ? relu_norm_backward_channel<double>(r, channel)
                             : relu_norm_backward_channel<float>(r, channel);
  });
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
