// One SIMD register of T for the instruction set this translation unit is compiled for.
//
// The including file defines ILNAS_ISA (avx512, avx2 or baseline) and switches the compiler to it
// before any include; every name below lives in a namespace of that name, so one binary holds all sets.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "cpu/storage.h"

namespace ilnas {
namespace ILNAS_ISA {

// Operators stand outside the classes: GCC compiles friends defined in a class for the command line's target, not for
// the one that a pragma set.
template <class T>
struct Vec;

#if defined(ILNAS_ISA_AVX512)

template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set1(float a) { return {_mm512_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm512_load_ps(p)}; }
  static Vec loadu(const float* p) { return {_mm512_loadu_ps(p)}; }
  // The first n lanes from memory, zeros behind them; memory behind them is not touched.
  static Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  void store(float* p) const { _mm512_store_ps(p, v); }
  void storeu(float* p) const { _mm512_storeu_ps(p, v); }
  void store_first(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  float sum() const { return _mm512_reduce_add_ps(v); }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

template <>
struct Vec<double> {
  static constexpr int lanes = 8;
  __m512d v;
  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec set1(double a) { return {_mm512_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm512_load_pd(p)}; }
  static Vec loadu(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load_first(const double* p, int n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  void store(double* p) const { _mm512_store_pd(p, v); }
  void storeu(double* p) const { _mm512_storeu_pd(p, v); }
  void store_first(double* p, int n) const { _mm512_mask_storeu_pd(p, first(n), v); }
  static __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1); }
  double sum() const { return _mm512_reduce_add_pd(v); }
};
inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

#elif defined(ILNAS_ISA_AVX2)

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float a) { return {_mm256_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm256_load_ps(p)}; }
  static Vec loadu(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_first(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
  void store(float* p) const { _mm256_store_ps(p, v); }
  void storeu(float* p) const { _mm256_storeu_ps(p, v); }
  void store_first(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

template <>
struct Vec<double> {
  static constexpr int lanes = 4;
  __m256d v;
  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec set1(double a) { return {_mm256_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm256_load_pd(p)}; }
  static Vec loadu(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load_first(const double* p, int n) { return {_mm256_maskload_pd(p, first(n))}; }
  void store(double* p) const { _mm256_store_pd(p, v); }
  void storeu(double* p) const { _mm256_storeu_pd(p, v); }
  void store_first(double* p, int n) const { _mm256_maskstore_pd(p, first(n), v); }
  static __m256i first(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
  double sum() const {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
};
inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }

#else

// 16 bytes: every 64-bit processor has registers of that size, and compilers turn these loops into them.
template <class T>
struct Vec {
  static constexpr int lanes = 16 / sizeof(T);
  T v[lanes];
  static Vec zero() { return set1(T(0)); }
  static Vec set1(T a) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = a;
    return r;
  }
  static Vec load(const T* p) { return loadu(p); }
  static Vec loadu(const T* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static Vec load_first(const T* p, int n) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = i < n ? p[i] : T(0);
    return r;
  }
  void store(T* p) const { storeu(p); }
  void storeu(T* p) const { std::memcpy(p, v, sizeof v); }
  void store_first(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  friend Vec operator+(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  friend Vec operator*(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a.v[i] *= b.v[i];
    return a;
  }
  friend Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < lanes; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  T sum() const {
    T s = v[0];
    for (int i = 1; i < lanes; ++i) s += v[i];
    return s;
  }
};

#endif

}  // namespace ILNAS_ISA
}  // namespace ilnas
