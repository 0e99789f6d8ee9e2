// Kernels with one planted fault each; test_simt.py says which rule must catch it. x and out hold 64 floats.
#include "cuda/device.cuh"

namespace ilnas::cuda {

#define FAULT(name, blocks, threads, shared_bytes)                                      \
  static __global__ void name##_kernel(Global<const float> x, Global<float> out);       \
  extern "C" int name(const float* x, float* out) {                                     \
    return ILNAS_LAUNCH(name##_kernel, blocks, threads, shared_bytes, nullptr, x, out); \
  }                                                                                     \
  static __global__ void name##_kernel([[maybe_unused]] Global<const float> x, [[maybe_unused]] Global<float> out)

FAULT(missing_block_barrier, 1, 64, 0) {
  ILNAS_SHARED(float, tile, 64);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = x[i];
  out[i] = tile[63 - i];
}

FAULT(missing_barrier_before_overwrite, 1, 64, 0) {
  ILNAS_SHARED(float, tile, 64);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = x[i];
  __syncthreads();
  const float mirrored = tile[63 - i];
  tile[i] = mirrored;
  __syncthreads();
  out[i] = tile[i];
}

// Many threads read the byte that one of the readers then writes.
FAULT(broadcast_overwritten_by_a_reader, 1, 64, 0) {
  ILNAS_SHARED(float, first, 1);
  if (threadIdx.x == 0) first[0] = x[0];
  __syncthreads();
  const float v = first[0];
  if (threadIdx.x == 5) first[0] = v + 1;
  __syncthreads();
  out[threadIdx.x] = first[0];
}

FAULT(two_writers, 1, 64, 0) {
  ILNAS_SHARED(float, flag, 1);
  flag[0] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = flag[0];
}

FAULT(missing_warp_barrier, 1, 32, 0) {
  ILNAS_SHARED(float, tile, 32);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = x[i];
  const float v = __shfl_sync(kFullMask, tile[i] + 0.0f, 0);  // a shuffle orders no memory
  out[i] = tile[31 - i] + v;
}

FAULT(warp_barrier_between_warps, 1, 64, 0) {
  ILNAS_SHARED(float, tile, 64);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = x[i];
  __syncwarp();
  out[i] = tile[63 - i];
}

FAULT(warp_barrier_of_half_a_warp, 1, 32, 0) {
  ILNAS_SHARED(float, tile, 32);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = x[i];
  __syncwarp(i < 16 ? 0x0000ffffu : 0xffff0000u);
  out[i] = tile[31 - i];
}

FAULT(ldmatrix_without_barrier, 1, 32, 0) {
  ILNAS_SHARED(Half, tile, 64);
  const int i = static_cast<int>(threadIdx.x);
  tile[2 * i] = from_float<Half>(x[i]);
  tile[2 * i + 1] = from_float<Half>(x[i]);
  uint32_t fragment[1];
  ldmatrix_trans(fragment, tile + i % 8 * 8);
  out[i] = __uint_as_float(fragment[0]);
}

FAULT(global_race_in_a_block, 1, 64, 0) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = x[i];
  const float other = out[63 - i];
  out[i] = other;
}

FAULT(global_race_between_blocks, 2, 1, 0) { out[0] = x[blockIdx.x]; }

FAULT(block_reads_what_another_wrote, 2, 1, 0) {
  if (blockIdx.x == 0)
    out[0] = x[0];
  else
    out[1] = out[0];
}

FAULT(plain_read_of_a_shared_counter, 1, 64, 0) {
  ILNAS_SHARED(int, counter, 1);
  if (threadIdx.x == 0) counter[0] = 0;
  __syncthreads();
  atomic_add(counter, 1);
  out[threadIdx.x] = static_cast<float>(counter[0]);
}

FAULT(shared_past_the_end, 1, 64, 0) {
  ILNAS_SHARED(float, tile, 63);
  ILNAS_SHARED(float, neighbour, 64);
  neighbour[threadIdx.x] = 0.0f;
  tile[threadIdx.x] = x[threadIdx.x];
}

FAULT(shared_before_the_start, 1, 64, 0) {
  ILNAS_SHARED(float, tile, 64);
  tile[static_cast<int>(threadIdx.x) - 1] = x[threadIdx.x];
}

FAULT(dynamic_shared_past_the_end, 1, 64, 252) {
  ILNAS_DYNAMIC_SHARED(bytes);
  pointer_cast<float>(bytes)[threadIdx.x] = x[threadIdx.x];
}

FAULT(vector_over_the_end, 1, 1, 0) {
  ILNAS_SHARED(float, tile, 6);
  for (int i = 0; i < 6; ++i) tile[i] = 0.0f;
  out[0] = load_as<float4>(tile + 4).x;
}

FAULT(global_past_the_end, 1, 65, 0) { out[threadIdx.x] = 0.0f; }

FAULT(global_before_the_start, 1, 64, 0) { out[threadIdx.x] = x[static_cast<int>(threadIdx.x) - 1]; }

FAULT(pointer_to_a_local, 1, 1, 0) {
  float local = 1.0f;
  const Global<float> p = &local;
  out[0] = p[0];
}

FAULT(uninitialised_shared, 1, 64, 0) {
  ILNAS_SHARED(float, tile, 64);
  if (threadIdx.x != 7) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

// The second block must not see what the first has left behind.
FAULT(shared_kept_from_the_block_before, 2, 1, 0) {
  ILNAS_SHARED(float, tile, 1);
  if (blockIdx.x == 0) tile[0] = x[0];
  out[blockIdx.x] = tile[0];
}

FAULT(uninitialised_global, 1, 64, 0) { out[threadIdx.x] += x[threadIdx.x]; }

FAULT(misaligned_shared_vector, 1, 1, 0) {
  ILNAS_SHARED(float, tile, 16);
  for (int i = 0; i < 16; ++i) tile[i] = 0.0f;
  out[0] = load_as<float4>(tile + 2).x;
}

FAULT(misaligned_global_vector, 1, 1, 0) { out[0] = load_as<float2>(x + 1).x; }

FAULT(misaligned_store, 1, 1, 0) { store_as(out + 1, make_float4(0, 0, 0, 0)); }

FAULT(misaligned_ldmatrix_row, 1, 32, 0) {
  ILNAS_SHARED(Half, tile, 128);
  for (int i = 0; i < 4; ++i) tile[static_cast<int>(threadIdx.x) * 4 + i] = from_float<Half>(1.0f);
  __syncwarp();
  uint32_t fragment[1];
  ldmatrix(fragment, tile + threadIdx.x % 8 * 12);
  out[threadIdx.x] = __uint_as_float(fragment[0]);
}

FAULT(ldmatrix_row_outside, 1, 32, 0) {
  ILNAS_SHARED(Half, tile, 64);
  for (int i = 0; i < 2; ++i) tile[static_cast<int>(threadIdx.x) * 2 + i] = from_float<Half>(1.0f);
  __syncwarp();
  uint32_t fragment[1];
  ldmatrix(fragment, tile + threadIdx.x * 8);  // only 8 lanes' rows are loaded, but sm_75 wants all to be valid
  out[threadIdx.x] = __uint_as_float(fragment[0]);
}

FAULT(barrier_after_exit, 1, 64, 0) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 0.0f;
}

FAULT(barriers_at_two_places, 1, 64, 0) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0.0f;
}

