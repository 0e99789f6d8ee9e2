// Tiles of a convolution's dense weight gradient, never all of them at once:
//   tile[column, o] = sum over the output pixels p of x[channel, place of p and tap] * grad_out[o, p].
//
// Outputs are the SIMD lanes. Of x a zero-padded piece is packed, in which every column (channel, tap) is a shift of
// the pixels' places, so nothing is copied per tap. Pixels come in chunks; a tile's sums wait in cache between them.
// The order of every sum depends on the shape alone.
#pragma once
#include "cpu/absent_images.inl"
#include "cpu/panels.inl"
#include "cpu/scratch.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// The register tile: columns by vectors of outputs. 24 of 32 registers, or 12 of 16, hold sums.
#if defined(ILNAS_ISA_AVX512)
constexpr int tile_columns = 8, tile_vectors = 3;
#else
constexpr int tile_columns = 6, tile_vectors = 2;
#endif
// Pixels per chunk at most. A chunk of few outputs takes them all, for longer runs of memory; of many outputs half, so
// that a panel of grad_out stays in L1 and a chunk in L2.
constexpr int64_t most_pixels = 256;
constexpr int64_t few_outputs = 256;

// sums[column][V * lanes] (+)= over pixels of x[column][place[p]] * grad[p][V * lanes].
template <int V, class A>
void add_products(const A* const (&x)[tile_columns], const int32_t* place, int64_t pixels, const A* grad, bool resume,
                  A* sums, int64_t step) {
  constexpr int lanes = Vec<A>::lanes;
  Vec<A> acc[tile_columns][V];
  for (int m = 0; m < tile_columns; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = Vec<A>::zero();
  for (int64_t p = 0; p < pixels; ++p, grad += V * lanes) {
    const int64_t at = place[p];
    Vec<A> g[V];
    for (int v = 0; v < V; ++v) g[v] = Vec<A>::load(grad + v * lanes);
    for (int m = 0; m < tile_columns; ++m) {
      const Vec<A> value = Vec<A>::set1(x[m][at]);
      for (int v = 0; v < V; ++v) acc[m][v] = fma(value, g[v], acc[m][v]);
    }
  }
  if (resume)
    for (int m = 0; m < tile_columns; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] = acc[m][v] + Vec<A>::load(sums + m * step + v * lanes);
  for (int m = 0; m < tile_columns; ++m)
    for (int v = 0; v < V; ++v) acc[m][v].store(sums + m * step + v * lanes);
}

// The pixels of an image batch as runs of one stride: rows, whole images or the whole batch.
struct PixelRuns {
  int64_t length, stride;  // pixels in a run, elements from pixel to pixel
  int64_t runs_per_image, batch_stride, run_stride;

  static PixelRuns of(const ImageView& v, int64_t batch, int64_t height, int64_t width) {
    PixelRuns r{width, v.col_stride, height, v.batch_stride, v.row_stride};
    if (width == 1 || height == 1 || v.row_stride == width * v.col_stride) {
      if (width == 1) r.stride = v.row_stride;
      r.length = width * height, r.runs_per_image = 1;
      if (r.length == 1) r.stride = v.batch_stride;
      if (r.length == 1 || v.batch_stride == r.length * r.stride) r.length *= batch;
    }
    return r;
  }
  int64_t offset(int64_t pixel) const {
    const int64_t run = pixel / length;
    return run / runs_per_image * batch_stride + run % runs_per_image * run_stride + pixel % length * stride;
  }
  // How many pixels from `pixel` on, at most `count`, lie in its run.
  int64_t left(int64_t pixel, int64_t count) const {
    const int64_t rest = length - pixel % length;
    return rest < count ? rest : count;
  }
};

// Pixel by pixel, where the outputs of one lie side by side: whole rows are read at once.
template <class S>
void pack_contiguous_outputs(const S* from, int64_t stride, int64_t count, const PanelSplit& panels, int64_t pixels,
                             int64_t done, Sum<S>* to) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  for (int64_t p = 0; p < count; ++p, from += stride)
    for (int64_t panel = 0; panel < panels.panels; ++panel) {
      const int64_t first = panels.first(panel) * lanes, size = panels.width(panel) * lanes;
      for (int64_t i = 0; i < size; i += lanes)
        load_widened(from + first + i).store(to + first * pixels + (done + p) * size + i);
    }
}

