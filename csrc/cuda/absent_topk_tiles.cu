#include "cuda/absent_topk.cuh"
#include "cuda/masked_conv2d_routes.h"

namespace ilnas::cuda {
namespace {

constexpr int kThreads = 256, kDepth = 8;  // positions a step: with 16 the registers do not suffice
constexpr int kPadding = 4;
constexpr int kOutside = -(1 << 30);  // a coordinate that no image has, whatever is added to it

template <class S>
struct TilesCall {
  Gather g;  // the forward's
  Global<const S> grad_out, x;
  Global<const uint64_t> state_words;
  Global<float> panel;
  TopkTiles tiles;
  TopkPanel units;
  bool images_innermost;
};

// The sums run over (image, row, column); digits[0] runs fastest. kDepth threads keep a position each, in shared memory
// because the sums need the registers.
template <class S>
__device__ __forceinline__ int extent_of_digit(const TilesCall<S>& c, int digit) {
  if (c.images_innermost) return digit == 0 ? static_cast<int>(c.g.batch) : digit == 1 ? c.g.width : c.g.height;
  return digit == 0 ? c.g.width : digit == 1 ? c.g.height : static_cast<int>(c.g.batch);
}

template <class S>
__device__ __forceinline__ void set_position(const TilesCall<S>& c, Shared<int> digits, int64_t position) {
  const int first = extent_of_digit(c, 0), second = extent_of_digit(c, 1);
  digits[0] = static_cast<int>(position % first);
  digits[1] = static_cast<int>(position / first % second);
  digits[2] = static_cast<int>(position / first / second);
}

// digits += step, with carries.
template <class S>
__device__ __forceinline__ void advance(const TilesCall<S>& c, Shared<int> digits, Shared<const int> step) {
  int carry = 0;
  for (int i = 0; i < 3; ++i) {
    int digit = digits[i];
    digit += step[i] + carry;
    carry = i < 2 && digit >= extent_of_digit(c, i) ? 1 : 0;
    digits[i] = carry != 0 ? digit - extent_of_digit(c, i) : digit;
  }
}

// The shared tables a block's loads go by. A position that does not count has its rows outside every image.
struct Tables {
  Shared<int64_t> grad_base, x_base, col_offset;
  Shared<int> y, x, col_y, col_x;
};

template <class S>
__device__ __forceinline__ void write_position(const TilesCall<S>& c, const Tables& t, int at, Shared<const int> digits,
                                               bool counts) {
  const int64_t image = digits[c.images_innermost ? 0 : 2];
  const int64_t oy = digits[c.images_innermost ? 2 : 1], ox = digits[c.images_innermost ? 1 : 0];
  const int64_t y = oy * c.g.vertical.scale + c.g.vertical.offset;
  const int64_t x = ox * c.g.horizontal.scale + c.g.horizontal.offset;
  t.grad_base[at] = image * c.g.target.batch + oy * c.g.target.row + ox * c.g.target.col;
  t.x_base[at] = image * c.g.source.batch + y * c.g.source.row + x * c.g.source.col;
  t.y[at] = counts ? static_cast<int>(y) : kOutside;
  t.x[at] = static_cast<int>(x);
}

// 64 rows by 128 columns of the weight gradient over one part of the positions, a thread four rows by eight columns.
template <class S, bool kChannelsInnermost>
__global__ void __launch_bounds__(kThreads, 2) gradient_tiles_kernel(TilesCall<S> c) {
  constexpr int kRowPitch = kTileRows + kPadding, kColPitch = kTileCols + kPadding;
  constexpr int kGradLoads = kTileRows * kDepth / kThreads, kImageLoads = kTileCols * kDepth / kThreads;
  ILNAS_SHARED(float, grads, 2 * kDepth * kRowPitch);
  ILNAS_SHARED(float, images, 2 * kDepth * kColPitch);
  ILNAS_SHARED(int64_t, grad_base, 2 * kDepth);
  ILNAS_SHARED(int64_t, x_base, 2 * kDepth);
  ILNAS_SHARED(int, position_y, 2 * kDepth);
  ILNAS_SHARED(int, position_x, 2 * kDepth);
  ILNAS_SHARED(int64_t, col_offset, kTileCols);
  ILNAS_SHARED(int, col_y, kTileCols);
  ILNAS_SHARED(int, col_x, kTileCols);
  ILNAS_SHARED(int, digits, 3 * kDepth);  // two steps ahead of the sums
  ILNAS_SHARED(int, step, 3);
  const uint64_t done = c.state_words[kDone];
  if (done != 0) return;

  const Gather& g = c.g;
  const Tables tables{grad_base, x_base, col_offset, position_y, position_x, col_y, col_x};
  const int thread = threadIdx.x, part = blockIdx.y;
  const int64_t in_panel = blockIdx.x / c.tiles.tiles_per_unit;
  const int sub_tile = blockIdx.x % c.tiles.tiles_per_unit;
  const TopkUnit unit = topk_unit(c.units.first + in_panel * c.units.step, c.tiles);
  const int taps = g.kernel_height * g.kernel_width;
  const int first_col = unit.first_col + sub_tile * kTileCols;
  const int cols = min(g.sources_per_group * taps, unit.first_col + c.tiles.unit_cols);
  const int rows = min(kTileRows, g.rows_per_group - unit.first_row);
  const Global<const S> grad_rows =
      c.grad_out + (int64_t{unit.group} * g.rows_per_group + unit.first_row) * g.target.channel;
  const Global<const S> x = c.x + int64_t{unit.group} * g.sources_per_group * g.source.channel;

  if (thread < kTileCols) {
    const int col = first_col + thread, tap = col % taps;
    const int dy = tap / g.kernel_width * g.vertical.dilation, dx = tap % g.kernel_width * g.horizontal.dilation;
    col_offset[thread] = col / taps * g.source.channel + dy * g.source.row + dx * g.source.col;
    col_y[thread] = col < cols ? dy : kOutside;
    col_x[thread] = dx;
  }

  const int64_t positions = g.batch * g.height * g.width;
  const int64_t begin = positions * part / c.tiles.splits, end = positions * (part + 1) / c.tiles.splits;
  const int64_t steps = (end - begin + kDepth - 1) / kDepth;
  const Shared<int> own_digits = digits + 3 * (thread % kDepth);
  if (thread == 0) set_position(c, step, kDepth);
  __syncthreads();
  if (thread < kDepth) {
    set_position(c, own_digits, begin + thread);
    for (int i = 0; i < 2; ++i) {
      write_position<S>(c, tables, i * kDepth + thread, own_digits, begin + i * kDepth + thread < end);
      advance<S>(c, own_digits, step);
    }
  }
  __syncthreads();

  float next_grads[kGradLoads], next_images[kImageLoads];
  const auto load = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kGradLoads; ++i) {
      const int e = i * kThreads + thread;
      const int row = kChannelsInnermost ? e % kTileRows : e / kDepth;
      const int at = buffer * kDepth + (kChannelsInnermost ? e / kTileRows : e % kDepth);
      const int y = tables.y[at];
      next_grads[i] = 0;
      if (row < rows && y != kOutside) {
        const int64_t base = tables.grad_base[at];
        next_grads[i] = to_float(load_readonly<S>(grad_rows + (base + row * g.target.channel)));
      }
    }
#pragma unroll
    for (int i = 0; i < kImageLoads; ++i) {
      const int e = i * kThreads + thread;
      const int col = kChannelsInnermost ? e % kTileCols : e / kDepth;
      const int at = buffer * kDepth + (kChannelsInnermost ? e / kTileCols : e % kDepth);
      const int y = tables.y[at] + tables.col_y[col], ix = tables.x[at] + tables.col_x[col];
      next_images[i] = 0;
      if (y >= 0 && y < g.source_height && ix >= 0 && ix < g.source_width) {
        const int64_t base = tables.x_base[at];
        next_images[i] = to_float(load_readonly<S>(x + (base + tables.col_offset[col])));
      }
    }
  };
  const auto store = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kGradLoads; ++i) {
      const int e = i * kThreads + thread;
      const int row = kChannelsInnermost ? e % kTileRows : e / kDepth;
      const int k = kChannelsInnermost ? e / kTileRows : e % kDepth;
      grads[(buffer * kDepth + k) * kRowPitch + row] = next_grads[i];
    }
