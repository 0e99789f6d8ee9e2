// The keys that were appended, sorted (a bitonic network, as their number is known on the device alone), and decoded.
#include "cuda/absent_topk_filter.cuh"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kSortBlock % (2 * kThreads) == 0, "every thread compares whole pairs");

// Puts the pair (low, low + distance) in order: falling where the bit `size` of its place is clear.
__device__ __forceinline__ void exchange(uint64_t low, uint64_t high, bool falling, uint64_t* first, uint64_t* second) {
  const bool swap = falling ? low < high : low > high;
  *first = swap ? high : low;
  *second = swap ? low : high;
}

__device__ __forceinline__ int64_t lower_of_pair(int64_t pair, int64_t distance) {
  return pair / distance * 2 * distance + pair % distance;
}

__device__ __forceinline__ void sort_step(Shared<uint64_t> keys, int64_t first_place, int64_t size, int distance) {
  for (int pair = threadIdx.x; pair < kSortBlock / 2; pair += kThreads) {
    const int low = static_cast<int>(lower_of_pair(pair, distance));
    uint64_t a = keys[low], b = keys[low + distance];
    exchange(a, b, ((first_place + low) & size) == 0, &a, &b);
    keys[low] = a;
    keys[low + distance] = b;
  }
  __syncthreads();
}

// Sorts each block of kSortBlock keys, the directions alternating; places that hold no key become 0.
__global__ void __launch_bounds__(kThreads)
    sort_blocks_kernel(Global<const uint64_t> state_words, Global<uint64_t> buffer) {
  ILNAS_SHARED(uint64_t, keys, kSortBlock);
  const int64_t first = int64_t{blockIdx.x} * kSortBlock;
  const int64_t appended = static_cast<int64_t>(static_cast<uint64_t>(state_words[kAppended]));
  for (int i = threadIdx.x; i < kSortBlock; i += kThreads)
    keys[i] = first + i < appended ? static_cast<uint64_t>(buffer[first + i]) : 0;
  __syncthreads();
  for (int size = 2; size <= kSortBlock; size *= 2)
    for (int distance = size / 2; distance >= 1; distance /= 2) sort_step(keys, first, size, distance);
  for (int i = threadIdx.x; i < kSortBlock; i += kThreads) buffer[first + i] = static_cast<uint64_t>(keys[i]);
}

// The steps of one merge that stay within a block.
__global__ void __launch_bounds__(kThreads) merge_blocks_kernel(Global<uint64_t> buffer, int64_t size) {
  ILNAS_SHARED(uint64_t, keys, kSortBlock);
  const int64_t first = int64_t{blockIdx.x} * kSortBlock;
  for (int i = threadIdx.x; i < kSortBlock; i += kThreads) keys[i] = static_cast<uint64_t>(buffer[first + i]);
  __syncthreads();
  for (int distance = kSortBlock / 2; distance >= 1; distance /= 2) sort_step(keys, first, size, distance);
  for (int i = threadIdx.x; i < kSortBlock; i += kThreads) buffer[first + i] = static_cast<uint64_t>(keys[i]);
}

__global__ void __launch_bounds__(kThreads) merge_step_kernel(Global<uint64_t> buffer, int64_t size, int64_t distance) {
  const int64_t low = lower_of_pair(int64_t{blockIdx.x} * kThreads + threadIdx.x, distance);
  uint64_t a = buffer[low], b = buffer[low + distance];
  exchange(a, b, (low & size) == 0, &a, &b);
  buffer[low] = a;
  buffer[low + distance] = b;
}

struct Answer {
  Global<int64_t> index;
  Global<float> grad;
  Global<int64_t> non_finite;
};

__global__ void __launch_bounds__(kThreads)
    decode_kernel(Global<const uint64_t> state_words, Global<const uint64_t> keys, Answer answer, int64_t k) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < k; i += int64_t{gridDim.x} * kThreads) {
    const uint64_t key = keys[i];
    const float size = __uint_as_float(static_cast<unsigned>(key >> 33));
    answer.index[i] = key == 0 ? -1 : static_cast<int64_t>(0xffffffffu - (key >> 1 & 0xffffffffu));
    answer.grad[i] = (key & 1) != 0 ? -size : size;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0)
    answer.non_finite[0] = static_cast<int64_t>(static_cast<uint64_t>(state_words[kNonFinite]));
}

}  // namespace

cudaError_t launch_topk_sort(const void* state, uint64_t* buffer, int64_t capacity, const TopkQuery& query,
                             cudaStream_t stream) {
  const uint64_t* const words = static_cast<const uint64_t*>(state);
  const dim3 blocks(static_cast<unsigned>(capacity / kSortBlock));
  const dim3 pairs(static_cast<unsigned>(capacity / 2 / kThreads));
  if (cudaError_t error = ILNAS_LAUNCH(sort_blocks_kernel, blocks, dim3(kThreads), 0, stream, words, buffer))
    return error;
  for (int64_t size = 2 * kSortBlock; size <= capacity; size *= 2) {
    for (int64_t distance = size / 2; distance >= kSortBlock; distance /= 2)
      if (cudaError_t error = ILNAS_LAUNCH(merge_step_kernel, pairs, dim3(kThreads), 0, stream, buffer, size, distance))
        return error;
    if (cudaError_t error = ILNAS_LAUNCH(merge_blocks_kernel, blocks, dim3(kThreads), 0, stream, buffer, size))
      return error;
  }
  const Answer answer{query.index, query.grad, query.non_finite};
  return ILNAS_LAUNCH(decode_kernel, grid_of(ceil_div(query.k, kThreads)), dim3(kThreads), 0, stream, words, buffer,
                      answer, query.k);
}

}  // namespace ilnas::cuda
