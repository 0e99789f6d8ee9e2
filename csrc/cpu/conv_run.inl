// One problem cut into units of `lanes` patches: their windows packed, their tiles computed, the results written back.
#pragma once
#include "cpu/conv_copy.inl"
#include "cpu/conv_lists.inl"
#include "cpu/conv_micro.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// Every place of the input window, or where few of many are read only those; unread places share one spare slot.
inline bool keeps_place(const Axis& axis, int64_t place, bool whole) {
  return whole || axis.phase_index(place % axis.step()) >= 0;
}
inline int64_t window_places(const Axis& axis, int64_t positions, bool whole) {
  int64_t count = 0;
  for (int64_t place = 0; place <= (positions - 1) * axis.step() + axis.reach(); ++place)
    count += keeps_place(axis, place, whole);
  return count;
}
// Whole runs of columns are worth loading up to this step.
inline bool whole_cols(const TiledConv& c) { return c.cols.step() <= 4; }

inline int64_t window_bytes(int64_t rows, int64_t cols) {
  return Scratch::size<int32_t>(rows) + Scratch::size<int32_t>(cols) + Scratch::size<int32_t>(rows * cols);
}
inline Window take_window(int64_t rows, int64_t cols, Scratch& scratch) {
  int32_t* row_place = scratch.take<int32_t>(rows);
  int32_t* col_place = scratch.take<int32_t>(cols);
  return {rows, cols, row_place, col_place, scratch.take<int32_t>(rows * cols)};
}

inline void list_places(const Axis& axis, bool whole, int64_t count, int32_t* place) {
  for (int64_t p = 0, k = 0; k < count; ++p)
    if (keeps_place(axis, p, whole)) place[k++] = static_cast<int32_t>(p);
}

inline void fill_input_window(const TiledConv& c, const Tiling& t, const Window& w) {
  list_places(c.rows, false, w.rows, w.row_place);
  list_places(c.cols, whole_cols(c), w.cols, w.col_place);
  const int64_t spare = t.panel_rows * t.panel_cols;
  for (int64_t j = 0; j < w.cols; ++j) {
    const int64_t col_phase = c.cols.phase_index(w.col_place[j] % c.cols.step());
    const int64_t col = col_phase * t.phase_cols + w.col_place[j] / c.cols.step();
    for (int64_t i = 0; i < w.rows; ++i) {
      const int64_t row =
          c.rows.phase_index(w.row_place[i] % c.rows.step()) * t.phase_rows + w.row_place[i] / c.rows.step();
      w.slot[i * w.cols + j] = static_cast<int32_t>((col_phase < 0 ? spare : row * t.panel_cols + col) * t.lanes);
    }
  }
}

// The tile along one axis that a position lies in.
inline int64_t tile_of(int64_t position, int64_t extent, int64_t tiles) {
  return ((position + 1) * tiles - 1) / extent;
}

// The sums lie as [residue][tile][output][tile position][lane].
inline int64_t sums_offset(const TiledConv& c, const Tiling& t, int64_t residue, int64_t tile) {
  return (residue * t.tiles() + tile) * c.out_channels * t.sums_pitch();
}

inline void fill_output_window(const TiledConv& c, const Tiling& t, const Window& w) {
  for (int64_t i = 0; i < w.rows; ++i) w.row_place[i] = static_cast<int32_t>(i);
  for (int64_t j = 0; j < w.cols; ++j) w.col_place[j] = static_cast<int32_t>(j);
  for (int64_t i = 0; i < w.rows; ++i)
    for (int64_t j = 0; j < w.cols; ++j) {
      const int64_t row = i / c.rows.spread(), col = j / c.cols.spread();
      const int64_t residue = i % c.rows.spread() * c.cols.spread() + j % c.cols.spread();
      const int64_t tile_row = tile_of(row, t.rows, t.tile_rows), tile_col = tile_of(col, t.cols, t.tile_cols);
      const int64_t inside = (row - t.tile_first_row(tile_row)) * kTileCols + col - t.tile_first_col(tile_col);
      w.slot[i * w.cols + j] =
          static_cast<int32_t>(sums_offset(c, t, residue, tile_row * t.tile_cols + tile_col) + inside * t.lanes);
    }
}