FAULT(barrier_against_warp_barrier, 1, 64, 0) {
  if (threadIdx.x == 0)
    __syncthreads();
  else
    __syncwarp();
  out[threadIdx.x] = 0.0f;
}

FAULT(shuffle_in_a_branch, 1, 32, 0) {
  float v = x[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_xor_sync(kFullMask, v, 1);
  out[threadIdx.x] = v;
}

FAULT(shuffle_from_outside_the_mask, 1, 32, 0) {
  float v = x[threadIdx.x];
  if (threadIdx.x < 16) v = __shfl_sync(0x0000ffffu, v, 20);
  out[threadIdx.x] = v;
}

FAULT(shuffle_without_itself, 1, 32, 0) { out[threadIdx.x] = __shfl_sync(0xfffffffeu, x[threadIdx.x] + 0.0f, 1); }

FAULT(shuffle_in_a_short_warp, 1, 48, 0) { out[threadIdx.x] = __shfl_xor_sync(kFullMask, x[threadIdx.x] + 0.0f, 1); }

FAULT(two_warp_functions, 1, 32, 0) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __shfl_xor_sync(kFullMask, 1.0f, 1);
  else
    out[threadIdx.x] = static_cast<float>(__ballot_sync(kFullMask, 1));
}

FAULT(write_to_an_input, 1, 1, 0) {
  const Global<float> writable(const_cast<float*>(x.raw()));
  writable[0] = 1.0f;
}

FAULT(copy_not_waited_for, 1, 32, 0) {
  ILNAS_SHARED(float, tile, 64);
  cp_async<8>(tile + threadIdx.x * 2, x + threadIdx.x * 2);
  cp_async_commit();
  cp_async_wait<1>();
  out[threadIdx.x] = tile[threadIdx.x * 2];
}

FAULT(copy_not_committed, 1, 32, 0) {
  ILNAS_SHARED(float, tile, 64);
  cp_async<8>(tile + threadIdx.x * 2, x + threadIdx.x * 2);
  cp_async_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x * 2];
}

