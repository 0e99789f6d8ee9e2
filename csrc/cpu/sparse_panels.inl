// A sparse matrix times panels of positions: out[r, p] = bias[r] + sum over the entries j of row r of
// values[j] * x[col[j], p]. The core of masked_linear and of a masked 1x1 convolution, forward and gradient of x.
#pragma once
#include "cpu/panels.inl"
#include "cpu/scratch.h"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// A row-compressed matrix [rows, features]; col ascends within a row.
template <class A>
struct SparseRows {
  const int32_t* row_ptr;
  const int32_t* col;
  const A* values;
  int64_t rows, features;

  int64_t nnz() const { return row_ptr[rows] - row_ptr[0]; }
  // The first row of part `part` of `parts` of about equal work: a row costs as much as a few entries beside its own.
  int64_t split(int64_t part, int64_t parts) const {
    constexpr int64_t row_cost = 4;
    const int64_t target = (nnz() + row_cost * rows) * part / parts;
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (row_ptr[middle] - row_ptr[0] + row_cost * middle < target)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// sums[r][T] (+)= over the entries j in [begin[r], end[r]) of values[j] * panel[col[j]][T], for R rows side by side:
// few vectors of one row would leave the multiply-add units waiting. Each sum is one chain in the order of the entries,
// so that an entry of 0 more or less changes no bit of it.
template <int T, int R, class A>
void multiply_row_group(const SparseRows<A>& w, const int32_t* begin, const int32_t* end, const A* panel, bool resume,
                        const A* bias, A* sums) {
  constexpr int lanes = Vec<A>::lanes;
  Vec<A> acc[R][T];
  int64_t common = end[0] - begin[0];
  for (int r = 0; r < R; ++r) {
    if (end[r] - begin[r] < common) common = end[r] - begin[r];
    for (int t = 0; t < T; ++t)
      acc[r][t] = resume ? Vec<A>::load(sums + (r * T + t) * lanes) : bias ? Vec<A>::set1(bias[r]) : Vec<A>::zero();
  }
  for (int64_t j = 0; j < common; ++j)
    for (int r = 0; r < R; ++r) {
      const A* x = panel + int64_t{w.col[begin[r] + j]} * (T * lanes);
      const Vec<A> value = Vec<A>::set1(w.values[begin[r] + j]);
      for (int t = 0; t < T; ++t) acc[r][t] = fma(value, Vec<A>::load(x + t * lanes), acc[r][t]);
    }
  for (int r = 0; r < R; ++r) {
    for (int64_t j = begin[r] + common; R > 1 && j < end[r]; ++j) {
      const A* x = panel + int64_t{w.col[j]} * (T * lanes);
      const Vec<A> value = Vec<A>::set1(w.values[j]);
      for (int t = 0; t < T; ++t) acc[r][t] = fma(value, Vec<A>::load(x + t * lanes), acc[r][t]);
    }
    for (int t = 0; t < T; ++t) acc[r][t].store(sums + (r * T + t) * lanes);
  }
}

// The same for a row and a single vector of positions: U entries are summed side by side, in chains of their own.
template <class A>
void multiply_row_by_vector(const SparseRows<A>& w, int64_t j, int64_t last, const A* panel, Vec<A> start, A* sums) {
  constexpr int lanes = Vec<A>::lanes, U = 6;
  Vec<A> acc[U];
  acc[0] = start;
  for (int u = 1; u < U; ++u) acc[u] = Vec<A>::zero();
  for (; j + U <= last; j += U)
    for (int u = 0; u < U; ++u)
      acc[u] = fma(Vec<A>::set1(w.values[j + u]), Vec<A>::load(panel + int64_t{w.col[j + u]} * lanes), acc[u]);
  for (; j < last; ++j)
    acc[0] = fma(Vec<A>::set1(w.values[j]), Vec<A>::load(panel + int64_t{w.col[j]} * lanes), acc[0]);
  for (int u = 1; u < U; ++u) acc[0] = acc[0] + acc[u];
  acc[0].store(sums);
}

template <int T, class A>
void multiply_rows(const SparseRows<A>& w, const int32_t* begin, const int32_t* end, int64_t rows, const A* panel,
                   bool resume, const A* bias, A* sums) {
  constexpr int lanes = Vec<A>::lanes, R = T == 2 ? 4 : T <= 4 ? 2 : 1;
  int64_t r = 0;
  if constexpr (T == 1) {
    for (; r < rows; ++r, sums += lanes) {
      const Vec<A> start = resume ? Vec<A>::load(sums) : bias ? Vec<A>::set1(bias[r]) : Vec<A>::zero();
      multiply_row_by_vector(w, begin[r], end[r], panel, start, sums);
    }
  } else {
    for (; r + R <= rows; r += R)
      multiply_row_group<T, R>(w, begin + r, end + r, panel, resume, bias ? bias + r : nullptr, sums + r * T * lanes);
    for (; R > 1 && r < rows; ++r)
      multiply_row_group<T, 1>(w, begin + r, end + r, panel, resume, bias ? bias + r : nullptr, sums + r * T * lanes);
  }
}

// The same for a width known at run time only.
template <int T = 8, class A>
void multiply_rows(int width, const SparseRows<A>& w, const int32_t* begin, const int32_t* end, int64_t rows,
                   const A* panel, bool resume, const A* bias, A* sums) {
  if constexpr (T > 1)
    if (width < T) return multiply_rows<T - 1>(width, w, begin, end, rows, panel, resume, bias, sums);
  multiply_rows<T>(w, begin, end, rows, panel, resume, bias, sums);
}

// How a product is cut up: panels of at most `width` vectors, blocks of 2^block_shift features whose panel stays in
// cache, and how many rows' sums are held at once.
struct ProductPlan {
  int width, block_shift;
  int64_t blocks, rows_at_once;
};

// Shares of the caches that a packed panel and the sums of its rows may take; every processor since 2017 has 32 KB and
// 512 KB, or 1 MB, of them.
constexpr int64_t l1_bytes = 32 << 10, l2_bytes = 512 << 10, sums_bytes = 512 << 10;

template <class A>
ProductPlan plan_product(const SparseRows<A>& w, int64_t vectors) {
  constexpr int64_t vector_bytes = Vec<A>::lanes * sizeof(A);
  ProductPlan plan{8, 0, 1, 16};
  // Blocks for the first-level cache pay where a row has enough entries in them to make up for taking its sums up
  // again; otherwise blocks for the second level, four vectors wide: there a load costs more than the loop around it.
  constexpr int64_t l1_features = l1_bytes / (8 * vector_bytes);
  const bool in_l1 = w.nnz() * l1_features >= 10 * w.rows * w.features;
  const int64_t budget = in_l1 ? l1_bytes : l2_bytes;
  if (!in_l1 && w.features * plan.width * vector_bytes > l2_bytes) plan.width = 4;
  if (vectors < plan.width) plan.width = static_cast<int>(vectors);
  while ((int64_t{2} << plan.block_shift) * plan.width * vector_bytes <= budget) ++plan.block_shift;
  plan.blocks = (w.features + (int64_t{1} << plan.block_shift) - 1) >> plan.block_shift;
  if (plan.blocks < 1) plan.blocks = 1;
  if (plan.blocks > 1) plan.rows_at_once = sums_bytes / (plan.width * vector_bytes);
  if (plan.rows_at_once > w.rows) plan.rows_at_once = w.rows;
  return plan;
}

// splits[block][row]: where the entries of a row that lie in a block begin; splits[blocks] is where they end.
template <class A>
void split_rows_at_blocks(const SparseRows<A>& w, const ProductPlan& plan, int32_t* splits, const Parallel& parallel) {
  parallel_for(parallel, parallel.threads, [&](int64_t thread) {
    const int64_t first = w.split(thread, parallel.threads), last = w.split(thread + 1, parallel.threads);
    for (int64_t r = first; r < last; ++r) {
      int64_t j = w.row_ptr[r];
      for (int64_t block = 0; block < plan.blocks; ++block) {
        splits[block * w.rows + r] = static_cast<int32_t>(j);
        const int64_t limit = (block + 1) << plan.block_shift;
        while (j < w.row_ptr[r + 1] && w.col[j] < limit) ++j;
      }
      splits[plan.blocks * w.rows + r] = w.row_ptr[r + 1];
    }
  });
}

// x and out are stored as S; values and bias (null: none) are in the type of the sums.
template <class S>
void sparse_times_panels(const SparseRows<Sum<S>>& w, const PanelMatrix& x, const Sum<S>* bias, const PanelMatrix& out,
                         const Parallel& parallel) {
  using A = Sum<S>;
  constexpr int lanes = Vec<A>::lanes;
  if (w.rows == 0 || x.vectors(lanes) == 0) return;
  const ProductPlan plan = plan_product(w, x.vectors(lanes));
  const PanelSplit panels = PanelSplit::of(x.vectors(lanes), plan.width);
  const int64_t block_features = int64_t{1} << plan.block_shift;
  const int64_t held_features = block_features < w.features ? block_features : w.features;
  // One panel is shared out by rows where the panels alone do not divide evenly.
  const int64_t chunks = panels.panels % parallel.threads == 0 ? 1 : parallel.threads;
  const int64_t units = panels.panels * chunks;
  const int64_t panel_size = held_features * plan.width * lanes, sums_size = plan.rows_at_once * plan.width * lanes;
  const int64_t splits_size = plan.blocks > 1 ? (plan.blocks + 1) * w.rows : 0;
  Scratch scratch(Scratch::size<int32_t>(splits_size) +
                  parallel.threads * (Scratch::size<A>(panel_size) + Scratch::size<A>(sums_size)));
  int32_t* splits = scratch.take<int32_t>(splits_size);
  A* panel_memory = scratch.take<A>(Scratch::size<A>(panel_size) / sizeof(A) * parallel.threads);
  A* sums_memory = scratch.take<A>(Scratch::size<A>(sums_size) / sizeof(A) * parallel.threads);
  if (plan.blocks > 1) split_rows_at_blocks(w, plan, splits, parallel);
  const bool large = is_large(w.rows * out.images * out.plane * int64_t{sizeof(S)});

  parallel_for(parallel, parallel.threads, [&](int64_t thread) {
    A* panel = panel_memory + thread * (Scratch::size<A>(panel_size) / sizeof(A));
    A* sums = sums_memory + thread * (Scratch::size<A>(sums_size) / sizeof(A));
    int64_t held_panel = -1, held_block = -1;
    for (int64_t unit = units * thread / parallel.threads; unit < units * (thread + 1) / parallel.threads; ++unit) {
      const int64_t p = unit / chunks, first_vector = panels.first(p);
      const int width = panels.width(p);
      const int64_t last_row = w.split(unit % chunks + 1, chunks);
      for (int64_t row = w.split(unit % chunks, chunks), rows; row < last_row; row += rows) {
        rows = last_row - row < plan.rows_at_once ? last_row - row : plan.rows_at_once;
        for (int64_t block = 0; block < plan.blocks; ++block) {
          const int64_t feature = block << plan.block_shift, left = w.features - feature;
          if (held_panel != p || held_block != block)
            pack_panel<S>(x, first_vector, width, feature, left < block_features ? left : block_features, panel);
          held_panel = p, held_block = block;
          const int32_t* begin = (plan.blocks > 1 ? splits + block * w.rows : w.row_ptr) + row;
          const int32_t* end = (plan.blocks > 1 ? begin + w.rows : begin + 1);
          multiply_rows(width, w, begin, end, rows, panel - feature * width * lanes, block > 0,
                        bias ? bias + row : nullptr, sums);
        }
        unpack_panel<S>(sums, out, first_vector, width, row, rows, large);
      }
    }
    finish_streams();
  });
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
