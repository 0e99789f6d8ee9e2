// One pass over a panel of gradient tiles, and what the host cannot decide without waiting: where the next one looks.
#include "cuda/absent_topk_filter.cuh"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr float kLargest = 3.4028234663852886e38f;

struct FilterCall {
  FilterArguments a;
  TopkState state;
  Global<const float> panel;
  Global<const int32_t> row_ptr, col;
  Global<uint64_t> buffer;
};

// What a block needs of the state, and its own counts.
struct Search {
  uint64_t threshold, prefix;
  int prefix_shift, shift;
  Shared<unsigned> bins;
};

__device__ __forceinline__ uint64_t key_of(float score, bool negative, uint64_t index) {
  return static_cast<uint64_t>(__float_as_uint(score)) << 33 | (0xffffffffu - index) << 1 | (negative ? 1 : 0);
}

// Counts and appends the warp's candidates; every lane takes part, `has` tells which hold one.
__device__ __forceinline__ void consider(const FilterCall& c, const Search& s, bool has, uint64_t key) {
  if (has && (s.prefix_shift == 64 || key >> s.prefix_shift == s.prefix)) {
    const uint64_t digit = (key >> s.shift) & ((uint64_t{1} << (s.prefix_shift - s.shift)) - 1);
    atomic_add(s.bins + static_cast<int>(digit), 1u);
  }
  const bool appends = has && key >= s.threshold;
  const unsigned mask = __ballot_sync(kFullMask, appends);
  if (mask == 0) return;
  unsigned long long first = 0;
  const int lane = lane_id();
  if (lane == 0) first = atomic_add<uint64_t>(c.state.words + kAppended, static_cast<uint64_t>(__popc(mask)));
  first = __shfl_sync(kFullMask, first, 0);
  const uint64_t place = first + __popc(mask & ((1u << lane) - 1));
  if (appends && place < static_cast<uint64_t>(c.a.capacity)) c.buffer[static_cast<int64_t>(place)] = key;
}

struct Candidate {
  float score;
  bool exists, negative;
};

__device__ __forceinline__ bool is_blocked(Shared<const unsigned> blocked, int at) {
  return (blocked[at / 32] >> at % 32 & 1u) != 0;
}

__device__ __forceinline__ float gradient_at(const FilterCall& c, int64_t in_panel, int row, int col) {
  const Global<const float> at =
      c.panel + ((in_panel * c.a.tiles.tiles_per_unit + col / kTileCols) * c.a.tiles.splits * kTileSize +
                 row * kTileCols + col % kTileCols);
  float sum = at[0];
  for (int part = 1; part < c.a.tiles.splits; ++part) sum += at[part * kTileSize];
  return sum;
}

// Absent weights are scored by |gradient|.
__device__ __forceinline__ Candidate weight_candidate(const FilterCall& c, Shared<const unsigned> blocked,
                                                      int64_t in_panel, int row, int col, int pitch) {
  if (is_blocked(blocked, row * pitch + col)) return {0, false, false};
  const float gradient = gradient_at(c, in_panel, row, col);
  return {fabsf(gradient), true, gradient < 0};
}

// Kernels by the root mean square of their absent taps' gradients, scaled so that no square overflows.
__device__ __forceinline__ Candidate kernel_candidate(const FilterCall& c, Shared<const unsigned> blocked,
                                                      int64_t in_panel, int row, int col, int pitch) {
  float largest = 0;
  int absent = 0;
  for (int tap = 0; tap < c.a.taps; ++tap) {
    if (is_blocked(blocked, row * pitch + col + tap)) continue;
    ++absent;
    const float size = fabsf(gradient_at(c, in_panel, row, col + tap));
    if (!(size <= largest)) largest = size;  // NaN stays
    if (!(size <= kLargest)) return {size, true, false};
  }
  if (absent == 0 || largest == 0) return {0, absent != 0, false};
  float sum = 0;
  for (int tap = 0; tap < c.a.taps; ++tap) {
    if (is_blocked(blocked, row * pitch + col + tap)) continue;
    const float part = gradient_at(c, in_panel, row, col + tap) / largest;
    sum = fmaf(part, part, sum);
  }
  return {largest * sqrtf(sum / static_cast<float>(absent)), true, false};
}

