#include <limits>

#include "cuda/absent_topk.cuh"
#include "cuda/masked_conv2d_routes.h"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 16;                     // positions a step: the k of one product
constexpr int kSteps = kThreads / kDepth;      // whose positions are worked out at once, one by each thread
constexpr int kWarpRows = 32, kWarpCols = 32;  // of the tile, that one warp sums
constexpr int kWarpsAlongRows = kTileRows / kWarpRows;
constexpr int kRowTiles = kWarpRows / 16, kColTiles = kWarpCols / 8;
static_assert(kWarpsAlongRows * (kTileCols / kWarpCols) * 32 == kThreads, "every warp has a part of the tile");
// Bits of a position's word: the taps that meet the image there, and above them whether the position counts.
constexpr int kMaxTaps = 31;
constexpr unsigned kCounts = 1u << kMaxTaps;

template <class S>
struct TensorTilesCall {
  Gather g;  // the forward's
  Global<const S> grad_out, x;
  Global<const uint64_t> state_words;
  Global<float> panel;
  TopkTiles tiles;
  TopkPanel units;
  bool images_innermost;
  Divisor by_first, by_second;  // extents of the two digits of a position that run fastest
};

// Of two groups of kSteps steps: where a position's row of grad_out and of x begin, and its bits.
struct Positions {
  Shared<int64_t> grad, x;
  Shared<unsigned> bits;
};

// Positions run over (image, row, column), or with images innermost over (row, column, image).
template <class S>
__device__ __forceinline__ void write_position(const TensorTilesCall<S>& c, const Positions& to, int at,
                                               unsigned position, bool counts) {
  const Gather& g = c.g;
  unsigned digit0 = position, digit1 = split(digit0, c.by_first);
  const unsigned digit2 = split(digit1, c.by_second);
  const int64_t image = c.images_innermost ? digit0 : digit2;
  const int oy = static_cast<int>(c.images_innermost ? digit2 : digit1);
  const int ox = static_cast<int>(c.images_innermost ? digit1 : digit0);
  const int y = oy * g.vertical.scale + g.vertical.offset, x = ox * g.horizontal.scale + g.horizontal.offset;
  unsigned columns = 0, bits = 0;
  for (int kw = 0; kw < g.kernel_width; ++kw) {
    const int at_x = x + kw * g.horizontal.dilation;
    if (at_x >= 0 && at_x < g.source_width) columns |= 1u << kw;
  }
  for (int kh = 0; kh < g.kernel_height; ++kh) {
    const int at_y = y + kh * g.vertical.dilation;
    if (at_y >= 0 && at_y < g.source_height) bits |= columns << kh * g.kernel_width;
  }
  to.grad[at] = image * g.target.batch + oy * g.target.row + ox * g.target.col;
  to.x[at] = image * g.source.batch + y * g.source.row + x * g.source.col;
  to.bits[at] = counts ? bits | kCounts : 0;
}

// A staged operand is [lines][kDepth], or where neighbouring threads hold neighbouring channels [kDepth][lines]. Both
// pitches are odd multiples of 16 bytes, so that the eight rows of a matrix lie in different banks.
template <int kLines, bool kChannelsInnermost>
struct Staged {
  static constexpr int kPitch = (kChannelsInnermost ? kLines : kDepth) + 8;
  static constexpr int kSize = kPitch * (kChannelsInnermost ? kDepth : kLines);
  static constexpr int kLoads = kLines * kDepth / kThreads;

  // The line and the position of a thread's i-th load: one of the two is the same for all i.
  static __device__ __forceinline__ int line(int i, int thread) {
    return kChannelsInnermost ? thread % kLines : i * (kThreads / kDepth) + thread / kDepth;
  }
  static __device__ __forceinline__ int depth(int i, int thread) {
    return kChannelsInnermost ? i * (kThreads / kLines) + thread / kLines : thread % kDepth;
  }
  static __device__ __forceinline__ int place(int line, int depth) {
    return kChannelsInnermost ? depth * kPitch + line : line * kPitch + depth;
  }
  // fragment[2 h + d]: lines first + 8 h .., positions 8 d ..: rows of mma's a or columns of its b.
  template <class S>
  static __device__ __forceinline__ void fragments(uint32_t (&fragment)[4], Shared<const S> staged, int first,
                                                   int lane) {
    const int in_matrix = lane % 8, line = first + lane / 16 * 8, depth = lane / 8 % 2 * 8;
    if constexpr (kChannelsInnermost)
      ldmatrix_trans<4>(fragment, staged + place(line, depth + in_matrix));
    else
      ldmatrix<4>(fragment, staged + place(line + in_matrix, depth));
  }
};

