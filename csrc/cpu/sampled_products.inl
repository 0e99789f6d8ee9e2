// The gradient of live weights: for each live (row r, column c) the sum over positions of grad_out[r, p] * x[c, p].
#pragma once
#include "cpu/panels.inl"
#include "cpu/scratch.h"
#include "cpu/sparse_panels.inl"
#include "cpu/values.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// Vectors of grad_out held in registers beside eight sums.
#if defined(ILNAS_ISA_AVX512)
constexpr int widest_sample = 16;
#else
constexpr int widest_sample = 4;
#endif

// sums[i] (+)= grad[T] . x[col[i]][T] for eight columns.
template <int T, class A>
void sample_8(const Vec<A> (&grad)[T], const int32_t* col, const A* x, A* sums) {
  constexpr int lanes = Vec<A>::lanes;
  Vec<A> products[8];
  for (int i = 0; i < 8; ++i) {
    const A* at = x + int64_t{col[i]} * (T * lanes);
    products[i] = grad[0] * Vec<A>::load(at);
    for (int t = 1; t < T; ++t) products[i] = fma(grad[t], Vec<A>::load(at + t * lanes), products[i]);
  }
  sum_lanes_of_8(products, sums);
}

// sums[j] (+)= for the entries j in [begin[r], end[r]) of each row, grad being [rows][T * lanes].
template <int T, class A>
void sample_rows(const int32_t* col, const int32_t* begin, const int32_t* end, int64_t rows, const A* grad,
                 const A* panel, bool resume, A* sums) {
  constexpr int lanes = Vec<A>::lanes;
  for (int64_t r = 0; r < rows; ++r, grad += T * lanes) {
    Vec<A> held[T];
    for (int t = 0; t < T; ++t) held[t] = Vec<A>::load(grad + t * lanes);
    for (int64_t j = begin[r]; j < end[r]; j += 8) {
      const int64_t left = end[r] - j;
      const int count = left < 8 ? static_cast<int>(left) : 8;
      A eight[8];
      if (count == 8) {
        sample_8<T>(held, col + j, panel, eight);
      } else {
        int32_t filled[8];
        for (int i = 0; i < 8; ++i) filled[i] = col[j + (i < count ? i : 0)];
        sample_8<T>(held, filled, panel, eight);
      }
      for (int i = 0; i < count; ++i) sums[j + i] = resume ? sums[j + i] + eight[i] : eight[i];
    }
  }
}

template <int T = widest_sample, class A>
void sample_rows(int width, const int32_t* col, const int32_t* begin, const int32_t* end, int64_t rows, const A* grad,
                 const A* panel, bool resume, A* sums) {
  if constexpr (T > 1)
    if (width < T) return sample_rows<T - 1>(width, col, begin, end, rows, grad, panel, resume, sums);
  sample_rows<T>(col, begin, end, rows, grad, panel, resume, sums);
}

// The panel of a block of x stays in the second-level cache, and that of all rows of grad_out beside it where it fits:
// else a few rows at a time are packed anew for every block.
template <class A>
ProductPlan plan_samples(const SparseRows<A>& w, int64_t vectors) {
  constexpr int64_t vector_bytes = Vec<A>::lanes * sizeof(A), few_rows = 16;
  ProductPlan plan{widest_sample, 0, 1, w.rows};
  const auto fits = [&](int64_t features) { return features * plan.width * vector_bytes <= l2_bytes; };
  // Half as wide, twice as many sums are turned over, but grad_out is packed once.
  if (!fits(w.rows) && !fits(w.features)) plan.width /= 2;
  if (vectors < plan.width) plan.width = static_cast<int>(vectors);
  if (!fits(w.rows)) plan.rows_at_once = few_rows;
  while (fits(int64_t{2} << plan.block_shift)) ++plan.block_shift;
  if (!fits(w.features)) --plan.block_shift;
  plan.blocks = (w.features + (int64_t{1} << plan.block_shift) - 1) >> plan.block_shift;
  return plan;
}

// Adds the products of panels [first_panel, last_panel) and rows [first_row, last_row) into sums[nnz].
template <class S>
void sample_panels(const SparseRows<Sum<S>>& w, const PanelMatrix& grad_out, const PanelMatrix& x,
                   const PanelSplit& panels, int64_t first_panel, int64_t last_panel, int64_t first_row,
                   int64_t last_row, const ProductPlan& plan, const int32_t* splits, Sum<S>* x_panel,
                   Sum<S>* grad_panel, Sum<S>* sums) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  const int64_t block_features = int64_t{1} << plan.block_shift;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int width = panels.width(p);
    for (int64_t block = 0; block < plan.blocks; ++block) {
      const int64_t feature = block << plan.block_shift, left = w.features - feature;
      pack_panel<S>(x, panels.first(p), width, feature, left < block_features ? left : block_features, x_panel);
      for (int64_t row = first_row, rows; row < last_row; row += rows) {
        rows = last_row - row < plan.rows_at_once ? last_row - row : plan.rows_at_once;
        if (block == 0 || rows < last_row - first_row)
          pack_panel<S>(grad_out, panels.first(p), width, row, rows, grad_panel);
        const int32_t* begin = (plan.blocks > 1 ? splits + block * w.rows : w.row_ptr) + row;
        const int32_t* end = (plan.blocks > 1 ? begin + w.rows : begin + 1);
        sample_rows(width, w.col, begin, end, rows, grad_panel, x_panel - feature * width * lanes, p > first_panel,
                    sums);
      }
    }
  }
}

