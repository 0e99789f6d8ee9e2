// The gradients of the live weights and of the bias.
#pragma once
#include "cpu/conv_run.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// bias_grad[o] += sum over the tile's positions and lanes of g[o]; what lies outside the image was packed as zero.
template <class A>
void add_tile_to_bias(const A* g, int64_t rows, int64_t cols, int64_t outputs, A* bias_grad) {
  using V = Vec<A>;
  for (int64_t o = 0; o < outputs; ++o, g += kTileSize * V::lanes) {
    V sum = V::zero();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t q = 0; q < cols; ++q) sum = sum + V::load(g + (r * kTileCols + q) * V::lanes);
    bias_grad[o] += sum.sum();
  }
}

// c.in is x and c.out the gradient of the output.
template <class S>
void correlate_unit(const TiledConv& c, const Tiling& t, const Windows& windows, const TapLists<Sum<S>>& lists,
                    const int32_t* in_ptr, const Unit& unit, Workspace<Sum<S>>& space, Sum<S>* grad,
                    Sum<S>* bias_grad) {
  using A = Sum<S>;
  space.out.find(windows.out, c.out, c.rows.out, c.cols.out, unit.out.row[0], unit.out.col[0]);
  pack<S>({c.out, c.rows.out, c.cols.out, windows.out, unit.out, space.out, 0, c.out_channels, nullptr, t.sums_pitch(),
           space.sums});
  if (bias_grad)
    for (int64_t tile = 0; tile < t.tiles(); ++tile) {
      const int64_t row = tile / t.tile_cols, col = tile % t.tile_cols;
      add_tile_to_bias(space.sums + sums_offset(c, t, 0, tile), t.tile_first_row(row + 1) - t.tile_first_row(row),
                       t.tile_first_col(col + 1) - t.tile_first_col(col), c.out_channels, bias_grad);
    }
  if (grad == nullptr) return;
  space.in.find(windows.in, c.in, c.rows.in, c.cols.in, unit.in.row[0], unit.in.col[0]);
  for (int64_t block = 0; block < t.blocks; ++block) {
    const int64_t first = block * t.block_channels, last = smaller(first + t.block_channels, c.in_channels);
    pack<S>(
        {c.in, c.rows.in, c.cols.in, windows.in, unit.in, space.in, first, last, in_ptr, t.channel_pitch, space.panel});
    for_each_tile(c, t, lists, unit, space.panel, block,
                  [&](const TileWork<A>& work, int64_t rows, int64_t cols, bool, int64_t, int64_t sums) {
                    with_extents(rows, cols, [&](auto tr, auto tc) {
                      correlate_tile<A, decltype(tr)::value, decltype(tc)::value>(work, space.sums + sums, grad);
                    });
                  });
  }
}

// to[i] = the threads' shares of element i, added in the threads' order. Returns 0, or NaN if a sum is not finite.
template <class S>
Sum<S> add_shares(const Sum<S>* shares, int64_t threads, int64_t pitch, int64_t begin, int64_t end, S* to) {
  Sum<S> zero = 0;
  for (int64_t i = begin; i < end; ++i) {
    Sum<S> sum = shares[i];
    for (int64_t thread = 1; thread < threads; ++thread) sum += shares[thread * pitch + i];
    zero += sum * 0;
    narrow(sum, to[i]);
  }
  return zero;
}

// Returns whether all gradients of values are finite.
template <class S>
bool correlate(const TiledConv& c, const Tiling& t, const OutputRows& rows, const int32_t* in_ptr, S* grad_values,
               S* grad_bias, const Parallel& parallel) {
  using A = Sum<S>;
  const int64_t units = t.units(c), threads = smaller(parallel.threads, units);
  const int64_t values_pitch = Scratch::size<A>(rows.nnz) / sizeof(A);
  const int64_t bias_pitch = Scratch::size<A>(c.out_channels) / sizeof(A);
  Scratch tables(Windows::bytes(c, t) + lists_bytes<S>(c, t, rows.nnz) +
                 threads * (values_pitch + bias_pitch) * int64_t{sizeof(A)} + Scratch::size<A>(threads));
  const Windows windows = Windows::make(c, t, tables);
  const TapLists<A> lists = make_lists<S>(c, t, rows, nullptr, tables, parallel);
  A *value_shares = tables.take<A>(threads * values_pitch), *bias_shares = tables.take<A>(threads * bias_pitch);
  A* zeros = tables.take<A>(threads);
  Scratch work(threads * Workspace<A>::bytes(c, t, windows));
  Workspace<A>* spaces = new Workspace<A>[threads];
  for (int64_t i = 0; i < threads; ++i) spaces[i] = Workspace<A>::take(c, t, windows, work);
  parallel_for(parallel, threads, [&](int64_t thread) {
    A *grad = value_shares + thread * values_pitch, *bias_grad = bias_shares + thread * bias_pitch;
    for (int64_t i = 0; i < values_pitch; ++i) grad[i] = 0;
    for (int64_t i = 0; i < bias_pitch; ++i) bias_grad[i] = 0;
    for (int64_t u = units * thread / threads; u < units * (thread + 1) / threads; ++u)
      correlate_unit<S>(c, t, windows, lists, in_ptr, Unit::at(c, t, u), spaces[thread], grad_values ? grad : nullptr,
                        grad_bias ? bias_grad : nullptr);
  });
  delete[] spaces;
  if (grad_bias) add_shares(bias_shares, threads, bias_pitch, 0, c.out_channels, grad_bias);
  if (grad_values == nullptr) return true;
  parallel_for(parallel, threads, [&](int64_t thread) {
    zeros[thread] = add_shares(value_shares, threads, values_pitch, rows.nnz * thread / threads,
                               rows.nnz * (thread + 1) / threads, grad_values);
  });
  A zero = 0;
  for (int64_t thread = 0; thread < threads; ++thread) zero += zeros[thread];
  return zero == 0;
}

template <class S>
void run_grad_values(const TiledConv& c, const OutputRows& rows, const int32_t* in_ptr, S* grad_values, S* grad_bias,
                     const Parallel& parallel) {
  const double positions = double(c.out_channels) * double(c.in_channels / c.groups) * double(c.taps());
  const Tiling t = choose_tiling<Sum<S>>(c, double(rows.nnz) / larger(1, positions), parallel.threads);
  const bool finite = correlate<S>(c, t, rows, in_ptr, grad_values, grad_bias, parallel);
  // A position beyond the image has the gradient 0, but 0 times a NaN of x is a NaN for a tap that never reads there.
  if (!finite && overhangs(c, t)) correlate<S>(c, without_overhang(c, t), rows, in_ptr, grad_values, {}, parallel);
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
