// Stores past the caches.
#pragma once
#include "cpu/convert.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// An output larger than this will not wait in the caches for its reader.
inline bool is_large(int64_t bytes) { return bytes > int64_t{4} << 20; }

// Where a register is a cache line, what is written once and read much later need not be fetched first.
template <class S>
constexpr bool can_stream() {
#if defined(ILNAS_ISA_AVX512)
  return sizeof(S) == sizeof(Sum<S>);
#else
  return false;
#endif
}
#if defined(ILNAS_ISA_AVX512)
inline void stream(Vec<float> v, float* p) { _mm512_stream_ps(p, v.v); }
inline void stream(Vec<double> v, double* p) { _mm512_stream_pd(p, v.v); }
#endif
template <class S>
void store_past_caches(Vec<Sum<S>> v, S* p) {
  if constexpr (can_stream<S>())
    stream(v, p);
  else
    store_narrowed(v, p);
}
inline void finish_streams() {
#if defined(ILNAS_ISA_AVX512)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
