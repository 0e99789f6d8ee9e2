// The second stage of sums that several blocks share: partial sums added in a fixed order.
#pragma once
#include "cuda/choose_tile.h"

namespace ilnas::cuda {

constexpr int kSumThreads = 256;

// result[i] = sum over s of partial[s][i], s rising
template <class S>
__global__ void __launch_bounds__(kSumThreads)
    sum_splits_kernel(Global<const float> ILNAS_RESTRICT partial, Global<S> result, int64_t count, int splits) {
  for (int64_t i = blockIdx.x * int64_t{kSumThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kSumThreads) {
    float sum = partial[i];
    for (int s = 1; s < splits; ++s) sum += partial[s * count + i];
    result[i] = from_float<S>(sum);
  }
}

template <class S>
cudaError_t launch_sum_splits(const float* partial, S* result, int64_t count, int splits, cudaStream_t stream) {
  return ILNAS_LAUNCH(sum_splits_kernel<S>, grid_of(ceil_div(count, kSumThreads)), dim3(kSumThreads), 0, stream,
                      partial, result, count, splits);
}

}  // namespace ilnas::cuda