// Marks the blocked positions of the unit as bits.
__device__ __forceinline__ void mark_blocked(const FilterCall& c, const TopkUnit& unit, int rows, int cols, int pitch,
                                             Shared<unsigned> blocked) {
  for (int r = warp_id(); r < rows; r += kWarps) {
    const int row = unit.group * c.a.rows_per_group + unit.first_row + r;
    const int row_begin = c.row_ptr[row], row_end = c.row_ptr[row + 1];
    const int begin = lower_bound(c.col, row_begin, row_end, unit.first_col);
    const int end = lower_bound(c.col, begin, row_end, unit.first_col + cols);
    for (int j = begin + static_cast<int>(lane_id()); j < end; j += 32) {
      const int at = r * pitch + c.col[j] - unit.first_col;
      atomic_or(blocked + at / 32, 1u << at % 32);
    }
  }
}

__global__ void __launch_bounds__(kThreads) filter_kernel(FilterCall c) {
  ILNAS_SHARED(unsigned, bins, kBins);
  ILNAS_DYNAMIC_SHARED(dynamic);
  const Shared<unsigned> blocked = pointer_cast<unsigned>(dynamic);
  const uint64_t done = c.state.words[kDone];
  if (done != 0) return;
  const TopkTiles& t = c.a.tiles;
  const int64_t in_panel = blockIdx.x;
  const TopkUnit unit = topk_unit(c.a.units.first + in_panel * c.a.units.step, t);
  const int pitch = t.tiles_per_unit * kTileCols;
  const int rows = min(kTileRows, c.a.rows_per_group - unit.first_row);
  const int cols = min(t.unit_cols, c.a.cols - unit.first_col);
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  for (int i = threadIdx.x; i < kTileRows * pitch / 32; i += kThreads) blocked[i] = 0;
  __syncthreads();
  mark_blocked(c, unit, rows, cols, pitch, blocked);
  __syncthreads();

  const uint64_t threshold = c.a.appends ? static_cast<uint64_t>(c.state.words[kThreshold]) : ~uint64_t{0};
  const int prefix_shift = static_cast<int>(static_cast<uint64_t>(c.state.words[kPrefixShift]));
  const Search search{threshold, c.state.words[kPrefix], prefix_shift, max(prefix_shift - kDigitBits, 0), bins};
  const int width = c.a.by_kernel ? c.a.taps : 1, per_row = cols / width;
  unsigned non_finite = 0;
  for (int base = 0; base < rows * per_row; base += kThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    Candidate candidate{0, false, false};
    uint64_t index = 0;
    if (i < rows * per_row) {
      const int row = i / per_row, col = i % per_row * width;
      candidate = c.a.by_kernel ? kernel_candidate(c, blocked, in_panel, row, col, pitch)
                                : weight_candidate(c, blocked, in_panel, row, col, pitch);
      index = (int64_t{unit.group} * c.a.rows_per_group + unit.first_row + row) * (c.a.cols / width) +
              (unit.first_col + col) / width;
    }
    const bool finite = candidate.score <= kLargest;
    if (candidate.exists && !finite) ++non_finite;
    consider(c, search, candidate.exists && finite && candidate.score >= c.a.floor,
             key_of(candidate.score, candidate.negative, index));
  }
  if (c.a.counts_non_finite) {
    for (int bit = 16; bit >= 1; bit /= 2) non_finite += __shfl_xor_sync(kFullMask, non_finite, bit);
    if (lane_id() == 0 && non_finite != 0) atomic_add<uint64_t>(c.state.words + kNonFinite, uint64_t{non_finite});
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    const unsigned count = bins[i];
    if (count != 0) atomic_add(c.state.bins + i, count);
  }
}

__global__ void __launch_bounds__(kThreads) start_kernel(TopkState state, uint64_t threshold) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) state.bins[i] = 0;
  for (int i = threadIdx.x; i < kStateWords; i += kThreads)
    state.words[i] = i == kThreshold ? threshold : i == kPrefixShift ? 64 : 0;
}

// The bin in which the keys counted from the top reach `rank`, or -1; *before: how many lie in larger bins.
__device__ __forceinline__ int bin_of_rank(Shared<const unsigned> bins, Shared<const unsigned> part_sums, uint64_t rank,
                                           uint64_t* before) {
  *before = 0;
  for (int part = kThreads - 1; part >= 0; --part) {
    const unsigned in_part = part_sums[part];
    if (*before + in_part < rank) {
      *before += in_part;
      continue;
    }
    for (int bin = (part + 1) * (kBins / kThreads) - 1; bin >= part * (kBins / kThreads); --bin) {
      const unsigned count = bins[bin];
      if (*before + count >= rank) return bin;
      *before += count;
    }
  }
  return -1;
}

