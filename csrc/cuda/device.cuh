// The one door between the kernels and the hardware: compiled by nvcc it is CUDA, compiled by a C++ compiler with
// -DILNAS_SIMT it is the SIMT emulator of tests/simt, which runs the same sources on the CPU and checks them.
//
// All names are in ilnas::cuda, where the kernels live too (ilnas::Half is the CPU's).
//
// What a kernel may use
//   functions   __global__ __device__ __host__ __forceinline__ __launch_bounds__; launched only by ILNAS_LAUNCH.
//   indices     threadIdx, blockIdx, blockDim, gridDim; lane_id(), warp_id().
//   memory      Global<T> and Shared<T> are pointers (T* on the device, checked pointers in the emulator): p[i] reads,
//               p[i] = v writes, p + i, p - q, comparison. A kernel takes its arrays as Global<T> (Global<const T>
//               ILNAS_RESTRICT where nothing writes them), also inside structs; a T* converts to it.
//               Never `auto` for an element: p[i] may be a proxy, and a named proxy does not compile.
//               load_as<float4>(p), store_as(p, v): vectors, aligned to their size. load_readonly<V>(p): through the
//               read-only path, for memory that no thread of the grid writes. pointer_cast<T>(p).
//   shared      ILNAS_SHARED(type, name, count) static, ILNAS_DYNAMIC_SHARED(name) the dynamic bytes as
//               Shared<unsigned char>; both aligned to 16 bytes. Plain __shared__ is not allowed.
//   barriers    __syncthreads(), __syncthreads_or(p), __syncthreads_count(p), __syncwarp(mask).
//   warps       __shfl_sync, __shfl_xor_sync, __shfl_up_sync, __shfl_down_sync, __ballot_sync, __any_sync, __all_sync.
//               As in CUDA none of them orders memory: only barriers do.
//   atomics     atomic_add, atomic_max, atomic_min, atomic_or, atomic_exch, atomic_cas; 32- and 64-bit integers, global
//               and shared; they return the old value. No floating-point atomics: their result depends on the order.
//   tensor core ldmatrix, ldmatrix_trans, mma_m16n8k8<T>, mma_m16n8k16<T>, mma_m16n8k8_tf32.
//   copies      cp_async<bytes>, cp_async_commit, cp_async_wait<groups>; plain copies before sm_80.
//   numbers     Half, BFloat16, to_float, from_float<T>, bits_of, from_bits<T>, pack2; fmaf, fmaxf, fminf, fabsf,
//               sqrtf, min, max, __float_as_uint, __uint_as_float, __popc, __popcll, __ffs, __clz, __clzll, __umulhi.
//   host        launchers call ILNAS_LAUNCH, cudaMemsetAsync and device_limits(); nothing else of the runtime.
//
// What the emulator checks, at every access through Global and Shared (so never take a raw T* out of them)
//   bounds of the array behind the pointer (each ILNAS_SHARED array, the dynamic bytes, each registered allocation);
//   alignment of vectors; reads of shared bytes never written in this block and of global bytes registered as
//   uninitialised; writes to allocations registered read-only; races: two threads, one byte, at least one plain write,
//   and no barrier that orders them (blocks of one grid are never ordered: no flags between blocks); accesses to the
//   target of a cp_async still in flight; barriers reached by only some threads; participation masks of warp functions.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef ILNAS_SIMT
#include "simt/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#define ILNAS_RESTRICT __restrict__
#define ILNAS_SHARED(type, name, count)              \
  __shared__ alignas(16) type name##_storage[count]; \
  const ::ilnas::cuda::Shared<type> name = name##_storage
#define ILNAS_DYNAMIC_SHARED(name)                \
  extern __shared__ uint4 ilnas_dynamic_shared[]; \
  const ::ilnas::cuda::Shared<unsigned char> name = reinterpret_cast<unsigned char*>(ilnas_dynamic_shared)