// grad_out of `pixels` pixels from `first` on, and of the first `outputs` outputs, as panels of at most tile_vectors
// vectors: to[panel][pixel][width * lanes].
template <class S>
void pack_grad(const ImageView& grad_out, const PixelRuns& runs, int64_t first, int64_t pixels, int64_t outputs,
               const PanelSplit& panels, Sum<S>* to) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  for (int64_t done = 0, count; done < pixels; done += count) {
    count = runs.left(first + done, pixels - done);
    const S* from = static_cast<const S*>(grad_out.data) + runs.offset(first + done);
    const PanelMatrix m{const_cast<S*>(from), 1, outputs, 0, runs.stride, grad_out.channel_stride};
    if (m.place_stride == 1 && outputs % lanes == 0) {
      pack_contiguous_outputs<S>(from, runs.stride, count, panels, pixels, done, to);
      continue;
    }
    for (int64_t panel = 0; panel < panels.panels; ++panel) {
      const int64_t width = panels.width(panel), v = panels.first(panel);
      for (int64_t i = 0; i < width; ++i)
        pack_vector<S>(m, v + i, 0, count, to + v * lanes * pixels + done * width * lanes + i * lanes, width * lanes);
    }
  }
}

// How the pixels are cut into chunks and what of x a chunk needs. A chunk is `rows_at_once` output rows by
// `cols_at_once` of their columns; with kernels of one place it is any run of pixels.
struct ChunkPlan {
  bool pointwise;
  int64_t pixels;      // in a chunk, at most
  int64_t image_rows;  // output rows of an image; with kernels of one place, pixels
  int64_t row_chunks, rows_at_once, col_chunks, cols_at_once;
  int64_t piece_width, places;  // packed width of an input row, places of a channel at most