// The windows of a problem, the same for every unit.
struct Windows {
  Window in, out;
  static int64_t in_rows(const TiledConv& c, const Tiling& t) { return window_places(c.rows, t.rows, false); }
  static int64_t in_cols(const TiledConv& c, const Tiling& t) { return window_places(c.cols, t.cols, whole_cols(c)); }
  static int64_t bytes(const TiledConv& c, const Tiling& t) {
    return window_bytes(in_rows(c, t), in_cols(c, t)) +
           window_bytes(t.rows * c.rows.spread(), t.cols * c.cols.spread());
  }
  static Windows make(const TiledConv& c, const Tiling& t, Scratch& scratch) {
    Windows w{take_window(in_rows(c, t), in_cols(c, t), scratch),
              take_window(t.rows * c.rows.spread(), t.cols * c.cols.spread(), scratch)};
    fill_input_window(c, t, w.in);
    fill_output_window(c, t, w.out);
    return w;
  }
};

// `lanes` patches, neighbours in the order block of `lanes` images, region, image: the regions of an image follow each
// other while its pages are at hand, and all lanes lie alike but in the units of a last, smaller block.
struct Unit {
  int64_t rows, cols;  // tile positions to compute
  Lanes in, out;

  static Unit at(const TiledConv& c, const Tiling& t, int64_t index) {
    Unit u;
    const int64_t regions = t.region_rows * t.region_cols, block_patches = t.lanes * regions;
    const int64_t first = index * t.lanes, first_image = first / block_patches * t.lanes;
    const int64_t images = smaller(t.lanes, c.batch - first_image), skipped = first % block_patches;
    u.in.active = u.out.active = smaller(t.lanes, images * regions - skipped);
    u.in.aligned = u.out.aligned = skipped / images == (skipped + u.in.active - 1) / images;
    u.rows = t.rows, u.cols = t.cols;
    for (int64_t l = 0; l < u.in.active; ++l) {
      const int64_t image = first_image + (skipped + l) % images, region = (skipped + l) / images;
      const int64_t row = region / t.region_cols * t.rows, col = region % t.region_cols * t.cols;
      u.in.image[l] = image * c.in.batch_stride, u.out.image[l] = image * c.out.batch_stride;
      u.in.row[l] = row * c.rows.step() + c.rows.origin(), u.in.col[l] = col * c.cols.step() + c.cols.origin();
      u.out.row[l] = row * c.rows.spread(), u.out.col[l] = col * c.cols.spread();
      if (u.in.aligned) {
        u.rows = smaller(t.rows, c.rows.positions() - row);
        u.cols = smaller(t.cols, c.cols.positions() - col);
      }
    }
    return u;
  }
};

// What one thread works in.
template <class A>
struct Workspace {
  A *panel, *sums;
  Positions in, out;

  static int64_t bytes(const TiledConv& c, const Tiling& t, const Windows& w) {
    return Scratch::size<A>(t.panel_size()) + Scratch::size<A>(t.sums_size(c)) + Positions::bytes(w.in) +
           Positions::bytes(w.out);
  }
  static Workspace take(const TiledConv& c, const Tiling& t, const Windows& w, Scratch& scratch) {
    A* panel = scratch.take<A>(t.panel_size());
    A* sums = scratch.take<A>(t.sums_size(c));
    const Positions in = Positions::take(w.in, scratch);
    return {panel, sums, in, Positions::take(w.out, scratch)};
  }
};

// Calls f(work, rows, cols, whether the sums start here, first output, sums offset) for every tile and group of outputs
// that a block of channels, packed in `panel`, concerns.
template <class A, class F>
void for_each_tile(const TiledConv& c, const Tiling& t, const TapLists<A>& lists, const Unit& unit, const A* panel,
                   int64_t block, const F& f) {
  const int64_t group_in = larger(1, c.in_channels / c.groups), group_out = c.out_channels / c.groups;
  const int64_t row_pitch = t.row_pitch() * int64_t{sizeof(A)};
  const int64_t first = block * t.block_channels, last = smaller(first + t.block_channels, c.in_channels);
  const int64_t first_group = first / group_in, last_group = larger(first, last - 1) / group_in;
  for (int64_t residue = 0; residue < c.residues(); ++residue)
    for (int64_t tile_row = 0; tile_row < t.tile_rows; ++tile_row)
      for (int64_t tile_col = 0; tile_col < t.tile_cols; ++tile_col) {
        const int64_t row = t.tile_first_row(tile_row), col = t.tile_first_col(tile_col);
        const int64_t rows = smaller(t.tile_first_row(tile_row + 1), unit.rows) - row;
        const int64_t cols = smaller(t.tile_first_col(tile_col + 1), unit.cols) - col;
        if (rows <= 0 || cols <= 0) continue;
        const int64_t tile_sums = sums_offset(c, t, residue, tile_row * t.tile_cols + tile_col);
        const char* tile_panel = reinterpret_cast<const char*>(panel + row * t.row_pitch() + col * t.lanes);
        for (int64_t group = first_group; group <= last_group; ++group) {
          const int64_t list = residue * c.out_channels + group * group_out;
          const TileWork<A> work{tile_panel,   row_pitch, lists.begin(block) + list, lists.end(block) + list,
                                 lists.offset, group_out};
          const bool fresh = group * group_in / t.block_channels == block;
          f(work, rows, cols, fresh, group * group_out, tile_sums + group * group_out * t.sums_pitch());
        }
      }
}

