// x86-64 with AVX2, FMA and F16C (2013 and newer).
#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define ILNAS_ISA avx2
#define ILNAS_ISA_AVX2
#include "cpu/kernels.inl"
#endif

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