// After a sample: a threshold that about `rank` keys of the sample reach, read off the line across its bin.
__device__ __forceinline__ void guess_threshold(const TopkState& state, Shared<const unsigned> bins,
                                                Shared<const unsigned> part_sums, uint64_t rank) {
  uint64_t before = 0, threshold = 0;
  const int bin = bin_of_rank(bins, part_sums, rank, &before);
  if (bin >= 0) {
    const unsigned count = bins[bin];
    const float below = 1.0f - static_cast<float>(rank - before) / static_cast<float>(count);
    constexpr uint64_t bin_width = uint64_t{1} << (64 - kDigitBits);
    threshold = static_cast<uint64_t>(bin) * bin_width + static_cast<uint64_t>(below * 4096.0f) * (bin_width / 4096);
  }
  state.words[kThreshold] = threshold;
}

// After a full pass: done, or a better threshold, or one digit more of the k-th key.
__device__ __forceinline__ void refine(const TopkState& state, Shared<const unsigned> bins,
                                       Shared<const unsigned> part_sums, uint64_t k, uint64_t capacity) {
  const uint64_t above = state.words[kAbove], appended = state.words[kAppended], prefix = state.words[kPrefix];
  const int prefix_shift = static_cast<int>(static_cast<uint64_t>(state.words[kPrefixShift]));
  uint64_t before = 0;
  const int bin = bin_of_rank(bins, part_sums, k - above, &before);
  const uint64_t wanted = bin >= 0 ? k : above + before;
  if (appended >= wanted && appended <= capacity) {
    state.words[kDone] = 1;
    return;
  }
  state.words[kAppended] = 0;
  if (bin < 0) {  // fewer candidates than k: all of them
    state.words[kThreshold] = 0;
    return;
  }
  const int shift = max(prefix_shift - kDigitBits, 0), width = prefix_shift - shift;
  const unsigned count = bins[bin];
  const uint64_t longer = (prefix_shift == 64 ? 0 : prefix << width) | static_cast<uint64_t>(bin);
  if (above + before + count <= capacity) {
    state.words[kThreshold] = longer << shift;
    return;
  }
  state.words[kThreshold] = ~uint64_t{0};
  state.words[kPrefix] = longer;
  state.words[kPrefixShift] = static_cast<uint64_t>(shift);
  state.words[kAbove] = above + before;
}

__global__ void __launch_bounds__(kThreads)
    decide_kernel(TopkState state, bool after_sample, uint64_t k, uint64_t capacity) {
  ILNAS_SHARED(unsigned, bins, kBins);
  ILNAS_SHARED(unsigned, part_sums, kThreads);
  const uint64_t done = state.words[kDone];
  if (done != 0) return;
  unsigned sum = 0;
  for (int i = 0; i < kBins / kThreads; ++i) {
    const int bin = threadIdx.x * (kBins / kThreads) + i;
    const unsigned count = state.bins[bin];
    bins[bin] = count;
    sum += count;
    state.bins[bin] = 0;
  }
  part_sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (after_sample)
    guess_threshold(state, bins, part_sums, k);
  else
    refine(state, bins, part_sums, k, capacity);
}

TopkState state_of(void* state) {
  return {static_cast<uint64_t*>(state), reinterpret_cast<unsigned*>(static_cast<uint64_t*>(state) + kStateWords)};
}

}  // namespace

int64_t topk_state_bytes() { return (8 * kStateWords + 4 * kBins + 15) / 16 * 16; }

cudaError_t launch_topk_start(void* state, bool everything, cudaStream_t stream) {
  const uint64_t threshold = everything ? 0 : ~uint64_t{0};
  return ILNAS_LAUNCH(start_kernel, dim3(1), dim3(kThreads), 0, stream, state_of(state), threshold);
}

cudaError_t launch_topk_filter(const FilterArguments& a, void* state, const float* panel, const int32_t* row_ptr,
                               const int32_t* col, uint64_t* buffer, cudaStream_t stream) {
  const FilterCall call{a, state_of(state), panel, row_ptr, col, buffer};
  const size_t bitmap = size_t{kTileRows} * static_cast<size_t>(a.tiles.tiles_per_unit) * kTileCols / 8;
  return ILNAS_LAUNCH(filter_kernel, dim3(static_cast<unsigned>(a.units.count)), dim3(kThreads), bitmap, stream, call);
}

cudaError_t launch_topk_decide(void* state, bool after_sample, int64_t k, int64_t capacity, cudaStream_t stream) {
  return ILNAS_LAUNCH(decide_kernel, dim3(1), dim3(kThreads), 0, stream, state_of(state), after_sample,
                      static_cast<uint64_t>(k), static_cast<uint64_t>(capacity));
}

}  // namespace ilnas::cuda
