// x86-64 with the AVX-512 of Skylake-X and newer, Zen 4 and newer.
#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header fills "undefined" vectors in a way that these warnings take for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define ILNAS_ISA avx512
#define ILNAS_ISA_AVX512
#include "cpu/kernels.inl"
#endif

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
