// How a convolution is cut into pieces that fit in cache.
//
// The forward pass and the gradient of the input are one problem: every output position sums taps of an input image.
// A "tile position" stands for `spread` x `spread` output positions (stride of the transposed problem, else one), and
// reads a window of the input that moves by `step` (stride of the forward problem, else one) from one to the next.
//
// Lanes of a register hold the same tile position of different patches: (image, region) pairs. A region is a rectangle
// of tile positions; its window of the input is packed as [channel][row][column][lane] into a panel. Where step > 1,
// rows and columns that one tap reads lie side by side: window place p goes to phase p % step, row p / step of it.
#pragma once
#include "cpu/convert.inl"
#include "cpu/kernels.h"
#include "cpu/stream.inl"

#if defined(__GNUC__)
#define ILNAS_INLINE inline __attribute__((always_inline))
#else
#define ILNAS_INLINE inline
#endif

namespace ilnas {
namespace ILNAS_ISA {
namespace {

#if defined(ILNAS_ISA_AVX512)
constexpr int kTileRows = 4, kTileCols = 4;  // 16 sums, the weight and operands in 32 registers
#elif defined(ILNAS_ISA_AVX2)
constexpr int kTileRows = 3, kTileCols = 4;  // 12 sums in 16 registers
#else
constexpr int kTileRows = 2, kTileCols = 4;
#endif
constexpr int kTileSize = kTileRows * kTileCols;
constexpr int kMaxLanes = Vec<float>::lanes;

inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}
// To the second-level cache only: lines of several images often share one set of the first, which holds fewer of them
// than there are lanes.
inline void prefetch_far(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Axis {
  int64_t in, out, kernel, stride, pad, dilation;
  bool transposed;  // `in` is the layer's output and `out` its input

  int64_t step() const { return transposed ? 1 : stride; }
  int64_t spread() const { return transposed ? stride : 1; }
  int64_t positions() const { return ceil_div(out, spread()); }
  // Which of the `spread` output positions of a tile position tap k contributes to.
  int64_t residue(int64_t k) const { return transposed ? floor_mod(k * dilation - pad, stride) : 0; }
  // The input position that tap k of tile position 0 reads.
  int64_t source(int64_t k) const {
    return transposed ? (residue(k) + pad - k * dilation) / stride : k * dilation - pad;
  }
  // The input position of window place 0 of tile position 0, and the place that tap k reads.
  int64_t origin() const { return source(transposed ? kernel - 1 : 0); }
  int64_t lead(int64_t k) const { return source(k) - origin(); }
  int64_t reach() const { return lead(transposed ? 0 : kernel - 1); }
  // Where phase p lies among the phases that some tap reads; -1 if none does.
  int64_t phase_index(int64_t phase) const {
    int64_t before = 0;
    for (int64_t k = 0; k < kernel; ++k) {
      if (lead(k) % step() == phase) return before;
      bool seen = false;
      for (int64_t i = 0; i < k && !seen; ++i) seen = lead(i) % step() == lead(k) % step();
      before += !seen;
    }
    return -1;
  }
  int64_t phases() const {
    int64_t count = 0;
    for (int64_t phase = 0; phase < step() && count < kernel; ++phase) count += phase_index(phase) >= 0;
    return count;
  }
};

struct TiledConv {
  int64_t batch, in_channels, out_channels, groups;
  Axis rows, cols;
  ImageView in, out;
  bool adds = false;  // to what `out` holds

  int64_t residues() const { return rows.spread() * cols.spread(); }
  int64_t taps() const { return rows.kernel * cols.kernel; }
};

inline TiledConv forward_problem(const Conv2dShape& s, const ImageView& x, const ImageView& out) {
  return {s.batch,
          s.in_channels,
          s.out_channels,
          s.groups,
          {s.height, s.out_height, s.kernel_height, s.stride_height, s.pad_top, s.dilation_height, false},
          {s.width, s.out_width, s.kernel_width, s.stride_width, s.pad_left, s.dilation_width, false},
          x,
          out};
}

inline TiledConv transposed_problem(const Conv2dShape& s, const ImageView& grad_out, const ImageView& grad_x) {
  return {s.batch,
          s.out_channels,
          s.in_channels,
          s.groups,
          {s.out_height, s.height, s.kernel_height, s.stride_height, s.pad_top, s.dilation_height, true},
          {s.out_width, s.width, s.kernel_width, s.stride_width, s.pad_left, s.dilation_width, true},
          grad_out,
          grad_x};
}

// Sizes that a second-level cache of 1 to 2 MB and a first-level cache of 48 KB (32 KB: at a small loss) hold.
constexpr int64_t kSumsBytes = 1 << 20;     // the sums of a region
constexpr int64_t kPanelBytes = 512 << 10;  // a packed block of channels
// The same where the sums do not fit: each block reads and writes them beyond the second level, so blocks are few.
constexpr int64_t kLargePanelBytes = 5 * kPanelBytes;
constexpr int64_t kBlockBytes = 37 << 10;  // of it, the windows of one tile
constexpr int64_t kMaxCols = 32;
// Live weights of an output in a block, below which loading and storing its sums costs more than first-level hits gain.
constexpr double kMinEntries = 14;

// Sizes of everything, in elements of the sums unless said otherwise.
struct Tiling {
  int lanes;
  int64_t rows, cols;                // tile positions of a region
  int64_t region_rows, region_cols;  // regions of an image
  int64_t tile_rows, tile_cols;      // tiles of a region
  int64_t panel_rows, panel_cols;    // of the packed window of a channel, phases side by side
  int64_t phase_rows, phase_cols;    // of one phase
  int64_t channel_pitch;             // of the panel; its last vector takes what no tap reads
  int64_t block_channels, blocks;    // channels packed and computed at once

  int64_t row_pitch() const { return panel_cols * lanes; }
  int64_t tiles() const { return tile_rows * tile_cols; }
  int64_t tile_first_row(int64_t i) const { return i * rows / tile_rows; }
  int64_t tile_first_col(int64_t i) const { return i * cols / tile_cols; }
  int64_t patches(const TiledConv& c) const { return c.batch * region_rows * region_cols; }
  int64_t units(const TiledConv& c) const { return ceil_div(patches(c), lanes); }
  int64_t sums_pitch() const { return int64_t{kTileSize} * lanes; }
  int64_t sums_size(const TiledConv& c) const { return c.residues() * tiles() * c.out_channels * sums_pitch(); }
  template <class S>
  bool streams_out(const TiledConv& c) const {
    return is_large(c.batch * c.out_channels * c.rows.out * c.cols.out * int64_t{sizeof(S)});
  }
  int64_t panel_size() const { return block_channels * channel_pitch; }
};

inline void set_region(const TiledConv& c, int64_t rows, int64_t cols, Tiling& t) {
  t.region_rows = ceil_div(c.rows.positions(), rows), t.region_cols = ceil_div(c.cols.positions(), cols);
  t.rows = ceil_div(c.rows.positions(), t.region_rows), t.cols = ceil_div(c.cols.positions(), t.region_cols);
  t.tile_rows = ceil_div(t.rows, kTileRows), t.tile_cols = ceil_div(t.cols, kTileCols);
  t.phase_rows = t.rows + c.rows.reach() / c.rows.step(), t.phase_cols = t.cols + c.cols.reach() / c.cols.step();
  t.panel_rows = t.phase_rows * c.rows.phases(), t.panel_cols = t.phase_cols * c.cols.phases();
  t.channel_pitch = (t.panel_rows * t.panel_cols + 1) * t.lanes;
}

// density: live weights per position of the weight.
template <class A>
Tiling choose_tiling(const TiledConv& c, double density, int64_t threads) {
  Tiling t{};
  t.lanes = Vec<A>::lanes;
  const int64_t all_rows = c.rows.positions(), all_cols = c.cols.positions();
  int64_t cols = ceil_div(all_cols, ceil_div(all_cols, kMaxCols)), rows = all_rows;
  const bool overlap = c.rows.reach() > 0 || c.cols.reach() > 0;
  const auto fits = [&] {
    set_region(c, rows, cols, t);
    const bool whole_panel = overlap || c.in_channels * t.channel_pitch * int64_t{sizeof(A)} <= kPanelBytes;
    return whole_panel && t.sums_size(c) * int64_t{sizeof(A)} <= kSumsBytes;
  };
  while (!fits() && rows > kTileRows) rows = ceil_div(rows, 2) < kTileRows ? kTileRows : ceil_div(rows, 2);
  // Few images: smaller regions fill the lanes and feed the threads.
  while (t.patches(c) < t.lanes * threads && rows * cols > 4) {
    if (cols > rows)
      cols = ceil_div(cols, 2);
    else
      rows = ceil_div(rows, 2);
    set_region(c, rows, cols, t);
  }
  const int64_t tile_window = (c.rows.phases() * (smaller(t.rows, kTileRows) + c.rows.reach() / c.rows.step())) *
                              (c.cols.phases() * (smaller(t.cols, kTileCols) + c.cols.reach() / c.cols.step()));
  // Enough live weights of an output in a block, or loading and storing its sums costs more than L1 gains.
  const double wanted = kMinEntries / (density * double(c.taps()) + 1e-9);
  int64_t channels = kBlockBytes / (tile_window * t.lanes * int64_t{sizeof(A)});
  if (double(channels) < wanted)
    channels = wanted < double(c.in_channels) ? static_cast<int64_t>(wanted) : c.in_channels;
  const int64_t panel = t.sums_size(c) * int64_t{sizeof(A)} <= kSumsBytes ? kPanelBytes : kLargePanelBytes;
  channels = smaller(channels, panel / (t.channel_pitch * int64_t{sizeof(A)}));
  channels = larger(1, smaller(channels, c.in_channels));
  t.blocks = larger(1, ceil_div(c.in_channels, channels));
  t.block_channels = larger(1, ceil_div(c.in_channels, t.blocks));
  // Whole registers of channels, for images in which channels are neighbours.
  if (channels > t.lanes && t.blocks > 1) {
    t.block_channels = smaller(ceil_div(t.block_channels, t.lanes), channels / t.lanes) * t.lanes;
    t.blocks = ceil_div(c.in_channels, t.block_channels);
  }
  return t;
}

// Whether the last regions reach beyond the image, and the same tiling with regions that divide it.
inline bool overhangs(const TiledConv& c, const Tiling& t) {
  return t.region_rows * t.rows > c.rows.positions() || t.region_cols * t.cols > c.cols.positions();
}
inline int64_t largest_divisor(int64_t of, int64_t most) {
  while (of % most != 0) --most;
  return most;
}
inline Tiling without_overhang(const TiledConv& c, const Tiling& t) {
  Tiling exact = t;
  set_region(c, largest_divisor(c.rows.positions(), t.rows), largest_divisor(c.cols.positions(), t.cols), exact);
  return exact;
}

// The vector of a channel's panel that tap (i, k) of the region's first tile position reads.
inline int64_t tap_slot(const TiledConv& c, const Tiling& t, int64_t i, int64_t k) {
  const int64_t lead_row = c.rows.lead(i), lead_col = c.cols.lead(k);
  const int64_t row = c.rows.phase_index(lead_row % c.rows.step()) * t.phase_rows + lead_row / c.rows.step();
  const int64_t col = c.cols.phase_index(lead_col % c.cols.step()) * t.phase_cols + lead_col / c.cols.step();
  return row * t.panel_cols + col;
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
