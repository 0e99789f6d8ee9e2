// What csrc/cuda/device.cuh offers, mapped to the emulated machine. The meaning of every function is stated there.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cpu/storage.h"
#include "simt/machine.h"
#include "simt/pointer.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define ILNAS_RESTRICT
#define ILNAS_SHARED(type, name, count)                                            \
  static const char name##_key = 0;                                                \
  const ::ilnas::cuda::Shared<type> name = ::ilnas::cuda::Shared<type>::of_region( \
      ::ilnas::simt::machine().shared_array(&name##_key, #name, sizeof(type) * (count)))
#define ILNAS_DYNAMIC_SHARED(name)                  \
  const ::ilnas::cuda::Shared<unsigned char> name = \
      ::ilnas::cuda::Shared<unsigned char>::of_region(::ilnas::simt::machine().dynamic_shared())
#define ILNAS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ilnas::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#define threadIdx (::ilnas::simt::machine().thread().index)
#define blockIdx (::ilnas::simt::machine().block_index)
#define blockDim (::ilnas::simt::machine().block_size)
#define gridDim (::ilnas::simt::machine().grid_size)

#define ILNAS_SIMT_VECTOR(type, element)                                 \
  struct alignas(2 * sizeof(element)) type##2 { element x, y; };         \
  struct alignas(4 * sizeof(element)) type##4 { element x, y, z, w; };   \
  inline type##2 make_##type##2(element x, element y) { return {x, y}; } \
  inline type##4 make_##type##4(element x, element y, element z, element w) { return {x, y, z, w}; }
ILNAS_SIMT_VECTOR(float, float)
ILNAS_SIMT_VECTOR(int, int)
ILNAS_SIMT_VECTOR(uint, unsigned)
ILNAS_SIMT_VECTOR(ushort, unsigned short)
#undef ILNAS_SIMT_VECTOR

using cudaStream_t = struct IlnasSimtStream*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801
};

inline cudaError_t cudaMemsetAsync(void* begin, int value, size_t bytes, cudaStream_t) {
  return ilnas::simt::machine().fill(begin, value, bytes) ? cudaSuccess : cudaErrorInvalidValue;
}

inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __popcll(unsigned long long v) { return std::popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return std::countl_zero(static_cast<unsigned long long>(v)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

namespace ilnas::cuda {

using simt::Site;

template <class T>
using Global = simt::Pointer<T, false>;
template <class T>
using Shared = simt::Pointer<T, true>;
using Half = ::ilnas::Half;
using BFloat16 = ::ilnas::BFloat16;

constexpr unsigned kFullMask = 0xffffffffu;

// ---- host ----

struct DeviceLimits {
  int arch, multiprocessors, shared_bytes_per_block;
};

inline cudaError_t device_limits(DeviceLimits* limits) {
  const simt::Machine& m = simt::machine();
  *limits = {m.arch, m.multiprocessors, static_cast<int>(m.shared_limit)};
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const std::tuple<Parameters...> parameters(arguments...);
  const bool passed = simt::machine().run(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                                          [&] { std::apply(kernel, parameters); });
  return passed ? cudaSuccess : cudaErrorLaunchFailure;
}

// ---- device ----

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float fmaf(float a, float b, float c) {
  ++simt::machine().counts.fma;
  return std::fma(a, b, c);
}
using std::fabs;
inline float fabsf(float v) { return std::fabs(v); }
inline float sqrtf(float v) { return std::sqrt(v); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fminf(float a, float b) { return std::fmin(a, b); }

inline unsigned thread_in_block() { return simt::machine().thread().number; }
inline unsigned lane_id() { return thread_in_block() % 32; }
inline unsigned warp_id() { return thread_in_block() / 32; }

template <class To, class From, bool shared>
simt::Pointer<To, shared> pointer_cast(simt::Pointer<From, shared> p) {
  return simt::Pointer<To, shared>(reinterpret_cast<To*>(p.raw()), p.region());
}
template <class V, class T, bool shared>
V load_as(simt::Pointer<T, shared> p) {
  return simt::Pointer<const V, shared>(reinterpret_cast<const V*>(p.raw()), p.region())[0];
}
template <class V, class T>
V load_readonly(Global<T> p) {
  simt::machine().read_only(p.region());
  return load_as<V>(p);
}
template <class V, class T, bool shared>
void store_as(simt::Pointer<T, shared> p, V v) {
  simt::Pointer<V, shared>(reinterpret_cast<V*>(p.raw()), p.region())[0] = v;
}

namespace detail {
template <class T, bool shared, class Update>
T atomic(simt::Pointer<T, shared> p, Update update) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics work on 32- and 64-bit integers");
  simt::machine().touch(p.region(), p.raw(), sizeof(T), sizeof(T), simt::Touch::kAtomic);
  const T old = *p.raw();
  *p.raw() = update(old);
  return old;
}
}  // namespace detail

template <class T, bool shared>
T atomic_add(simt::Pointer<T, shared> p, T v) {
  using U = std::make_unsigned_t<T>;
  return detail::atomic(p, [=](T old) { return static_cast<T>(static_cast<U>(old) + static_cast<U>(v)); });
}
template <class T, bool shared>
T atomic_or(simt::Pointer<T, shared> p, T v) {
  return detail::atomic(p, [=](T old) { return old | v; });
}
template <class T, bool shared>
T atomic_exch(simt::Pointer<T, shared> p, T v) {
  return detail::atomic(p, [=](T) { return v; });
}
template <class T, bool shared>
T atomic_cas(simt::Pointer<T, shared> p, T expected, T desired) {
  return detail::atomic(p, [=](T old) { return old == expected ? desired : old; });
}
template <class T, bool shared>
T atomic_max(simt::Pointer<T, shared> p, T v) {
  return detail::atomic(p, [=](T old) { return old < v ? v : old; });
}
template <class T, bool shared>
T atomic_min(simt::Pointer<T, shared> p, T v) {
  return detail::atomic(p, [=](T old) { return v < old ? v : old; });
}

inline float to_float(float v) { return v; }
inline float to_float(Half v) { return widen(v); }
inline float to_float(BFloat16 v) { return widen(v); }
template <class T>
T from_float(float v) {
  T narrowed;
  narrow(v, narrowed);
  return narrowed;
}
inline uint16_t bits_of(Half v) { return v.bits; }
inline uint16_t bits_of(BFloat16 v) { return v.bits; }
template <class T>
T from_bits(uint16_t bits) {
  return T{bits};
}
template <class T>
uint32_t pack2(T low, T high) {
  return bits_of(low) | static_cast<uint32_t>(bits_of(high)) << 16;
}

template <int Bytes, class To, class From>
void cp_async(Shared<To> to, Global<From> from, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp_async copies 4, 8 or 16 bytes");
  simt::machine().copy_async(to.region(), to.raw(), from.region(), from.raw(), Bytes, valid);
}
inline void cp_async_commit() { simt::machine().copy_commit(); }
template <int Groups>
void cp_async_wait() {
  simt::machine().copy_wait(Groups);
}

template <int Count, class T>
void ldmatrix(uint32_t (&fragment)[Count], Shared<T> row, Site site = Site::current()) {
  simt::load_matrices(fragment, Count, row.raw(), row.region(), false, site);
}
template <int Count, class T>
void ldmatrix_trans(uint32_t (&fragment)[Count], Shared<T> row, Site site = Site::current()) {
  simt::load_matrices(fragment, Count, row.raw(), row.region(), true, site);
}
template <class T>
void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, Site site = Site::current()) {
  simt::multiply<T, 8>(d, {a0, a1, 0, 0}, {b0, 0}, site);
}
template <class T>
void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                  Site site = Site::current()) {
  simt::multiply<T, 16>(d, {a0, a1, a2, a3}, {b0, b1}, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1, Site site = Site::current()) {
  simt::multiply_tf32(d, {a0, a1, a2, a3}, {b0, b1}, site);
}

}  // namespace ilnas::cuda
