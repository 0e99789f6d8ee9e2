// The live weights as the micro-kernels read them: per output, where in the packed panel each weight's tap lies.
#pragma once
#include "cpu/call.h"
#include "cpu/conv_geometry.inl"
#include "cpu/scratch.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// A pattern compressed by the problem's output channel; position: where in the packed values, null for "in order".
struct OutputRows {
  const int32_t *row_ptr, *col, *position;
  int64_t nnz;
};

// Outputs are counted residue by residue: list (f, o) = residue f of output channel o. bound[b * lists + l] is where
// the entries of list l in channel block b begin and, for b - 1, end.
template <class A>
struct TapLists {
  int64_t lists;
  int32_t *bound, *offset;
  const A* value;

  const int32_t* begin(int64_t block) const { return bound + block * lists; }
  const int32_t* end(int64_t block) const { return bound + (block + 1) * lists; }
};

// Per column (input channel in its group) * taps + tap of the first group: the byte offset into a panel that starts at
// channel 0, and per tap the residue.
template <class A>
void fill_tap_tables(const TiledConv& c, const Tiling& t, int32_t* tap_offset, int32_t* tap_residue) {
  for (int64_t i = 0; i < c.rows.kernel; ++i)
    for (int64_t k = 0; k < c.cols.kernel; ++k) {
      const int64_t tap = i * c.cols.kernel + k;
      tap_offset[tap] = static_cast<int32_t>(tap_slot(c, t, i, k) * t.lanes * int64_t{sizeof(A)});
      tap_residue[tap] = static_cast<int32_t>(c.rows.residue(i) * c.cols.spread() + c.cols.residue(k));
    }
}

// column_offset[channel * taps + tap], over all channels.
template <class A>
void fill_column_offsets(const TiledConv& c, const Tiling& t, const int32_t* tap_offset, int32_t* column_offset) {
  const int64_t taps = c.taps();
  for (int64_t channel = 0; channel < c.in_channels; ++channel) {
    const int64_t base = channel % t.block_channels * t.channel_pitch * int64_t{sizeof(A)};
    for (int64_t tap = 0; tap < taps; ++tap)
      column_offset[channel * taps + tap] = static_cast<int32_t>(base + tap_offset[tap]);
  }
}

// The lists of one output channel where each tile position is one output position: its row of the pattern as it is.
inline void list_row(const OutputRows& rows, int64_t o, int64_t first_column, int64_t block_columns, int64_t blocks,
                     const int32_t* column_offset, int64_t lists, int32_t* bound, int32_t* offset) {
  int32_t j = rows.row_ptr[o];
  const int32_t end = rows.row_ptr[o + 1];
  column_offset += first_column;
  for (int32_t k = j; k < end; ++k) offset[k] = column_offset[rows.col[k]];
  for (int64_t block = 0; block < blocks; ++block) {
    bound[block * lists + o] = j;
    const int64_t limit = (block + 1) * block_columns - first_column;
    while (j < end && rows.col[j] < limit) ++j;
  }
  bound[blocks * lists + o] = end;
}

// The same where it is several: entries sorted by residue first. order: where in the row each came from.
inline void list_row_by_residue(const OutputRows& rows, int64_t o, int64_t out_channels, int64_t first_column,
                                int64_t taps, int64_t residues, int64_t block_columns, int64_t blocks,
                                const int32_t* column_offset, const int32_t* tap_residue, int32_t* bound,
                                int32_t* offset, int32_t* order) {
  const int64_t lists = residues * out_channels;
  int32_t place = rows.row_ptr[o];
  for (int64_t f = 0; f < residues; ++f) {
    const int64_t list = f * out_channels + o;
    int64_t block = 0;
    bound[list] = place;
    for (int32_t j = rows.row_ptr[o]; j < rows.row_ptr[o + 1]; ++j) {
      if (tap_residue[rows.col[j] % taps] != f) continue;
      const int64_t column = first_column + rows.col[j];
      while (column >= (block + 1) * block_columns) bound[++block * lists + list] = place;
      offset[place] = column_offset[column];
      order[place++] = j;
    }
    while (block < blocks) bound[++block * lists + list] = place;
  }
}

// values: in the pattern's order, stored as S. The scratch must have lists_bytes() left.
template <class S>
int64_t lists_bytes(const TiledConv& c, const Tiling& t, int64_t nnz) {
  return Scratch::size<int32_t>((t.blocks + 1) * c.residues() * c.out_channels) + 2 * Scratch::size<int32_t>(nnz) +
         Scratch::size<Sum<S>>(nnz) + 2 * Scratch::size<int32_t>(c.taps()) +
         Scratch::size<int32_t>(c.in_channels * c.taps());
}

template <class S>
TapLists<Sum<S>> make_lists(const TiledConv& c, const Tiling& t, const OutputRows& rows, const S* values,
                            Scratch& scratch, const Parallel& parallel) {
  using A = Sum<S>;
  const int64_t taps = c.taps(), residues = c.residues(), lists = residues * c.out_channels;
  const int64_t group_columns = c.in_channels / c.groups * taps, group_outputs = c.out_channels / c.groups;
  TapLists<A> r{lists, scratch.take<int32_t>((t.blocks + 1) * lists), scratch.take<int32_t>(rows.nnz), nullptr};
  int32_t* order = scratch.take<int32_t>(rows.nnz);
  A* value = scratch.take<A>(rows.nnz);
  int32_t *tap_offset = scratch.take<int32_t>(taps), *tap_residue = scratch.take<int32_t>(taps);
  int32_t* column_offset = scratch.take<int32_t>(c.in_channels * taps);
  fill_tap_tables<A>(c, t, tap_offset, tap_residue);
  fill_column_offsets<A>(c, t, tap_offset, column_offset);
  // In order and of the right type already: read where they are.
  const bool in_place = residues == 1 && rows.position == nullptr && sizeof(S) == sizeof(A);
  r.value = in_place ? reinterpret_cast<const A*>(values) : value;
  const int64_t chunks = parallel.threads, block_columns = t.block_channels * taps;
  parallel_for(parallel, chunks, [&](int64_t chunk) {
    for (int64_t o = c.out_channels * chunk / chunks; o < c.out_channels * (chunk + 1) / chunks; ++o) {
      const int64_t first_column = o / group_outputs * group_columns;
      const int32_t begin = rows.row_ptr[o], end = rows.row_ptr[o + 1];
      if (residues == 1)
        list_row(rows, o, first_column, block_columns, t.blocks, column_offset, lists, r.bound, r.offset);
      else
        list_row_by_residue(rows, o, c.out_channels, first_column, taps, residues, block_columns, t.blocks,
                            column_offset, tap_residue, r.bound, r.offset, order);
      if (in_place || values == nullptr) continue;
      for (int32_t j = begin; j < end; ++j) {
        const int32_t entry = residues == 1 ? j : order[j];
        value[j] = widen(values[rows.position ? rows.position[entry] : entry]);
      }
    }
  });
  return r;
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
