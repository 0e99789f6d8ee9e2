// Positions as SIMD lanes: parts of a matrix [features, positions] of any layout, packed to and unpacked from panels.
//
// A panel holds T vectors of positions for a run of features, [features][T * lanes], in the type sums are taken in.
#pragma once
#include "cpu/call.h"
#include "cpu/convert.inl"
#include "cpu/stream.inl"
#include "cpu/transpose.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// A matrix [features, images * plane]: the batch rows of a linear layer are the places of one image, the pixels of an
// NCHW batch those of many. Strides count elements.
struct PanelMatrix {
  void* data;
  int64_t images, plane;
  int64_t image_stride, feature_stride, place_stride;

  int64_t vectors_per_image(int lanes) const { return (plane + lanes - 1) / lanes; }
  int64_t vectors(int lanes) const { return images * vectors_per_image(lanes); }
};

// Where the lanes of vector v lie: `count` places from `offset` on; a vector never spans two images.
struct VectorPlace {
  int64_t offset;
  int count;
};
inline VectorPlace place_of(const PanelMatrix& m, int64_t v, int lanes) {
  const int64_t per_image = m.vectors_per_image(lanes), start = v % per_image * lanes, left = m.plane - start;
  return {v / per_image * m.image_stride + start * m.place_stride, left < lanes ? static_cast<int>(left) : lanes};
}

// Vector v of `features` features from `first` on: to[f * step ..] gets the lanes of feature first + f, zeros behind
// the last place.
template <class S>
void pack_vector(const PanelMatrix& m, int64_t v, int64_t first, int64_t features, Sum<S>* to, int64_t step) {
  using A = Sum<S>;
  constexpr int lanes = Vec<A>::lanes;
  const VectorPlace place = place_of(m, v, lanes);
  const S* from = static_cast<const S*>(m.data) + place.offset + first * m.feature_stride;
  if (m.place_stride == 1 || m.plane == 1) {
    for (int64_t f = 0; f < features; ++f, from += m.feature_stride)
      (place.count == lanes ? load_widened(from) : load_first_widened(from, place.count)).store(to + f * step);
    return;
  }
  if (m.feature_stride == 1) {
    for (int64_t f = 0; f < features; f += lanes) {
      const int width = features - f < lanes ? static_cast<int>(features - f) : lanes;
      Vec<A> block[lanes];
      for (int i = 0; i < lanes; ++i) {
        const S* row = from + i * m.place_stride + f;
        block[i] = i >= place.count ? Vec<A>::zero()
                   : width == lanes ? load_widened(row)
                                    : load_first_widened(row, width);
      }
      transpose(block);
      for (int i = 0; i < width; ++i) block[i].store(to + (f + i) * step);
    }
    return;
  }
  for (int64_t f = 0; f < features; ++f)
    for (int i = 0; i < lanes; ++i)
      to[f * step + i] = i < place.count ? widen(from[f * m.feature_stride + i * m.place_stride]) : A(0);
}

// The inverse: lanes behind the last place are dropped. large: the whole matrix, see is_large().
template <class S>
void unpack_vector(const Sum<S>* from, int64_t step, const PanelMatrix& m, int64_t v, int64_t first, int64_t features,
                   bool large) {
  using A = Sum<S>;
  constexpr int lanes = Vec<A>::lanes;
  const VectorPlace place = place_of(m, v, lanes);
  S* to = static_cast<S*>(m.data) + place.offset + first * m.feature_stride;
  if (m.place_stride == 1 || m.plane == 1) {
    for (int64_t f = 0; f < features; ++f, to += m.feature_stride) {
      const Vec<A> sums = Vec<A>::load(from + f * step);
      if (place.count == lanes)
        store_narrowed(sums, to);
      else
        store_first_narrowed(sums, to, place.count);
    }
    return;
  }
  if (m.feature_stride == 1) {
    const bool streams = large && can_stream<S>() && reinterpret_cast<uintptr_t>(to) % sizeof(Vec<A>) == 0 &&
                         m.place_stride % lanes == 0;
    for (int64_t f = 0; f < features; f += lanes) {
      const int width = features - f < lanes ? static_cast<int>(features - f) : lanes;
      Vec<A> block[lanes];
      for (int i = 0; i < lanes; ++i) block[i] = i < width ? Vec<A>::load(from + (f + i) * step) : Vec<A>::zero();
      transpose(block);
      for (int i = 0; i < place.count; ++i) {
        S* row = to + i * m.place_stride + f;
        if (width < lanes)
          store_first_narrowed(block[i], row, width);
        else if (streams)
          store_past_caches<S>(block[i], row);
        else
          store_narrowed(block[i], row);
      }
    }
    return;
  }
  for (int64_t f = 0; f < features; ++f)
    for (int i = 0; i < place.count; ++i) narrow(from[f * step + i], to[f * m.feature_stride + i * m.place_stride]);
}

// How the vectors of a matrix are dealt to panels: as few panels as hold them with at most `widest` vectors each,
// of nearly equal width.
struct PanelSplit {
  int64_t vectors, panels;

  static PanelSplit of(int64_t vectors, int64_t widest) { return {vectors, (vectors + widest - 1) / widest}; }
  int64_t first(int64_t panel) const { return panel * vectors / panels; }
  int width(int64_t panel) const { return static_cast<int>(first(panel + 1) - first(panel)); }
};

template <class S>
void pack_panel(const PanelMatrix& m, int64_t first_vector, int width, int64_t first, int64_t features, Sum<S>* to) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  for (int t = 0; t < width; ++t)
    pack_vector<S>(m, first_vector + t, first, features, to + t * lanes, int64_t{width} * lanes);
}
template <class S>
void unpack_panel(const Sum<S>* from, const PanelMatrix& m, int64_t first_vector, int width, int64_t first,
                  int64_t features, bool large) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  for (int t = 0; t < width; ++t)
    unpack_vector<S>(from + t * lanes, int64_t{width} * lanes, m, first_vector + t, first, features, large);
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