  static ChunkPlan of(const Conv2dShape& s, const PixelRuns& runs, int64_t outputs) {
    ChunkPlan c{};
    c.pixels = outputs <= few_outputs ? most_pixels : most_pixels / 2;
    const int64_t all_pixels = s.batch * s.out_height * s.out_width;
    if (all_pixels == 0) return c;
    c.pointwise = s.kernel_height == 1 && s.kernel_width == 1 && s.stride_height == 1 && s.stride_width == 1 &&
                  s.pad_top == 0 && s.pad_left == 0 && s.out_height == s.height && s.out_width == s.width;
    c.image_rows = c.pointwise ? s.out_height * s.out_width : s.out_height;
    if (c.pointwise) {
      c.row_chunks = (all_pixels + c.pixels - 1) / c.pixels, c.rows_at_once = c.pixels;
      c.col_chunks = 1, c.cols_at_once = 1;
      // Each run begins at a whole vector.
      c.places = c.pixels + (c.pixels / runs.length + 2) * Vec<float>::lanes;
      return c;
    }
    const int64_t rows = s.batch * s.out_height;
    c.cols_at_once = s.out_width < c.pixels ? s.out_width : c.pixels;
    c.col_chunks = (s.out_width + c.cols_at_once - 1) / c.cols_at_once;
    c.rows_at_once = c.pixels / c.cols_at_once;
    c.row_chunks = (rows + c.rows_at_once - 1) / c.rows_at_once;
    c.piece_width = (c.cols_at_once - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1;
    const int64_t images = c.rows_at_once / s.out_height + 2;
    c.places = c.piece_width * (c.rows_at_once * s.stride_height +
                                images * ((s.kernel_height - 1) * s.dilation_height + s.stride_height));
    return c;
  }
  // The rows of a chunk begin here; how many there are.
  int64_t first_row(int64_t row_chunk) const { return row_chunk * rows_at_once; }
  int64_t rows(const Conv2dShape& s, int64_t row_chunk) const {
    return smaller(rows_at_once, s.batch * image_rows - first_row(row_chunk));
  }
  // Images that a chunk concerns, at most.
  int64_t images() const { return (rows_at_once - 2 + image_rows) / image_rows + 1; }
  // How far a tap lies from its pixel's place.
  int64_t tap_place(const Conv2dShape& s, int64_t tap) const {
    return tap / s.kernel_width * s.dilation_height * piece_width + tap % s.kernel_width * s.dilation_width;
  }
};

// One chunk of x: the places of its pixels, and channels packed [channel][places].
struct Chunk {
  int64_t pixels, places;
  int32_t place[most_pixels];
};

template <class S>
void pack_row(const S* from, int64_t stride, int64_t count, Sum<S>* to) {
  if (stride == 1) {
    constexpr int lanes = Vec<Sum<S>>::lanes;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) load_widened(from + i).storeu(to + i);
    if (i < count) load_first_widened(from + i, static_cast<int>(count - i)).store_first(to + i, count - i);
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
}

// Input rows from `row` and columns from `col` on of one image, zeros outside it: to[channel * step + ...]. Lines keep
// their places from chunk to chunk, so their ends beyond the image are zeroed again only if `clear_ends`.
template <class S>
void pack_piece(const Conv2dShape& s, const ImageView& x, int64_t image, int64_t channels, int64_t row, int64_t rows,
                int64_t col, int64_t width, bool clear_ends, Sum<S>* to, int64_t step) {
  const int64_t skip = col < 0 ? (-col < width ? -col : width) : 0;
  const int64_t inside = s.width - col < width ? s.width - col : width, count = inside > skip ? inside - skip : 0;
  const S* image_data = static_cast<const S*>(x.data) + image * x.batch_stride + (col + skip) * x.col_stride;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t r = 0; r < rows; ++r) {
      Sum<S>* line = to + c * step + r * width;
      const bool outside = row + r < 0 || row + r >= s.height || count == 0;
      if (outside || clear_ends)
        for (int64_t i = 0; i < width; ++i) line[i] = 0;
      if (!outside)
        pack_row(image_data + c * x.channel_stride + (row + r) * x.row_stride, x.col_stride, count, line + skip);
    }
}

// Packs `rows` rows from `first_row` on, and of their columns the chunk's, of `channels` channels; `step` elements lie
// between channels.
template <class S>
void pack_chunk(const Conv2dShape& s, const ChunkPlan& plan, const ImageView& x, int64_t first_row, int64_t rows,
                int64_t channels, int64_t col_chunk, Sum<S>* to, int64_t step, Chunk* chunk) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  int64_t base = 0;
  chunk->pixels = 0;
  if (plan.pointwise) {
    const PixelRuns runs = PixelRuns::of(x, s.batch, s.height, s.width);
    for (int64_t done = 0, count; done < rows; done += count) {
      count = runs.left(first_row + done, rows - done);
      const S* from = static_cast<const S*>(x.data) + runs.offset(first_row + done);
      const PanelMatrix m{const_cast<S*>(from), 1, count, 0, x.channel_stride, runs.stride};
      for (int64_t v = 0; v < m.vectors(lanes); ++v) pack_vector<S>(m, v, 0, channels, to + base + v * lanes, step);
      for (int64_t i = 0; i < count; ++i) chunk->place[done + i] = static_cast<int32_t>(base + i);
      base += m.vectors(lanes) * lanes;
    }
    chunk->pixels = rows;
    return;
  }
  const int64_t out_col = col_chunk * plan.cols_at_once, cols_left = s.out_width - out_col;
  const int64_t cols = cols_left < plan.cols_at_once ? cols_left : plan.cols_at_once;
  for (int64_t done = 0, count; done < rows; done += count) {
    const int64_t image = (first_row + done) / s.out_height, out_row = (first_row + done) % s.out_height;
    count = s.out_height - out_row < rows - done ? s.out_height - out_row : rows - done;
    const int64_t in_rows = (count - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1;
    pack_piece<S>(s, x, image, channels, out_row * s.stride_height - s.pad_top, in_rows,
                  out_col * s.stride_width - s.pad_left, plan.piece_width, plan.col_chunks > 1, to + base, step);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < cols; ++i)
        chunk->place[chunk->pixels++] =
            static_cast<int32_t>(base + r * s.stride_height * plan.piece_width + i * s.stride_width);
    base += in_rows * plan.piece_width;
  }
}

