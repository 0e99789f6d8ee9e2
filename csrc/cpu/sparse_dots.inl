// A sparse matrix times very few positions: one dot product per row and position, its x gathered by column.
#pragma once
#include "cpu/panels.inl"
#include "cpu/sparse_panels.inl"
#include "cpu/values.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// Up to this many positions the gathered dot product beats a vector of positions with most lanes empty.
constexpr int64_t dots_batch = 2;

template <class A>
A dot_at(const A* values, const int32_t* col, int64_t n, const A* x) {
  A sums[4] = {};
  int64_t j = 0;
  for (; j + 4 <= n; j += 4)
    for (int i = 0; i < 4; ++i) sums[i] += values[j + i] * x[col[j + i]];
  for (; j < n; ++j) sums[0] += values[j] * x[col[j]];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

#if defined(ILNAS_ISA_AVX512)
inline float dot_at(const float* values, const int32_t* col, int64_t n, const float* x) {
  __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    const __m512 xa = _mm512_i32gather_ps(_mm512_loadu_si512(col + j), x, 4);
    const __m512 xb = _mm512_i32gather_ps(_mm512_loadu_si512(col + j + 16), x, 4);
    a = _mm512_fmadd_ps(_mm512_loadu_ps(values + j), xa, a);
    b = _mm512_fmadd_ps(_mm512_loadu_ps(values + j + 16), xb, b);
  }
  for (; j < n; j += 16) {
    const __mmask16 live = static_cast<__mmask16>(n - j < 16 ? (1u << (n - j)) - 1 : 0xffffu);
    const __m512i at = _mm512_maskz_loadu_epi32(live, col + j);
    const __m512 xa = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), live, at, x, 4);
    a = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(live, values + j), xa, a);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(a, b));
}
#elif defined(ILNAS_ISA_AVX2)
inline float dot_at(const float* values, const int32_t* col, int64_t n, const float* x) {
  Vec<float> a = Vec<float>::zero(), b = Vec<float>::zero();
  int64_t j = 0;
  const auto gather = [&](int64_t at) -> Vec<float> {
    return {_mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(col + at)), 4)};
  };
  for (; j + 16 <= n; j += 16) {
    a = fma(Vec<float>::loadu(values + j), gather(j), a);
    b = fma(Vec<float>::loadu(values + j + 8), gather(j + 8), b);
  }
  for (; j + 8 <= n; j += 8) a = fma(Vec<float>::loadu(values + j), gather(j), a);
  float rest = 0;
  for (; j < n; ++j) rest += values[j] * x[col[j]];
  return (a + b).sum() + rest;
}
#endif

template <class S>
void sparse_dots(const SparseRows<Sum<S>>& w, const MatrixView& x, int64_t batch, const Sum<S>* bias,
                 const MatrixView& out, const Parallel& parallel) {
  using A = Sum<S>;
  const bool in_place = same_type<S, A> && x.col_stride == 1;
  Scratch scratch(in_place ? 0 : Scratch::size<A>(batch * w.features));
  A* copy = in_place ? nullptr : scratch.take<A>(batch * w.features);
  if (!in_place)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t f = 0; f < w.features; ++f)
        copy[b * w.features + f] = widen(static_cast<const S*>(x.data)[b * x.row_stride + f * x.col_stride]);
  parallel_for(parallel, parallel.threads, [&](int64_t thread) {
    const int64_t first = w.split(thread, parallel.threads), last = w.split(thread + 1, parallel.threads);
    for (int64_t r = first; r < last; ++r)
      for (int64_t b = 0; b < batch; ++b) {
        const A* row = in_place ? static_cast<const A*>(x.data) + b * x.row_stride : copy + b * w.features;
        const int64_t j = w.row_ptr[r];
        const A sum = dot_at(w.values + j, w.col + j, w.row_ptr[r + 1] - j, row);
        narrow(bias ? bias[r] + sum : sum, static_cast<S*>(out.data)[b * out.row_stride + r * out.col_stride]);
      }
  });
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