// 64 rows by 128 columns of the weight gradient over one part of the positions, a warp 32 by 32.
template <class S, bool kChannelsInnermost>
__global__ void __launch_bounds__(kThreads, 2) gradient_tiles_tensor_kernel(TensorTilesCall<S> c) {
  using Grads = Staged<kTileRows, kChannelsInnermost>;
  using Images = Staged<kTileCols, kChannelsInnermost>;
  // Different columns of one thread; where channels are innermost it has only one.
  constexpr int kOwnColumns = kChannelsInnermost ? 1 : Images::kLoads;
  ILNAS_SHARED(S, grads, 2 * Grads::kSize);
  ILNAS_SHARED(S, images, 2 * Images::kSize);
  ILNAS_SHARED(int64_t, grad_at, 2 * kThreads);
  ILNAS_SHARED(int64_t, x_at, 2 * kThreads);
  ILNAS_SHARED(unsigned, bits_at, 2 * kThreads);
  const uint64_t done = c.state_words[kDone];
  if (done != 0) return;

  const Gather& g = c.g;
  const int thread = threadIdx.x, lane = lane_id(), warp = warp_id();
  const Positions positions{grad_at, x_at, bits_at};
  const int64_t in_panel = blockIdx.x / c.tiles.tiles_per_unit;
  const int sub_tile = blockIdx.x % c.tiles.tiles_per_unit;
  const TopkUnit unit = topk_unit(c.units.first + in_panel * c.units.step, c.tiles);
  const int taps = g.kernel_height * g.kernel_width;
  const int first_col = unit.first_col + sub_tile * kTileCols, first_channel = first_col / taps;
  const int cols = min(g.sources_per_group * taps, unit.first_col + c.tiles.unit_cols);
  const int rows = min(kTileRows, g.rows_per_group - unit.first_row);
  const Global<const S> grad_rows =
      c.grad_out + (int64_t{unit.group} * g.rows_per_group + unit.first_row) * g.target.channel;
  const Global<const S> x = c.x + (int64_t{unit.group} * g.sources_per_group + first_channel) * g.source.channel;
  const unsigned row_stride = static_cast<unsigned>(g.target.channel);

  unsigned column_offset[kOwnColumns], column_bit[kOwnColumns];
#pragma unroll
  for (int i = 0; i < kOwnColumns; ++i) {
    const int col = first_col + Images::line(i, thread), tap = col % taps;
    const int dy = tap / g.kernel_width * g.vertical.dilation, dx = tap % g.kernel_width * g.horizontal.dilation;
    column_offset[i] = col < cols ? static_cast<unsigned>((col / taps - first_channel) * g.source.channel +
                                                          dy * g.source.row + dx * g.source.col)
                                  : 0;
    column_bit[i] = col < cols ? 1u << tap : 0;
  }

  const int64_t all = g.batch * g.height * g.width;
  const unsigned begin = static_cast<unsigned>(all * blockIdx.y / c.tiles.splits);
  const unsigned end = static_cast<unsigned>(all * (blockIdx.y + 1) / c.tiles.splits);
  const int steps = static_cast<int>((end - begin + kDepth - 1) / kDepth);
  const auto write_group = [&](int group) {
    const unsigned position = begin + static_cast<unsigned>(group * kThreads + thread);
    write_position<S>(c, positions, group % 2 * kThreads + thread, min(position, end - 1), position < end);
  };
  if (steps > 0) write_group(0);
  __syncthreads();

  S next_grads[Grads::kLoads], next_images[Images::kLoads];
  const auto load = [&](int step) {
    const int first = step % (2 * kSteps) * kDepth;
    unsigned bits = 0;
    Global<const S> grad_from = grad_rows, x_from = x;
#pragma unroll
    for (int i = 0; i < Grads::kLoads; ++i) {
      const int row = Grads::line(i, thread);
      if (i == 0 || kChannelsInnermost) {
        const int at = first + Grads::depth(i, thread);
        bits = positions.bits[at];
        grad_from = grad_rows + static_cast<int64_t>(positions.grad[at]);
      }
      const bool counts = row < rows && (bits & kCounts) != 0;
      next_grads[i] = counts ? load_readonly<S>(grad_from + int64_t{row * row_stride}) : from_float<S>(0);
    }
#pragma unroll
    for (int i = 0; i < Images::kLoads; ++i) {
      const int own = kChannelsInnermost ? 0 : i;
      if (i == 0 || kChannelsInnermost) {
        const int at = first + Images::depth(i, thread);
        bits = positions.bits[at];
        x_from = x + static_cast<int64_t>(positions.x[at]);
      }
      const bool meets = (bits & column_bit[own]) != 0;
      next_images[i] = meets ? load_readonly<S>(x_from + int64_t{column_offset[own]}) : from_float<S>(0);
    }
  };
  const auto store = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < Grads::kLoads; ++i)
      grads[buffer * Grads::kSize + Grads::place(Grads::line(i, thread), Grads::depth(i, thread))] = next_grads[i];