template <class A>
void add_products(int width, const A* const (&x)[tile_columns], const int32_t* place, int64_t pixels, const A* grad,
                  bool resume, A* sums, int64_t step) {
  static_assert(tile_vectors <= 3);
  if constexpr (tile_vectors >= 3)
    if (width == 3) return add_products<3>(x, place, pixels, grad, resume, sums, step);
  if (width == 2) return add_products<2>(x, place, pixels, grad, resume, sums, step);
  add_products<1>(x, place, pixels, grad, resume, sums, step);
}

// A rectangle of the weight: whole kernels of `channels` input channels by `outputs` outputs. output and channel are
// counted over all groups.
struct Tile {
  int64_t output, outputs, channel, channels;
};

// Work memory for tiles of at most `outputs` by `channels`.
template <class S>
struct TileMemory {
  using A = Sum<S>;
  int64_t x_step, step, columns, x_size, grad_size, sums_size;
  A *x, *grad, *sums;  // [channel][x_step], [panel][pixel][outputs], [column][step]
  int32_t* place;      // of each column, in x
  // Images turned over at once, and where to; null where they need not be or do not fit.
  int64_t images = 0, turned_x_size = 0, turned_grad_size = 0;
  S *turned_x = nullptr, *turned_grad = nullptr;

  TileMemory(const ChunkPlan& chunks, int64_t outputs, int64_t channels, int64_t taps)
      : x_step((chunks.places + 15) / 16 * 16),
        step((outputs + 15) / 16 * 16),
        columns((channels * taps + tile_columns - 1) / tile_columns * tile_columns),
        x_size(channels * x_step),
        grad_size(chunks.pixels * step),
        sums_size(columns * step) {}
  // Makes room for batch-last images within `most_bytes` in all.
  void turn_images(const Conv2dShape& s, const ChunkPlan& chunks, const ImageView& x, const ImageView& grad_out,
                   int64_t outputs, int64_t channels, int64_t most_bytes) {
    const int64_t x_image = is_batch_last(x, s.height, s.width) ? channels * s.height * s.width : 0;
    const int64_t grad_image =
        is_batch_last(grad_out, s.out_height, s.out_width) ? outputs * s.out_height * s.out_width : 0;
    if (x_image + grad_image == 0 || chunks.row_chunks == 0) return;
    const int64_t fit = (most_bytes - bytes()) / ((x_image + grad_image) * int64_t{sizeof(S)}) - 1;
    // A cache line's images, or what a large one leaves room for.
    images = smaller(s.batch, larger(kMaxLanes, chunks.images()));
    while (images > larger(0, fit)) images /= 2;
    if (images < smaller(s.batch, chunks.images())) return;
    turned_x_size = images * x_image, turned_grad_size = images * grad_image;
  }
  int64_t bytes() const {
    return Scratch::size<A>(x_size) + Scratch::size<A>(grad_size) + Scratch::size<A>(sums_size) +
           Scratch::size<int32_t>(columns) + Scratch::size<S>(turned_x_size) + Scratch::size<S>(turned_grad_size);
  }
  // data: bytes() bytes, aligned to 64.
  void take_from(char* data) {
    x = reinterpret_cast<A*>(data), data += Scratch::size<A>(x_size);
    grad = reinterpret_cast<A*>(data), data += Scratch::size<A>(grad_size);
    sums = reinterpret_cast<A*>(data), data += Scratch::size<A>(sums_size);
    place = reinterpret_cast<int32_t*>(data), data += Scratch::size<int32_t>(columns);
    if (turned_x_size > 0) turned_x = reinterpret_cast<S*>(data), data += Scratch::size<S>(turned_x_size);
    if (turned_grad_size > 0) turned_grad = reinterpret_cast<S*>(data);
  }
};

