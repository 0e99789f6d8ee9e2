// Kernels that use every function of csrc/cuda/device.cuh as allowed; test_simt.py compares them with their
// definitions.
#include "cuda/device.cuh"

namespace ilnas::cuda {

// The faults' correct twins: mirrored through shared memory by block barrier, warp barrier and asynchronous copy.
static __global__ void mirror_kernel(Global<const float> x, Global<float> out) {
  ILNAS_SHARED(float, tile, 64);
  ILNAS_SHARED(float, in_warp, 64);
  const int i = static_cast<int>(threadIdx.x), base = i / 32 * 32;
  cp_async<4>(tile + i, x + i, i != 5);
  cp_async_commit();
  in_warp[i] = x[i];
  __syncwarp();
  float v = in_warp[base + 31 - i % 32];
  __syncwarp();
  in_warp[i] = v;
  __syncwarp(i % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  v += in_warp[base + (i % 32 ^ 1)];
  cp_async_wait<0>();
  __syncthreads();
  out[i] = tile[63 - i] + v;
}
extern "C" int mirror(const float* x, float* out) { return ILNAS_LAUNCH(mirror_kernel, 1, 64, 0, nullptr, x, out); }

static __global__ void warp_functions_kernel(Global<const int> x, Global<int> out) {
  const int lane = static_cast<int>(threadIdx.x), v = x[lane];
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  out[lane] = __shfl_sync(kFullMask, v, lane * 7);
  out[32 + lane] = __shfl_up_sync(kFullMask, v, 3, 8);
  out[64 + lane] = __shfl_down_sync(kFullMask, v, 3, 8);
  out[96 + lane] = __shfl_xor_sync(half, v, 5, 16);
  out[128 + lane] = static_cast<int>(__ballot_sync(kFullMask, v > 0));
  out[160 + lane] = __any_sync(half, v > 30);
  out[192 + lane] = __all_sync(half, v > -100);
  out[224 + lane] = static_cast<int>(__shfl_xor_sync(kFullMask, int64_t{v} << 33, 1) >> 33);
}
extern "C" int warp_functions(const int* x, int* out) {
  return ILNAS_LAUNCH(warp_functions_kernel, 1, 32, 0, nullptr, x, out);
}

// Every thread of every block takes part; old values of atomic_add are all different.
static __global__ void atomics_kernel(Global<const int64_t> x, Global<int64_t> wide, Global<unsigned> narrow,
                                      Global<int> ticket) {
  ILNAS_SHARED(unsigned, in_block, 1);
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (threadIdx.x == 0) in_block[0] = 0;
  __syncthreads();
  atomic_add(in_block, 1u);
  __syncthreads();
  if (threadIdx.x == 0) atomic_add(narrow, in_block[0] + 0u);
  atomic_or(narrow + 1, 1u << (i % 32));
  ticket[1 + atomic_add(ticket, 1)] = 1;
  atomic_max(wide, x[i] + 0);
  atomic_min(wide + 1, x[i] + 0);
  atomic_add(wide + 2, x[i] + 0);
  atomic_cas(wide + 3, int64_t{-1}, x[i] + 0);
  atomic_exch(wide + 4, x[i] + 0);
}
extern "C" int atomics(const int64_t* x, int64_t* wide, unsigned* narrow, int* ticket, int64_t blocks) {
  return ILNAS_LAUNCH(atomics_kernel, static_cast<unsigned>(blocks), 40, 0, nullptr, x, wide, narrow, ticket);
}

// [count of even, any above 1000] of the block's values, by the voting barriers.
static __global__ void votes_kernel(Global<const int> x, Global<int> out) {
  const int v = x[threadIdx.x];
  const int even = __syncthreads_count(v % 2 == 0), large = __syncthreads_or(v > 1000);
  if (threadIdx.x == 0) out[0] = even, out[1] = large;
}
extern "C" int votes(const int* x, int* out) { return ILNAS_LAUNCH(votes_kernel, 1, 50, 0, nullptr, x, out); }

// Where each element of a matrix goes: lane l's registers of ldmatrix x1 x2 x4, plain and transposed -> out [7 * 2,
// 32].
static __global__ void fragments_of_kernel(Global<const Half> x, Global<uint32_t> out) {
  ILNAS_DYNAMIC_SHARED(bytes);
  const Shared<Half> tile = pointer_cast<Half>(bytes);
  const int lane = static_cast<int>(lane_id());
  for (int i = lane; i < 256; i += 32) tile[i] = x[i];
  __syncthreads();
  uint32_t one[1], two[2], four[4];
  const Shared<Half> row = tile + lane * 8;
  ldmatrix(one, row), ldmatrix(two, row), ldmatrix(four, row);
  out[lane] = one[0];
  for (int i = 0; i < 2; ++i) out[(1 + i) * 32 + lane] = two[i];
  for (int i = 0; i < 4; ++i) out[(3 + i) * 32 + lane] = four[i];
  ldmatrix_trans(one, row), ldmatrix_trans(two, row), ldmatrix_trans(four, row);
  out[7 * 32 + lane] = one[0];
  for (int i = 0; i < 2; ++i) out[(8 + i) * 32 + lane] = two[i];
  for (int i = 0; i < 4; ++i) out[(10 + i) * 32 + lane] = four[i];
}
extern "C" int fragments_of(const void* x, uint32_t* out) {
  return ILNAS_LAUNCH(fragments_of_kernel, 1, 32, 512, nullptr, static_cast<const Half*>(x), out);
}

// d += a b straight from registers: a [4, 32], b [2, 32], d [4, 32] as the lanes hold them.
template <int kind>
static __global__ void mma_kernel(Global<const uint32_t> a, Global<const uint32_t> b, Global<float> d) {
  const int lane = static_cast<int>(lane_id());
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[i * 32 + lane], rd[i] = d[i * 32 + lane];
  for (int i = 0; i < 2; ++i) rb[i] = b[i * 32 + lane];
  if constexpr (kind == 0) mma_m16n8k8<Half>(rd, ra[0], ra[1], rb[0]);
  if constexpr (kind == 1) mma_m16n8k16<Half>(rd, ra[0], ra[1], ra[2], ra[3], rb[0], rb[1]);
  if constexpr (kind == 2) mma_m16n8k8<BFloat16>(rd, ra[0], ra[1], rb[0]);
  if constexpr (kind == 3) mma_m16n8k16<BFloat16>(rd, ra[0], ra[1], ra[2], ra[3], rb[0], rb[1]);
  if constexpr (kind == 4) mma_m16n8k8_tf32(rd, ra[0], ra[1], ra[2], ra[3], rb[0], rb[1]);
  for (int i = 0; i < 4; ++i) d[i * 32 + lane] = rd[i];
}
extern "C" int mma(const uint32_t* a, const uint32_t* b, float* d, int64_t kind) {
  switch (kind) {
    case 0:
      return ILNAS_LAUNCH(mma_kernel<0>, 1, 32, 0, nullptr, a, b, d);
    case 1:
      return ILNAS_LAUNCH(mma_kernel<1>, 1, 32, 0, nullptr, a, b, d);
    case 2:
      return ILNAS_LAUNCH(mma_kernel<2>, 1, 32, 0, nullptr, a, b, d);
    case 3:
      return ILNAS_LAUNCH(mma_kernel<3>, 1, 32, 0, nullptr, a, b, d);
    default:
      return ILNAS_LAUNCH(mma_kernel<4>, 1, 32, 0, nullptr, a, b, d);
  }
}

// bits_of(from_float(x)) in both 16-bit types, and back.
static __global__ void numbers_kernel(Global<const float> x, Global<int> bits, Global<float> back, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= count) return;
  const Half h = from_float<Half>(x[i]);
  const BFloat16 b = from_float<BFloat16>(x[i]);
  bits[2 * i] = bits_of(h);
  bits[2 * i + 1] = bits_of(from_bits<BFloat16>(bits_of(b)));
  back[2 * i] = to_float(h);
  back[2 * i + 1] = to_float(from_bits<BFloat16>(static_cast<uint16_t>(pack2(b, b) >> 16)));
}
extern "C" int numbers(const float* x, int* bits, float* back, int64_t count) {
  return ILNAS_LAUNCH(numbers_kernel, static_cast<unsigned>((count + 31) / 32), 32, 0, nullptr, x, bits, back, count);
}

// One load of shared memory by each lane at lane * stride words, as vectors of 1 or 4 words; ldmatrix with rows that
// lie row_words apart; and a load of x.
static __global__ void traffic_kernel(Global<const float> x, Global<float> out, int stride, int vector, int row_words) {
  ILNAS_DYNAMIC_SHARED(bytes);
  const Shared<float> tile = pointer_cast<float>(bytes);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = static_cast<int>(threadIdx.x); i < 4096; i += 64) tile[i] = 1.0f;
  __syncthreads();
  float v = x[lane * stride];
  if (vector == 4)
    v += load_as<float4>(tile + lane * stride).x;
  else
    v += tile[lane * stride];
  uint32_t fragment[4];
  ldmatrix(fragment, tile + lane * row_words);
  out[threadIdx.x] = v + __uint_as_float(fragment[0]);
}
extern "C" int traffic(const float* x, float* out, int64_t stride, int64_t vector, int64_t row_words) {
  return ILNAS_LAUNCH(traffic_kernel, 6, 64, 16384, nullptr, x, out, static_cast<int>(stride), static_cast<int>(vector),
                      static_cast<int>(row_words));
}

// The order in which the threads and blocks take tickets.
static __global__ void order_kernel(Global<int> ticket, Global<int> order) {
  order[atomic_add(ticket, 1)] = static_cast<int>(thread_in_block() + blockDim.x * blockDim.y * blockIdx.x);
}
extern "C" int order(int* ticket, int* order) {
  return ILNAS_LAUNCH(order_kernel, 3, dim3(4, 2), 0, nullptr, ticket, order);
}

}  // namespace ilnas::cuda