#pragma unroll
    for (int i = 0; i < Images::kLoads; ++i)
      images[buffer * Images::kSize + Images::place(Images::line(i, thread), Images::depth(i, thread))] =
          next_images[i];
  };

  const int own_row = warp % kWarpsAlongRows * kWarpRows, own_col = warp / kWarpsAlongRows * kWarpCols;
  float sum[kRowTiles][kColTiles][4];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) sum[i][j][0] = sum[i][j][1] = sum[i][j][2] = sum[i][j][3] = 0;

  if (steps > 0) {
    load(0);
    store(0);
  }
  __syncthreads();
  for (int group = 0; group * kSteps < steps; ++group) {
    write_group(group + 1);  // wanted from the last step of this group on
#pragma unroll 1
    for (int step = group * kSteps; step < min((group + 1) * kSteps, steps); ++step) {
      const int buffer = step % 2;
      const bool more = step + 1 < steps;
      if (more) load(step + 1);
      uint32_t a[kRowTiles][4], b[kColTiles / 2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        Grads::template fragments<S>(a[i], grads + buffer * Grads::kSize, own_row + 16 * i, lane);
#pragma unroll
      for (int j = 0; j < kColTiles / 2; ++j)
        Images::template fragments<S>(b[j], images + buffer * Images::kSize, own_col + 16 * j, lane);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColTiles; ++j)
          mma_m16n8k16<S>(sum[i][j], a[i][0], a[i][2], a[i][1], a[i][3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      if (more) store(1 - buffer);
      __syncthreads();
    }
  }

  const Global<float> tile =
      c.panel + ((in_panel * c.tiles.tiles_per_unit + sub_tile) * c.tiles.splits + blockIdx.y) * kTileSize;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      const int row = own_row + 16 * i + lane / 4, col = own_col + 8 * j + lane % 4 * 2;
      const Global<float> to = tile + (row * kTileCols + col);
      store_as<float2>(to, make_float2(sum[i][j][0], sum[i][j][1]));
      store_as<float2>(to + 8 * kTileCols, make_float2(sum[i][j][2], sum[i][j][3]));
    }
}

// Whether positions fit 31 bits, and what a tile's rows and columns add to a position's address 32.
bool offsets_fit(const Gather& g) {
  constexpr int64_t most = std::numeric_limits<uint32_t>::max();
  const int64_t down = int64_t{g.kernel_height - 1} * g.vertical.dilation * g.source.row;
  const int64_t across = int64_t{g.kernel_width - 1} * g.horizontal.dilation * g.source.col;
  return g.batch * g.height * g.width < std::numeric_limits<int32_t>::max() - 2 * kThreads && g.source.channel >= 0 &&
         g.target.channel >= 0 && g.source.row >= 0 && g.source.col >= 0 &&
         kTileCols * g.source.channel + down + across < most && kTileRows * g.target.channel < most;
}

}  // namespace

cudaError_t launch_gradient_tiles_tensor(DType dtype, const Gather& g, const void* grad_out, const void* x,
                                         const TopkTiles& tiles, const TopkPanel& units, const uint64_t* state_words,
                                         float* panel, cudaStream_t stream) {
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits)) return error;
  if (!tensor_cores_take(dtype, limits.arch) || g.kernel_height * g.kernel_width > kMaxTaps || !offsets_fit(g))
    return cudaErrorNotSupported;
  const Contiguous order = contiguous_of(g.source);
  const bool images_innermost = order == Contiguous::kImages;
  const auto launch = [&](auto stored) {
    using S = decltype(stored);
    const TensorTilesCall<S> call{g,
                                  static_cast<const S*>(grad_out),
                                  static_cast<const S*>(x),
                                  state_words,
                                  panel,
                                  tiles,
                                  units,
                                  images_innermost,
                                  divisor_of(images_innermost ? g.batch : g.width),
                                  divisor_of(images_innermost ? g.width : g.height)};
    const dim3 grid(static_cast<unsigned>(units.count * tiles.tiles_per_unit), static_cast<unsigned>(tiles.splits));
    if (order == Contiguous::kChannels)
      return ILNAS_LAUNCH((gradient_tiles_tensor_kernel<S, true>), grid, dim3(kThreads), 0, stream, call);
    return ILNAS_LAUNCH((gradient_tiles_tensor_kernel<S, false>), grid, dim3(kThreads), 0, stream, call);
  };
  return dtype == DType::kFloat16 ? launch(Half{}) : launch(BFloat16{});
}

}  // namespace ilnas::cuda