// ILNAS_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) -> cudaError_t.
// Write (kernel<A, B>), in brackets, for an instance with commas. An empty grid is no launch and no error.
#define ILNAS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ilnas::cuda::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace ilnas::cuda {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;
using Half = __half;
using BFloat16 = __nv_bfloat16;

constexpr unsigned kFullMask = 0xffffffffu;

// ---- host ----

// What a launcher may ask about the current device. arch: 10 * major + minor.
struct DeviceLimits {
  int arch, multiprocessors, shared_bytes_per_block;
};

inline cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0, major = 0, minor = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return error;
  limits->arch = 10 * major + minor;
  if (cudaError_t error = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return error;
  return cudaDeviceGetAttribute(&limits->shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  constexpr size_t kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ---- device ----

// Position in the block's threads, x fastest.
__device__ __forceinline__ unsigned thread_in_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
__device__ __forceinline__ unsigned lane_id() { return thread_in_block() % 32; }
__device__ __forceinline__ unsigned warp_id() { return thread_in_block() / 32; }

template <class To, class From>
__device__ __forceinline__ To* pointer_cast(From* p) {
  return reinterpret_cast<To*>(p);
}
template <class V, class T>
__device__ __forceinline__ V load_as(const T* p) {
  return *reinterpret_cast<const V*>(p);
}
template <class V, class T>
__device__ __forceinline__ V load_readonly(const T* p) {
  return __ldg(reinterpret_cast<const V*>(p));
}
template <class V, class T>
__device__ __forceinline__ void store_as(T* p, V v) {
  *reinterpret_cast<V*>(p) = v;
}

namespace detail {
// CUDA overloads its 64-bit atomics for unsigned long long, which is not uint64_t on every platform.
template <class T, size_t = sizeof(T)>
struct AtomicType {
  using type = T;
};
template <class T>
struct AtomicType<T, 8> {
  using type = unsigned long long;
};
template <>
struct AtomicType<long, 8> {
  using type = long long;
};
template <>
struct AtomicType<long long, 8> {
  using type = long long;
};
template <class T>
using Atomic = typename AtomicType<T>::type;
}  // namespace detail

// Addition, exchange and bitwise or are the same for signed and unsigned numbers.
template <class T>
__device__ __forceinline__ T atomic_add(T* p, T v) {
  if constexpr (sizeof(T) == 8)
    return static_cast<T>(atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v)));
  else
    return atomicAdd(p, v);
}
template <class T>
__device__ __forceinline__ T atomic_or(T* p, T v) {
  if constexpr (sizeof(T) == 8)
    return static_cast<T>(atomicOr(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v)));
  else
    return atomicOr(p, v);
}
template <class T>
__device__ __forceinline__ T atomic_exch(T* p, T v) {
  if constexpr (sizeof(T) == 8)
    return static_cast<T>(atomicExch(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v)));
  else
    return atomicExch(p, v);
}
template <class T>
__device__ __forceinline__ T atomic_cas(T* p, T expected, T desired) {
  if constexpr (sizeof(T) == 8)
    return static_cast<T>(atomicCAS(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(expected),
                                    static_cast<unsigned long long>(desired)));
  else
    return atomicCAS(p, expected, desired);
}
template <class T>
__device__ __forceinline__ T atomic_max(T* p, T v) {
  using A = detail::Atomic<T>;
  return static_cast<T>(atomicMax(reinterpret_cast<A*>(p), static_cast<A>(v)));
}
template <class T>
__device__ __forceinline__ T atomic_min(T* p, T v) {
  using A = detail::Atomic<T>;
  return static_cast<T>(atomicMin(reinterpret_cast<A*>(p), static_cast<A>(v)));
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(Half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(BFloat16 v) { return __bfloat162float(v); }

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else if constexpr (std::is_same<T, Half>::value)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}
__device__ __forceinline__ uint16_t bits_of(Half v) { return __half_as_ushort(v); }
__device__ __forceinline__ uint16_t bits_of(BFloat16 v) { return __bfloat16_as_ushort(v); }
template <class T>
__device__ __forceinline__ T from_bits(uint16_t bits) {
  if constexpr (std::is_same<T, Half>::value)
    return __ushort_as_half(bits);
  else
    return __ushort_as_bfloat16(bits);
}
// low in the lower half of the word, as two consecutive elements of memory.
template <class T>
__device__ __forceinline__ uint32_t pack2(T low, T high) {
  return bits_of(low) | static_cast<uint32_t>(bits_of(high)) << 16;
}

namespace detail {
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
}  // namespace detail

// Count (1, 2 or 4) 8x8 matrices of 16-bit elements; lanes 8 i .. 8 i + 7 give the 16-byte aligned addresses of the
// rows of matrix i, and every lane must give a valid one (sm_75 reads them all). Lane l gets the elements [l / 4, 2 (l
// % 4)] and [l / 4, 2 (l % 4) + 1] of matrix i in fragment[i]; of its transpose with ldmatrix_trans. (PTX ISA,
// ldmatrix)
template <int Count, class T>
__device__ __forceinline__ void ldmatrix(uint32_t (&fragment)[Count], const T* row) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const uint32_t address = detail::shared_address(row);
  if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(fragment[0]) : "r"(address) : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}
