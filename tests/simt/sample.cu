// Kernels that show how csrc/cuda/device.cuh is used, and that the emulator must find nothing wrong with.
#include "cuda/device.cuh"

namespace ilnas::cuda {
namespace {

// c[m, n] = a[m, k] b[k, n] of T in float; m, n, k multiples of 16, 8, 16. One warp a tile of 16 x 8.
template <class T>
__global__ void __launch_bounds__(32)
    gemm_kernel(Global<const T> ILNAS_RESTRICT a, Global<const T> ILNAS_RESTRICT b, Global<float> c, int n, int k) {
  ILNAS_SHARED(T, tile_a, 16 * 16);
  ILNAS_SHARED(T, tile_b, 16 * 8);
  const int row = static_cast<int>(blockIdx.y) * 16, col = static_cast<int>(blockIdx.x) * 8;
  const int lane = static_cast<int>(lane_id());
  float d[4] = {0, 0, 0, 0};
  for (int begin = 0; begin < k; begin += 16) {
    cp_async<16>(tile_a + lane * 8, a + static_cast<int64_t>(row + lane / 2) * k + begin + lane % 2 * 8);
    if (lane < 16) cp_async<16>(tile_b + lane * 8, b + static_cast<int64_t>(begin + lane) * n + col);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t fragment_a[4], fragment_b[2];
    ldmatrix(fragment_a, tile_a + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_trans(fragment_b, tile_b + lane % 16 * 8);
    mma_m16n8k16<T>(d, fragment_a[0], fragment_a[1], fragment_a[2], fragment_a[3], fragment_b[0], fragment_b[1]);
    __syncthreads();
  }
  const Global<float> corner = c + static_cast<int64_t>(row + lane / 4) * n + col + lane % 4 * 2;
  store_as(corner, make_float2(d[0], d[1]));
  store_as(corner + static_cast<int64_t>(n) * 8, make_float2(d[2], d[3]));
}

// sum[i] = the sum of row i of x [rows, cols], by shuffles within warps and shared memory between them; and the largest
// row sum, rounded, by an atomic.
__global__ void __launch_bounds__(96)
    row_sum_kernel(Global<const float> ILNAS_RESTRICT x, Global<float> sum, Global<int> largest, int cols) {
  ILNAS_DYNAMIC_SHARED(bytes);
  const Shared<float> partial = pointer_cast<float>(bytes);
  float total = 0;
  for (int i = static_cast<int>(threadIdx.x); i < cols; i += static_cast<int>(blockDim.x))
    total += x[static_cast<int64_t>(blockIdx.x) * cols + i];
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kFullMask, total, step);
  if (lane_id() == 0) partial[warp_id()] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    float all = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) all += partial[w];
    sum[blockIdx.x] = all;
    atomic_max(largest, static_cast<int>(all));
  }
}

}  // namespace
}  // namespace ilnas::cuda

using namespace ilnas::cuda;

extern "C" int gemm(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k, int64_t bfloat16) {
  const dim3 grid(static_cast<unsigned>(n / 8), static_cast<unsigned>(m / 16));
  const int columns = static_cast<int>(n), depth = static_cast<int>(k);
  if (bfloat16)
    return ILNAS_LAUNCH(gemm_kernel<BFloat16>, grid, 32, 0, nullptr, static_cast<const BFloat16*>(a),
                        static_cast<const BFloat16*>(b), c, columns, depth);
  return ILNAS_LAUNCH(gemm_kernel<Half>, grid, 32, 0, nullptr, static_cast<const Half*>(a), static_cast<const Half*>(b),
                      c, columns, depth);
}

extern "C" int row_sum(const float* x, float* sum, int* largest, int64_t rows, int64_t cols) {
  if (cudaError_t error = cudaMemsetAsync(largest, 0x80, sizeof(int), nullptr)) return error;
  return ILNAS_LAUNCH(row_sum_kernel, static_cast<unsigned>(rows), 96, 3 * sizeof(float), nullptr, x, sum, largest,
                      static_cast<int>(cols));
}