// The dense weight gradient of one tile, left in memory.sums[column][step].
template <class S>
void compute_tile(const Conv2dShape& s, const ChunkPlan& c, const ImageView& x, const ImageView& grad_out,
                  const Tile& tile, const TileMemory<S>& memory) {
  using A = Sum<S>;
  constexpr int lanes = Vec<A>::lanes;
  TileImages<S> from_x(x, s.batch, s.height, s.width, tile.channel, tile.channels, memory.images, memory.turned_x);
  TileImages<S> from_grad(grad_out, s.batch, s.out_height, s.out_width, tile.output, tile.outputs, memory.images,
                          memory.turned_grad);
  const PanelSplit panels = PanelSplit::of((tile.outputs + lanes - 1) / lanes, tile_vectors);
  const int64_t taps = s.kernel_height * s.kernel_width, columns = tile.channels * taps;
  // Columns beyond the last fill up the register tile; nobody reads them.
  for (int64_t column = 0; column < memory.columns; ++column)
    memory.place[column] =
        column < columns ? static_cast<int32_t>(column / taps * memory.x_step + c.tap_place(s, column % taps)) : 0;
  for (int64_t i = 0; i < tile.channels * memory.x_step; ++i) memory.x[i] = 0;
  if (c.row_chunks == 0)
    for (int64_t i = 0; i < columns * memory.step; ++i) memory.sums[i] = 0;
  Chunk chunk;
  for (int64_t number = 0; number < c.row_chunks * c.col_chunks; ++number) {
    const int64_t row_chunk = number / c.col_chunks, col_chunk = number % c.col_chunks;
    const int64_t first_row = c.first_row(row_chunk), rows = c.rows(s, row_chunk);
    const int64_t first_image = first_row / c.image_rows, last_image = (first_row + rows - 1) / c.image_rows;
    from_x.reach(first_image, last_image), from_grad.reach(first_image, last_image);
    pack_chunk<S>(s, c, from_x.view(), first_row - from_x.first() * c.image_rows, rows, tile.channels, col_chunk,
                  memory.x, memory.x_step, &chunk);
    const int64_t grad_row = first_row - from_grad.first() * c.image_rows;
    const int64_t first = c.pointwise ? grad_row : grad_row * s.out_width + col_chunk * c.cols_at_once;
    pack_grad<S>(from_grad.view(), PixelRuns::of(from_grad.view(), s.batch, s.out_height, s.out_width), first,
                 chunk.pixels, tile.outputs, panels, memory.grad);
    // A panel of grad_out stays in L1 while the much smaller columns of x pass by.
    for (int64_t panel = 0; panel < panels.panels; ++panel) {
      const int64_t output = panels.first(panel) * lanes;
      for (int64_t column = 0; column < columns; column += tile_columns) {
        const A* from[tile_columns];
        for (int m = 0; m < tile_columns; ++m) from[m] = memory.x + memory.place[column + m];
        add_products(panels.width(panel), from, chunk.place, chunk.pixels, memory.grad + output * chunk.pixels,
                     number > 0, memory.sums + column * memory.step + output, memory.step);
      }
    }
  }
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
