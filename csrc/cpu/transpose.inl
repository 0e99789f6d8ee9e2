// Square blocks of registers turned over: lane i of register k goes to lane k of register i.
#pragma once
#include "cpu/vector.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

template <class A>
void transpose(Vec<A> (&r)[Vec<A>::lanes]) {
  constexpr int lanes = Vec<A>::lanes;
  alignas(64) A a[lanes][lanes];
  for (int i = 0; i < lanes; ++i) r[i].storeu(a[i]);
  for (int i = 0; i < lanes; ++i)
    for (int k = 0; k < i; ++k) {
      const A held = a[i][k];
      a[i][k] = a[k][i], a[k][i] = held;
    }
  for (int i = 0; i < lanes; ++i) r[i] = Vec<A>::loadu(a[i]);
}

#if defined(ILNAS_ISA_AVX512)

// Pairs, then quadruples, then 128-bit parts, then halves change places.
inline void transpose(Vec<float> (&r)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const __m512d a0 = _mm512_castps_pd(a[i]), a1 = _mm512_castps_pd(a[i + 1]);
    const __m512d a2 = _mm512_castps_pd(a[i + 2]), a3 = _mm512_castps_pd(a[i + 3]);
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a0, a2));
    b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a0, a2));
    b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(a1, a3));
    b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(a1, a3));
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), high = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(low, low2, 0x88);
    r[i + 4].v = _mm512_shuffle_f32x4(high, high2, 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(low, low2, 0xdd);
    r[i + 12].v = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}

inline void transpose(Vec<double> (&r)[8]) {
  __m512d a[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm512_unpacklo_pd(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_pd(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    const __m512d low = _mm512_shuffle_f64x2(a[i], a[i + 2], 0x88), high = _mm512_shuffle_f64x2(a[i], a[i + 2], 0xdd);
    const __m512d low2 = _mm512_shuffle_f64x2(a[i + 4], a[i + 6], 0x88);
    const __m512d high2 = _mm512_shuffle_f64x2(a[i + 4], a[i + 6], 0xdd);
    r[i].v = _mm512_shuffle_f64x2(low, low2, 0x88);
    r[i + 2].v = _mm512_shuffle_f64x2(high, high2, 0x88);
    r[i + 4].v = _mm512_shuffle_f64x2(low, low2, 0xdd);
    r[i + 6].v = _mm512_shuffle_f64x2(high, high2, 0xdd);
  }
}

#elif defined(ILNAS_ISA_AVX2)

inline void transpose(Vec<float> (&r)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

inline void transpose(Vec<double> (&r)[4]) {
  const __m256d a0 = _mm256_unpacklo_pd(r[0].v, r[1].v), a1 = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d a2 = _mm256_unpacklo_pd(r[2].v, r[3].v), a3 = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0].v = _mm256_permute2f128_pd(a0, a2, 0x20);
  r[1].v = _mm256_permute2f128_pd(a1, a3, 0x20);
  r[2].v = _mm256_permute2f128_pd(a0, a2, 0x31);
  r[3].v = _mm256_permute2f128_pd(a1, a3, 0x31);
}

#endif

// The sum over the lanes of each of eight registers.
template <class A>
void sum_lanes_of_8(const Vec<A> (&r)[8], A* sums) {
  for (int i = 0; i < 8; ++i) sums[i] = r[i].sum();
}

#if defined(ILNAS_ISA_AVX512)
inline void sum_lanes_of_8(const Vec<float> (&r)[8], float* sums) {
  __m512 pair[4], quad[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    pair[i] =
        _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v), _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // 128-bit parts: [q0 q0' q1 q1'] in order, so that adding the halves leaves sums 0..3 and 4..7.
  const __m512 both =
      _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
  const __m256 low = _mm512_castps512_ps256(both), high = _mm512_extractf32x8_ps(both, 1);
  const __m256 first = _mm256_permute2f128_ps(low, high, 0x20), second = _mm256_permute2f128_ps(low, high, 0x31);
  _mm256_storeu_ps(sums, _mm256_add_ps(first, second));
}
#elif defined(ILNAS_ISA_AVX2)
inline void sum_lanes_of_8(const Vec<float> (&r)[8], float* sums) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(r[0].v, r[1].v), _mm256_hadd_ps(r[2].v, r[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(r[4].v, r[5].v), _mm256_hadd_ps(r[6].v, r[7].v));
  _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
}
#endif

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
