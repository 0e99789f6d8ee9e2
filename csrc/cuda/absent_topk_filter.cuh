// The steps of the search that absent_topk.cu puts in order.
#pragma once
#include "cuda/absent_topk.cuh"

namespace ilnas::cuda {

struct FilterArguments {
  TopkTiles tiles;
  TopkPanel units;
  int rows_per_group, cols, taps;
  int64_t capacity;  // of the buffer
  float floor;       // candidates scored below are left out
  bool by_kernel, appends, counts_non_finite;
};

int64_t topk_state_bytes();
// everything: the first pass appends every candidate; otherwise none until a threshold is known.
cudaError_t launch_topk_start(void* state, bool everything, cudaStream_t);
cudaError_t launch_topk_filter(const FilterArguments&, void* state, const float* panel, const int32_t* row_ptr,
                               const int32_t* col, uint64_t* buffer, cudaStream_t);
// After a sample, k is the rank to look for in it.
cudaError_t launch_topk_decide(void* state, bool after_sample, int64_t k, int64_t capacity, cudaStream_t);
// Sorts the appended keys, largest first, zeros after them, and writes the first k as index and gradient.
cudaError_t launch_topk_sort(const void* state, uint64_t* buffer, int64_t capacity, const TopkQuery&, cudaStream_t);

}  // namespace ilnas::cuda