#pragma unroll
    for (int i = 0; i < kImageLoads; ++i) {
      const int e = i * kThreads + thread;
      const int col = kChannelsInnermost ? e % kTileCols : e / kDepth;
      const int k = kChannelsInnermost ? e / kTileCols : e % kDepth;
      images[(buffer * kDepth + k) * kColPitch + col] = next_images[i];
    }
  };

  const int own_row = thread / 16 * 4, own_col = thread % 16 * 4;  // and own_col + kTileCols / 2
  float sum[4][8];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[i][j] = 0;

  if (steps > 0) {
    load(0);
    store(0);
  }
  __syncthreads();
  for (int64_t s = 0; s < steps; ++s) {
    const int buffer = static_cast<int>(s % 2);
    const bool more = s + 1 < steps;
    if (more) load(1 - buffer);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const float4 a = load_as<float4>(grads + ((buffer * kDepth + k) * kRowPitch + own_row));
      const float4 b0 = load_as<float4>(images + ((buffer * kDepth + k) * kColPitch + own_col));
      const float4 b1 = load_as<float4>(images + ((buffer * kDepth + k) * kColPitch + own_col + kTileCols / 2));
      const float left[4] = {a.x, a.y, a.z, a.w}, right[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
    }
    if (more) store(1 - buffer);
    if (thread < kDepth) {  // the step after the next one takes this step's place
      write_position<S>(c, tables, buffer * kDepth + thread, own_digits, begin + (s + 2) * kDepth + thread < end);
      advance<S>(c, own_digits, step);
    }
    __syncthreads();
  }

  const Global<float> to =
      c.panel + ((in_panel * c.tiles.tiles_per_unit + sub_tile) * c.tiles.splits + part) * kTileSize;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Global<float> row = to + ((own_row + i) * kTileCols + own_col);
    store_as<float4>(row, make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
    store_as<float4>(row + kTileCols / 2, make_float4(sum[i][4], sum[i][5], sum[i][6], sum[i][7]));
  }
}

}  // namespace

cudaError_t launch_gradient_tiles(DType dtype, const Gather& g, const void* grad_out, const void* x,
                                  const TopkTiles& tiles, const TopkPanel& units, const uint64_t* state_words,
                                  float* panel, cudaStream_t stream) {
  const cudaError_t error =
      launch_gradient_tiles_tensor(dtype, g, grad_out, x, tiles, units, state_words, panel, stream);
  if (error != cudaErrorNotSupported) return error;
  return with_stored_type(dtype, [&](auto stored) {
    using S = decltype(stored);
    const Contiguous order = contiguous_of(g.source);
    const TilesCall<S> call{g,     static_cast<const S*>(grad_out), static_cast<const S*>(x), state_words, panel, tiles,
                            units, order == Contiguous::kImages};
    const dim3 grid(static_cast<unsigned>(units.count * tiles.tiles_per_unit), static_cast<unsigned>(tiles.splits));
    if (order == Contiguous::kChannels)
      return ILNAS_LAUNCH((gradient_tiles_kernel<S, true>), grid, dim3(kThreads), 0, stream, call);
    return ILNAS_LAUNCH((gradient_tiles_kernel<S, false>), grid, dim3(kThreads), 0, stream, call);
  });
}

}  // namespace ilnas::cuda