// grad_values[nnz] in the order of w.col; w.values is not read.
template <class S>
void sampled_products(const SparseRows<Sum<S>>& w, const PanelMatrix& grad_out, const PanelMatrix& x, S* grad_values,
                      const Parallel& parallel) {
  using A = Sum<S>;
  constexpr int lanes = Vec<A>::lanes;
  const int64_t first_entry = w.row_ptr[0], nnz = w.nnz(), threads = parallel.threads;
  if (nnz == 0) return;
  const ProductPlan plan = plan_samples(w, x.vectors(lanes));
  const PanelSplit panels = PanelSplit::of(x.vectors(lanes), plan.width);
  // Threads share out the panels, each with sums of its own, where that divides evenly; else the rows.
  const bool by_panel = panels.panels % threads == 0 || panels.panels >= 4 * threads;
  const int64_t copies = by_panel ? threads : 1;
  const int width = plan.width;
  const int64_t block_features = int64_t{1} << plan.block_shift;
  const int64_t held_features = block_features < w.features ? block_features : w.features;
  const int64_t splits_size = plan.blocks > 1 ? (plan.blocks + 1) * w.rows : 0;
  const int64_t x_size = held_features * width * lanes, grad_size = plan.rows_at_once * width * lanes;
  const bool in_place = same_type<S, A> && copies == 1;
  const int64_t sums_size = in_place ? 0 : Scratch::size<A>(nnz) / sizeof(A);
  Scratch scratch(Scratch::size<int32_t>(splits_size) + copies * sums_size * sizeof(A) +
                  threads * (Scratch::size<A>(x_size) + Scratch::size<A>(grad_size)));
  int32_t* splits = scratch.take<int32_t>(splits_size);
  A* x_memory = scratch.take<A>(x_size * threads);
  A* grad_memory = scratch.take<A>(grad_size * threads);
  A* sums = in_place ? reinterpret_cast<A*>(grad_values) : scratch.take<A>(copies * sums_size);
  if (plan.blocks > 1) split_rows_at_blocks(w, plan, splits, parallel);

  parallel_for(parallel, threads, [&](int64_t thread) {
    sample_panels<S>(w, grad_out, x, panels, by_panel ? part_begin(panels.panels, thread, threads) : 0,
                     by_panel ? part_begin(panels.panels, thread + 1, threads) : panels.panels,
                     by_panel ? 0 : w.split(thread, threads), by_panel ? w.rows : w.split(thread + 1, threads), plan,
                     splits, x_memory + thread * x_size, grad_memory + thread * grad_size,
                     sums + (by_panel ? thread * sums_size : 0) - first_entry);
  });
  if (in_place) return;
  parallel_for(parallel, threads, [&](int64_t thread) {
    for (int64_t j = part_begin(nnz, thread, threads); j < part_begin(nnz, thread + 1, threads); ++j) {
      A sum = sums[j];
      for (int64_t copy = 1; copy < copies; ++copy) sum += sums[copy * sums_size + j];
      narrow(sum, grad_values[j]);
    }
  });
}

// sums[f] = sum over all positions of m[f, p].
template <class S>
void sum_positions(const PanelMatrix& m, int64_t features, S* sums, const Parallel& parallel) {
  using A = Sum<S>;
  constexpr int lanes = Vec<A>::lanes, at_once = 64;
  const int64_t chunks = (features + at_once - 1) / at_once;
  parallel_for(parallel, parallel.threads, [&](int64_t thread) {
    alignas(64) A packed[at_once * lanes], held[at_once * lanes];
    for (int64_t chunk = part_begin(chunks, thread, parallel.threads);
         chunk < part_begin(chunks, thread + 1, parallel.threads); ++chunk) {
      const int64_t first = chunk * at_once, count = features - first < at_once ? features - first : at_once;
      for (int64_t i = 0; i < count * lanes; i += lanes) Vec<A>::zero().store(held + i);
      for (int64_t v = 0; v < m.vectors(lanes); ++v) {
        pack_vector<S>(m, v, first, count, packed, lanes);
        for (int64_t i = 0; i < count * lanes; i += lanes)
          (Vec<A>::load(held + i) + Vec<A>::load(packed + i)).store(held + i);
      }
      for (int64_t f = 0; f < count; ++f) narrow(Vec<A>::load(held + f * lanes).sum(), sums[first + f]);
    }
  });
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
