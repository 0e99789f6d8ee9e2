// The inner loops: a tile's sums held in registers over a list of live weights, and the same for their gradients.
#pragma once
#include "cpu/conv_geometry.inl"
#include "cpu/transpose.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// Live weights of some outputs within a block of channels: entries [begin[i], end[i]) belong to output i.
//   offset: in bytes, from the tile's first vector in the panel to what the weight's tap reads there.
template <class A>
struct TileWork {
  const char* panel;
  int64_t row_pitch;  // bytes
  const int32_t *begin, *end, *offset;
  int64_t outputs;
};

// sums[output][tile position] (+)= sum over the output's entries of value * panel; starts from bias where `fresh`.
template <class A, int TR, int TC>
void accumulate_tile(const TileWork<A>& work, const A* value, bool fresh, const A* bias, A* sums) {
  constexpr int lanes = Vec<A>::lanes;
  for (int64_t o = 0; o < work.outputs; ++o, sums += kTileSize * lanes) {
    const int32_t end = work.end[o];
    int32_t j = work.begin[o];
    // A row's entries of this block follow those of other blocks: the next row's lie far away.
    prefetch(work.offset + work.begin[o + 1]);
    prefetch(value + work.begin[o + 1]);
    if (j == end && !fresh) continue;
    Vec<A> a[TR][TC];
#pragma GCC unroll 4
    for (int r = 0; r < TR; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < TC; ++c)
        a[r][c] =
            fresh ? (bias ? Vec<A>::set1(bias[o]) : Vec<A>::zero()) : Vec<A>::load(sums + (r * kTileCols + c) * lanes);
    for (; j < end; ++j) {
      const char* row = work.panel + work.offset[j];
      const Vec<A> w = Vec<A>::set1(value[j]);
#pragma GCC unroll 4
      for (int r = 0; r < TR; ++r, row += work.row_pitch)
#pragma GCC unroll 4
        for (int c = 0; c < TC; ++c)
          a[r][c] = fma(w, Vec<A>::load(reinterpret_cast<const A*>(row) + c * lanes), a[r][c]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < TR; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < TC; ++c) a[r][c].store(sums + (r * kTileCols + c) * lanes);
  }
}

// Adds to grad[j ... j + count) the products of `count` <= 8 taps' tiles with the tile of gradients g.
template <class A, int TR, int TC, int count>
ILNAS_INLINE void correlate_entries(const TileWork<A>& work, const Vec<A> (&g)[TR][TC], int64_t j, A* grad) {
  constexpr int lanes = Vec<A>::lanes;
  const char* row[count];
  Vec<A> a[8];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) row[i] = work.panel + work.offset[j + i];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = Vec<A>::zero();
#pragma GCC unroll 4
  for (int r = 0; r < TR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < TC; ++c)
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i)
        a[i] = fma(g[r][c], Vec<A>::load(reinterpret_cast<const A*>(row[i]) + c * lanes), a[i]);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) row[i] += work.row_pitch;
  }
  A sums[8];
  sum_lanes_of_8(a, sums);
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) grad[j + i] += sums[i];
}

// grad[entry] += sum over the tile's positions and lanes of g[output] * panel at the entry's tap.
template <class A, int TR, int TC>
void correlate_tile(const TileWork<A>& work, const A* g, A* grad) {
  constexpr int lanes = Vec<A>::lanes;
  for (int64_t o = 0; o < work.outputs; ++o, g += kTileSize * lanes) {
    const int32_t end = work.end[o];
    int32_t j = work.begin[o];
    if (j == end) continue;
    Vec<A> held[TR][TC];
#pragma GCC unroll 4
    for (int r = 0; r < TR; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < TC; ++c) held[r][c] = Vec<A>::load(g + (r * kTileCols + c) * lanes);
    for (; j + 8 <= end; j += 8) correlate_entries<A, TR, TC, 8>(work, held, j, grad);
    switch (end - j) {
      case 7:
        correlate_entries<A, TR, TC, 7>(work, held, j, grad);
        break;
      case 6:
        correlate_entries<A, TR, TC, 6>(work, held, j, grad);
        break;
      case 5:
        correlate_entries<A, TR, TC, 5>(work, held, j, grad);
        break;
      case 4:
        correlate_entries<A, TR, TC, 4>(work, held, j, grad);
        break;
      case 3:
        correlate_entries<A, TR, TC, 3>(work, held, j, grad);
        break;
      case 2:
        correlate_entries<A, TR, TC, 2>(work, held, j, grad);
        break;
      case 1:
        correlate_entries<A, TR, TC, 1>(work, held, j, grad);
        break;
      default:
        break;
    }
  }
}

// Calls f with the tile's extents as compile-time constants.
template <int N>
struct Extent {
  static constexpr int value = N;
};
template <class F>
void with_cols(int64_t cols, const F& f) {
  switch (cols) {
    case 1:
      return f(Extent<1>{});
    case 2:
      return f(Extent<2>{});
    case 3:
      return f(Extent<3>{});
    default:
      return f(Extent<4>{});
  }
}
template <class F>
void with_extents(int64_t rows, int64_t cols, const F& f) {
  switch (rows) {
    case 1:
      return with_cols(cols, [&](auto c) { f(Extent<1>{}, c); });
    case 2:
      return with_cols(cols, [&](auto c) { f(Extent<2>{}, c); });
#if defined(ILNAS_ISA_AVX512)
    case 3:
      return with_cols(cols, [&](auto c) { f(Extent<3>{}, c); });
    default:
      return with_cols(cols, [&](auto c) { f(Extent<4>{}, c); });
#elif defined(ILNAS_ISA_AVX2)
    default:
      return with_cols(cols, [&](auto c) { f(Extent<3>{}, c); });
#else
    default:
      return;
#endif
  }
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