template <int Count, class T>
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&fragment)[Count], const T* row) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const uint32_t address = detail::shared_address(row);
  if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(address)
                 : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}

// d[16, 8] += a[16, 8] b[8, 8], d in float, T = Half (sm_75) or BFloat16 (sm_80). With g = lane / 4, t = lane % 4:
// a0 = a[g, 2t .. 2t+1], a1 = a[g+8, ...], b0 = b[2t .. 2t+1, g], d = {d[g, 2t], d[g, 2t+1], d[g+8, 2t], d[g+8, 2t+1]}.
// (PTX ISA, Matrix Fragments for mma.m16n8k8)
template <class T>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  if constexpr (std::is_same<T, Half>::value) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
  } else {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
#else
    __trap();  // no bf16 tensor core before sm_80: launchers must not come here
#endif
  }
}

// d[16, 8] += a[16, 16] b[16, 8]: a0, a1, b0 as in mma_m16n8k8 hold k = 0 .. 7, and a2, a3, b1 likewise k = 8 .. 15.
// (PTX ISA, Matrix Fragments for mma.m16n8k16 with floating point type.) Two mma_m16n8k8 before sm_80.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (std::is_same<T, Half>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#else
  mma_m16n8k8<T>(d, a0, a1, b0);
  mma_m16n8k8<T>(d, a2, a3, b1);
#endif
}

// d[16, 8] += a[16, 8] b[8, 8] in TF32, sm_80: a = {a[g, t], a[g+8, t], a[g, t+4], a[g+8, t+4]}, b = {b[t, g], b[t+4,
// g]}, each the bits of a float of which 10 bits of mantissa count. (PTX ISA, Matrix Fragments for mma.m16n8k8)
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// Copies Bytes (4, 8 or 16, both addresses aligned to it) from global to shared memory; !valid writes zeros and reads
// nothing. Complete after cp_async_wait of its group, for other threads after a barrier that follows.
template <int Bytes, class To, class From>
__device__ __forceinline__ void cp_async(To* to, const From* from, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp_async copies 4, 8 or 16 bytes");
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const int source_bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(to)), "l"(from),
                 "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(detail::shared_address(to)), "l"(from),
                 "n"(Bytes), "r"(source_bytes)
                 : "memory");
#else
  if constexpr (Bytes == 16)
    store_as(to, valid ? load_as<uint4>(from) : make_uint4(0, 0, 0, 0));
  else if constexpr (Bytes == 8)
    store_as(to, valid ? load_as<uint2>(from) : make_uint2(0, 0));
  else
    store_as(to, valid ? load_as<uint32_t>(from) : uint32_t{0});
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most Groups of this thread's committed groups are in flight.
template <int Groups>
__device__ __forceinline__ void cp_async_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#endif
}

}  // namespace ilnas::cuda
#endif