FAULT(copy_without_barrier, 1, 32, 0) {
  ILNAS_SHARED(float, tile, 32);
  cp_async<4>(tile + threadIdx.x, x + threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = tile[31 - threadIdx.x];
}

FAULT(misaligned_copy, 1, 1, 0) {
  ILNAS_SHARED(float, tile, 16);
  cp_async<16>(tile, x + 1);
}

FAULT(readonly_load_of_an_output, 1, 1, 0) {
  out[0] = 1.0f;
  out[1] = load_readonly<float>(out);
}

FAULT(readonly_load_before_a_write, 1, 1, 0) {
  out[1] = load_readonly<float>(x) + 1.0f;
  const Global<float> writable(const_cast<float*>(x.raw()));
  writable[0] = 1.0f;
}

FAULT(bfloat16_mma_on_turing, 1, 32, 0) {
  float d[4] = {0, 0, 0, 0};
  mma_m16n8k8<BFloat16>(d, 0, 0, 0);
  out[threadIdx.x] = d[0];
}

FAULT(index_overflow, 1, 1, 0) {
  int index = static_cast<int>(x[63] + 0.0f) * (1 << 25);  // just fits
  index = index * 2;
  out[index & 1] = 1.0f;
}

FAULT(local_array_overrun, 1, 1, 0) {
  float local[4] = {0, 0, 0, 0};
  const int index = static_cast<int>(x[4] + 0.0f);
  local[index] = 1.0f;
  out[0] = local[0];
}

FAULT(shift_too_far, 1, 1, 0) { out[0] = static_cast<float>(1 << static_cast<int>(x[32] + 0.0f)); }

FAULT(division_by_zero, 1, 1, 0) { out[0] = static_cast<float>(7 / static_cast<int>(x[0] + 0.0f)); }

FAULT(too_much_static_shared, 1, 1, 0) {
  ILNAS_SHARED(float, tile, 13 * 1024);
  tile[0] = 1.0f;
}

FAULT(too_much_shared_in_all, 1, 1, 60 * 1024) {
  ILNAS_SHARED(float, tile, 2 * 1024);
  tile[0] = 1.0f;
}

FAULT(too_much_dynamic_shared, 1, 1, 65 * 1024) { out[0] = 1.0f; }

FAULT(too_many_threads, 1, 1025, 0) { out[0] = 1.0f; }

FAULT(unwritten_output, 1, 63, 0) { out[threadIdx.x] = 1.0f; }

template <int kOffset>
static __global__ void offset_kernel(Global<float> out) {
  out[kOffset] = 1.0f;
}
extern "C" int kernel_in_a_variable(const float*, float* out) {
  const auto chosen = offset_kernel<64>;
  return ILNAS_LAUNCH(chosen, 1, 1, 0, nullptr, out);
}

// Wrong fragments break no rule of memory: only the product shows them. a is 16 x 16, b 16 x 8, both of Half.
enum Layout : int64_t { kRight, kSwappedRows, kSwappedDepth, kNotTransposed, kRowsOfTheWrongMatrix };

static __global__ void fragment_kernel(Global<const Half> a, Global<const Half> b, Global<float> c, int64_t layout) {
  ILNAS_SHARED(Half, tile_a, 256);
  ILNAS_SHARED(Half, tile_b, 128);
  const int lane = static_cast<int>(lane_id());
  for (int i = lane; i < 256; i += 32) tile_a[i] = a[i];
  for (int i = lane; i < 128; i += 32) tile_b[i] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  if (layout == kRowsOfTheWrongMatrix)
    ldmatrix(fa, tile_a + lane % 8 * 16 + lane / 8 % 2 * 8 + lane / 16 * 128);
  else
    ldmatrix(fa, tile_a + lane % 16 * 16 + lane / 16 * 8);
  if (layout == kNotTransposed)
    ldmatrix(fb, tile_b + lane % 16 * 8);
  else
    ldmatrix_trans(fb, tile_b + lane % 16 * 8);
  float d[4] = {0, 0, 0, 0};
  if (layout == kSwappedRows)
    mma_m16n8k16<Half>(d, fa[1], fa[0], fa[3], fa[2], fb[0], fb[1]);
  else if (layout == kSwappedDepth)
    mma_m16n8k16<Half>(d, fa[0], fa[1], fa[2], fa[3], fb[1], fb[0]);
  else
    mma_m16n8k16<Half>(d, fa[0], fa[1], fa[2], fa[3], fb[0], fb[1]);
  store_as(c + lane / 4 * 8 + lane % 4 * 2, make_float2(d[0], d[1]));
  store_as(c + (lane / 4 + 8) * 8 + lane % 4 * 2, make_float2(d[2], d[3]));
}
extern "C" int fragments(const void* a, const void* b, float* c, int64_t layout) {
  return ILNAS_LAUNCH(fragment_kernel, 1, 32, 0, nullptr, static_cast<const Half*>(a), static_cast<const Half*>(b), c,
                      layout);
}

}  // namespace ilnas::cuda