template <class S>
void run_unit(const TiledConv& c, const Tiling& t, const Windows& windows, const TapLists<Sum<S>>& lists,
              const Sum<S>* bias, const int32_t* in_ptr, const Unit& unit, Workspace<Sum<S>>& space) {
  using A = Sum<S>;
  space.in.find(windows.in, c.in, c.rows.in, c.cols.in, unit.in.row[0], unit.in.col[0]);
  space.out.find(windows.out, c.out, c.rows.out, c.cols.out, unit.out.row[0], unit.out.col[0]);
  for (int64_t block = 0; block < t.blocks; ++block) {
    const int64_t first = block * t.block_channels, last = smaller(first + t.block_channels, c.in_channels);
    pack<S>(
        {c.in, c.rows.in, c.cols.in, windows.in, unit.in, space.in, first, last, in_ptr, t.channel_pitch, space.panel});
    for_each_tile(c, t, lists, unit, space.panel, block,
                  [&](const TileWork<A>& work, int64_t rows, int64_t cols, bool fresh, int64_t output, int64_t sums) {
                    with_extents(rows, cols, [&](auto tr, auto tc) {
                      accumulate_tile<A, decltype(tr)::value, decltype(tc)::value>(
                          work, lists.value, fresh, bias ? bias + output : nullptr, space.sums + sums);
                    });
                  });
  }
  unpack<S>({space.sums, t.sums_pitch(), c.out_channels, c.out, c.rows.out, c.cols.out, windows.out, unit.out,
             space.out, t.streams_out<S>(c), c.adds});
}

// out = bias + the taps of `rows` over in, added to what out holds if c.adds. in_ptr: channels with in_ptr[c] ==
// in_ptr[c + 1] have no live weight.
template <class S>
void run_problem(const TiledConv& c, const OutputRows& rows, const S* values, const S* bias, const int32_t* in_ptr,
                 const Parallel& parallel) {
  using A = Sum<S>;
  const double positions = double(c.out_channels) * double(c.in_channels / c.groups) * double(c.taps());
  const Tiling t = choose_tiling<A>(c, double(rows.nnz) / larger(1, positions), parallel.threads);
  Scratch tables(Windows::bytes(c, t) + lists_bytes<S>(c, t, rows.nnz) + Scratch::size<A>(c.out_channels));
  const Windows windows = Windows::make(c, t, tables);
  const TapLists<A> lists = make_lists(c, t, rows, values, tables, parallel);
  A* wide_bias = bias ? tables.take<A>(c.out_channels) : nullptr;
  for (int64_t o = 0; bias && o < c.out_channels; ++o) wide_bias[o] = widen(bias[o]);
  const int64_t units = t.units(c), threads = smaller(parallel.threads, units);
  Scratch work(threads * Workspace<A>::bytes(c, t, windows));
  Workspace<A>* spaces = new Workspace<A>[threads];
  for (int64_t i = 0; i < threads; ++i) spaces[i] = Workspace<A>::take(c, t, windows, work);
  parallel_for(parallel, threads, [&](int64_t thread) {
    for (int64_t u = units * thread / threads; u < units * (thread + 1) / threads; ++u)
      run_unit<S>(c, t, windows, lists, wide_bias, in_ptr, Unit::at(c, t, u), spaces[thread]);
    finish_streams();
  });
  delete[] spaces;
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
