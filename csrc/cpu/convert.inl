// Registers of sums loaded from and stored to memory of any stored type.
#pragma once
#include "cpu/vector.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

template <class S>
using Sum = typename Accumulator<S>::type;

template <class A>
Vec<A> load_widened(const A* p) {
  return Vec<A>::loadu(p);
}
template <class A>
void store_narrowed(Vec<A> v, A* p) {
  v.storeu(p);
}

#if defined(ILNAS_ISA_AVX512)
inline Vec<float> load_widened(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec<float> load_widened(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store_narrowed(Vec<float> v, Half* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(ILNAS_ISA_AVX2)
inline Vec<float> load_widened(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec<float> load_widened(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline void store_narrowed(Vec<float> v, Half* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec<float> load_widened(const Half* p) {
  float a[Vec<float>::lanes];
  for (int i = 0; i < Vec<float>::lanes; ++i) a[i] = widen(p[i]);
  return Vec<float>::loadu(a);
}
inline Vec<float> load_widened(const BFloat16* p) {
  float a[Vec<float>::lanes];
  for (int i = 0; i < Vec<float>::lanes; ++i) a[i] = widen(p[i]);
  return Vec<float>::loadu(a);
}
inline void store_narrowed(Vec<float> v, Half* p) {
  float a[Vec<float>::lanes];
  v.storeu(a);
  for (int i = 0; i < Vec<float>::lanes; ++i) narrow(a[i], p[i]);
}
#endif

inline void store_narrowed(Vec<float> v, BFloat16* p) {
  float a[Vec<float>::lanes];
  v.storeu(a);
  for (int i = 0; i < Vec<float>::lanes; ++i) narrow(a[i], p[i]);
}

// The first n lanes from memory, zeros behind them; memory behind them is not touched.
template <class A>
Vec<A> load_first_widened(const A* p, int n) {
  return Vec<A>::load_first(p, n);
}
template <class A>
void store_first_narrowed(Vec<A> v, A* p, int n) {
  v.store_first(p, n);
}
template <class S>
Vec<float> load_first_of_16_bits(const S* p, int n) {
  S whole[Vec<float>::lanes] = {};
  std::memcpy(whole, p, n * sizeof(S));
  return load_widened(whole);
}
template <class S>
void store_first_of_16_bits(Vec<float> v, S* p, int n) {
  S whole[Vec<float>::lanes];
  store_narrowed(v, whole);
  std::memcpy(p, whole, n * sizeof(S));
}
inline Vec<float> load_first_widened(const Half* p, int n) { return load_first_of_16_bits(p, n); }
inline Vec<float> load_first_widened(const BFloat16* p, int n) { return load_first_of_16_bits(p, n); }
inline void store_first_narrowed(Vec<float> v, Half* p, int n) { store_first_of_16_bits(v, p, n); }
inline void store_first_narrowed(Vec<float> v, BFloat16* p, int n) { store_first_of_16_bits(v, p, n); }

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
