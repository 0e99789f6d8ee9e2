// Image windows to and from memory in which the lanes lie innermost, whatever the image's strides.
#pragma once
#include "cpu/conv_geometry.inl"
#include "cpu/scratch.h"
#include "cpu/stream.inl"
#include "cpu/transpose.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// The places of a patch's window that are copied: slot[i * cols + j] is where, in elements from a channel's start, the
// vector of window row row_place[i], column col_place[j] lies in the packed memory.
struct Window {
  int64_t rows, cols;
  int32_t *row_place, *col_place, *slot;
};

// Where each lane's window starts: `image` in elements, row and column in image positions, possibly outside of it.
// aligned: all active lanes at the same row and column, of consecutive images.
struct Lanes {
  int64_t active;
  bool aligned;
  int64_t image[kMaxLanes], row[kMaxLanes], col[kMaxLanes];

  // The end of the run of lanes at one place, of consecutive images, that starts at l.
  int64_t run_end(int64_t l) const {
    int64_t end = l + 1;
    while (end < active && row[end] == row[l] && col[end] == col[l] && image[end] > image[end - 1]) ++end;
    return end;
  }
};

// The positions of an aligned window inside the image: source[k], in elements from the image's channel, goes to
// slot[k]; slots in `zero` lie outside.
struct Positions {
  int64_t count, zeros;
  int64_t* source;
  int32_t *slot, *zero;

  static int64_t bytes(const Window& w) {
    return Scratch::size<int64_t>(w.rows * w.cols) + 2 * Scratch::size<int32_t>(w.rows * w.cols);
  }
  static Positions take(const Window& w, Scratch& scratch) {
    int64_t* source = scratch.take<int64_t>(w.rows * w.cols);
    int32_t* slot = scratch.take<int32_t>(w.rows * w.cols);
    return {0, 0, source, slot, scratch.take<int32_t>(w.rows * w.cols)};
  }
  void find(const Window& w, const ImageView& image, int64_t height, int64_t width, int64_t row, int64_t col) {
    count = zeros = 0;
    for (int64_t i = 0; i < w.rows; ++i) {
      const int64_t r = row + w.row_place[i];
      const bool row_inside = r >= 0 && r < height;
      for (int64_t j = 0; j < w.cols; ++j) {
        const int64_t q = col + w.col_place[j];
        if (row_inside && q >= 0 && q < width) {
          slot[count] = w.slot[i * w.cols + j];
          source[count++] = r * image.row_stride + q * image.col_stride;
        } else {
          zero[zeros++] = w.slot[i * w.cols + j];
        }
      }
    }
  }
  // The end of the run of neighbours in memory that starts at k.
  int64_t run_end(int64_t k) const {
    int64_t end = k + 1;
    while (end < count && source[end] == source[end - 1] + 1) ++end;
    return end;
  }
};

enum class CopyOrder { kAcrossBatch, kAlongRows, kAcrossChannels, kScalar };

// Which dimension of the image is contiguous decides how registers are filled.
inline CopyOrder copy_order(const ImageView& v, const Lanes& lanes, int64_t width) {
  if (lanes.aligned && v.batch_stride == 1) return CopyOrder::kAcrossBatch;
  if (v.col_stride == 1 || (width == 1 && v.row_stride == 1)) return CopyOrder::kAlongRows;
  if (v.channel_stride == 1) return CopyOrder::kAcrossChannels;
  return CopyOrder::kScalar;
}

template <class S>
using LanePointers = const S * [Vec<Sum<S>>::lanes];

// v[j] = element j of every lane, for j < n; zero in idle lanes.
template <class S>
ILNAS_INLINE void load_block(const S* const* from, int64_t offset, int64_t active, int64_t n,
                             Vec<Sum<S>> (&v)[Vec<Sum<S>>::lanes]) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  if (n == lanes && active == lanes) {
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) v[l] = load_widened(from[l] + offset);
  } else {
    for (int l = 0; l < lanes; ++l)
      v[l] = l < active ? load_first_widened(from[l] + offset, static_cast<int>(n)) : Vec<Sum<S>>::zero();
  }
  transpose(v);
}

// kAdd adds to what the memory holds.
enum class Store { kPlain, kStream, kAdd };

template <Store how, class S>
ILNAS_INLINE void store_whole(Vec<Sum<S>> v, S* p) {
  if constexpr (how == Store::kStream)
    store_past_caches<S>(v, p);
  else if constexpr (how == Store::kAdd)
    store_narrowed(load_widened(p) + v, p);
  else
    store_narrowed(v, p);
}
template <Store how, class S>
ILNAS_INLINE void store_first(Vec<Sum<S>> v, S* p, int n) {
  store_first_narrowed(how == Store::kAdd ? load_first_widened(p, n) + v : v, p, n);
}

template <Store how, class S>
ILNAS_INLINE void store_block(Vec<Sum<S>> (&v)[Vec<Sum<S>>::lanes], S* const* to, int64_t offset, int64_t active,
                              int64_t n) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  transpose(v);
  if (n == lanes && active == lanes) {
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) store_whole<how>(v[l], to[l] + offset);
  } else {
    for (int l = 0; l < active; ++l) store_first<how>(v[l], to[l] + offset, static_cast<int>(n));
  }
}

// Channels [first, last) of the lanes' windows. Unless in_ptr is null, channels with in_ptr[c] == in_ptr[c + 1] have no
// live weight and may be left out.
template <class S>
struct PackTask {
  const ImageView& image;
  int64_t height, width;
  const Window& window;
  const Lanes& lanes;
  const Positions& positions;  // of aligned lanes
  int64_t first, last;
  const int32_t* in_ptr;
  int64_t pitch;  // between channels in `to`
  Sum<S>* to;

  bool skips(int64_t channel) const { return in_ptr != nullptr && in_ptr[channel] == in_ptr[channel + 1]; }
  const S* lane(int64_t l) const { return static_cast<const S*>(image.data) + lanes.image[l]; }
};

template <class S>
void zero_outside(const PackTask<S>& t, int64_t channel) {
  using V = Vec<Sum<S>>;
  Sum<S>* to = t.to + (channel - t.first) * t.pitch;
  for (int64_t k = 0; k < t.positions.zeros; ++k) V::zero().store(to + t.positions.zero[k]);
}

template <class S>
void pack_across_batch(const PackTask<S>& t) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  const Positions& p = t.positions;
  for (int64_t c = t.first; c < t.last; ++c) {
    if (t.skips(c)) continue;
    zero_outside(t, c);
    const S* from = t.lane(0) + c * t.image.channel_stride;
    Sum<S>* to = t.to + (c - t.first) * t.pitch;
    if (t.lanes.active == lanes) {
      for (int64_t k = 0; k < p.count; ++k) {
        prefetch(from + p.source[k] + t.image.channel_stride);
        load_widened(from + p.source[k]).store(to + p.slot[k]);
      }
    } else {
      for (int64_t k = 0; k < p.count; ++k)
        load_first_widened(from + p.source[k], static_cast<int>(t.lanes.active)).store(to + p.slot[k]);
    }
  }
}

template <class S>
void pack_along_rows(const PackTask<S>& t) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  const Positions& p = t.positions;
  const S* from[lanes];
  Vec<Sum<S>> v[lanes];
  for (int64_t c = t.first; c < t.last; ++c) {
    if (t.skips(c)) continue;
    zero_outside(t, c);
    for (int64_t l = 0; l < t.lanes.active; ++l) from[l] = t.lane(l) + c * t.image.channel_stride;
    Sum<S>* to = t.to + (c - t.first) * t.pitch;
    for (int64_t k = 0; k < p.count;) {
      const int64_t end = p.run_end(k);
      for (; k + lanes <= end; k += lanes) {
        // The hardware follows neither so many streams nor their jumps from channel to channel.
        for (int64_t l = 0; l < t.lanes.active; ++l) prefetch_far(from[l] + p.source[k] + t.image.channel_stride);
        load_block(from, p.source[k], t.lanes.active, lanes, v);
#pragma GCC unroll 16
        for (int j = 0; j < lanes; ++j) v[j].store(to + p.slot[k + j]);
      }
      if (k < end) {
        load_block(from, p.source[k], t.lanes.active, end - k, v);
        for (int64_t j = 0; k < end; ++j, ++k) v[j].store(to + p.slot[k]);
      }
    }
  }
}

template <class S>
void pack_across_channels(const PackTask<S>& t) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  const Positions& p = t.positions;
  const S* from[lanes];
  Vec<Sum<S>> v[lanes];
  for (int64_t l = 0; l < t.lanes.active; ++l) from[l] = t.lane(l);
  for (int64_t c = t.first; c < t.last; ++c) zero_outside(t, c);
  for (int64_t k = 0; k < p.count; ++k) {
    Sum<S>* to = t.to + p.slot[k];
    const int64_t ahead = smaller(k + 4, p.count - 1);
    for (int64_t c = t.first; c < t.last; c += lanes, to += lanes * t.pitch) {
      const int64_t n = smaller(lanes, t.last - c);
      for (int64_t l = 0; l < t.lanes.active; ++l) prefetch_far(from[l] + p.source[ahead] + c);
      load_block(from, p.source[k] + c, t.lanes.active, n, v);
      if (n == lanes) {
#pragma GCC unroll 16
        for (int j = 0; j < lanes; ++j) v[j].store(to + j * t.pitch);
      } else {
        for (int64_t j = 0; j < n; ++j) v[j].store(to + j * t.pitch);
      }
    }
  }
}

// Lanes at different places of batch-last images: those of one place are neighbours, a run of lanes.
template <class S>
void pack_runs_across_batch(const PackTask<S>& t) {
  using V = Vec<Sum<S>>;
  Positions p = t.positions;
  for (int64_t l = 0, end; l < t.lanes.active; l = end) {
    end = t.lanes.run_end(l);
    const int n = static_cast<int>(end - l);
    p.find(t.window, t.image, t.height, t.width, t.lanes.row[l], t.lanes.col[l]);
    // The first run fills up the idle lanes.
    const auto store = [&](V v, Sum<S>* to) { l == 0 ? v.store(to) : v.store_first(to + l, n); };
    for (int64_t c = t.first; c < t.last; ++c) {
      if (t.skips(c)) continue;
      const S* from = t.lane(l) + c * t.image.channel_stride;
      Sum<S>* to = t.to + (c - t.first) * t.pitch;
      for (int64_t k = 0; k < p.zeros; ++k) store(V::zero(), to + p.zero[k]);
      for (int64_t k = 0; k < p.count; ++k) store(load_first_widened(from + p.source[k], n), to + p.slot[k]);
    }
  }
}

// Lanes whose windows lie differently in their images, and strides that no register-wide load fits.
template <class S>
void pack_scalar(const PackTask<S>& t) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  const Window& w = t.window;
  for (int64_t c = t.first; c < t.last; ++c) {
    if (t.skips(c)) continue;
    for (int64_t i = 0; i < w.rows; ++i)
      for (int64_t j = 0; j < w.cols; ++j) {
        Sum<S>* to = t.to + (c - t.first) * t.pitch + w.slot[i * w.cols + j];
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t row = t.lanes.row[l] + w.row_place[i], col = t.lanes.col[l] + w.col_place[j];
          const bool inside = l < t.lanes.active && row >= 0 && row < t.height && col >= 0 && col < t.width;
          to[l] =
              inside
                  ? widen(t.lane(l)[c * t.image.channel_stride + row * t.image.row_stride + col * t.image.col_stride])
                  : Sum<S>(0);
        }
      }
  }
}

template <class S>
void pack(const PackTask<S>& t) {
  if (!t.lanes.aligned) return t.image.batch_stride == 1 ? pack_runs_across_batch(t) : pack_scalar(t);
  switch (copy_order(t.image, t.lanes, t.width)) {
    case CopyOrder::kAcrossBatch:
      return pack_across_batch(t);
    case CopyOrder::kAlongRows:
      return pack_along_rows(t);
    case CopyOrder::kAcrossChannels:
      return pack_across_channels(t);
    case CopyOrder::kScalar:
      return pack_scalar(t);
  }
}

// All channels of the lanes' windows back into the image; places outside of it are dropped.
template <class S>
struct UnpackTask {
  const Sum<S>* from;
  int64_t pitch, channels;
  const ImageView& image;
  int64_t height, width;
  const Window& window;
  const Lanes& lanes;
  const Positions& positions;
  bool large;  // the image as a whole
  bool adds;   // to what the image holds

  S* lane(int64_t l) const { return static_cast<S*>(image.data) + lanes.image[l]; }
  // Whether every whole register that is stored fills a cache line, in an image too large to wait in cache.
  bool streams() const {
    if (!can_stream<S>() || lanes.active < Vec<Sum<S>>::lanes || !large) return false;
    constexpr int64_t line = 64;
    const auto whole = [](int64_t stride) { return stride * int64_t{sizeof(S)} % line == 0; };
    const CopyOrder order = copy_order(image, lanes, width);
    if (order != CopyOrder::kAcrossBatch && !whole(image.batch_stride)) return false;
    if (order != CopyOrder::kAcrossChannels && !whole(image.channel_stride)) return false;
    if (reinterpret_cast<uintptr_t>(static_cast<S*>(image.data) + lanes.image[0]) % line != 0) return false;
    for (int64_t k = 0; k < positions.count; k = positions.run_end(k))
      if (!whole(positions.source[k])) return false;
    return true;
  }
};

template <Store how, class S>
void unpack_across_batch(const UnpackTask<S>& t) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  using V = Vec<Sum<S>>;
  const Positions& p = t.positions;
  for (int64_t c = 0; c < t.channels; ++c) {
    S* to = t.lane(0) + c * t.image.channel_stride;
    const Sum<S>* from = t.from + c * t.pitch;
    if (t.lanes.active == lanes) {
      for (int64_t k = 0; k < p.count; ++k) store_whole<how>(V::load(from + p.slot[k]), to + p.source[k]);
    } else {
      for (int64_t k = 0; k < p.count; ++k)
        store_first<how>(V::load(from + p.slot[k]), to + p.source[k], static_cast<int>(t.lanes.active));
    }
  }
}

template <Store how, class S>
void unpack_runs_across_batch(const UnpackTask<S>& t) {
  Positions p = t.positions;
  for (int64_t l = 0, end; l < t.lanes.active; l = end) {
    end = t.lanes.run_end(l);
    const int n = static_cast<int>(end - l);
    p.find(t.window, t.image, t.height, t.width, t.lanes.row[l], t.lanes.col[l]);
    for (int64_t c = 0; c < t.channels; ++c) {
      const Sum<S>* from = t.from + c * t.pitch + l;
      S* to = t.lane(l) + c * t.image.channel_stride;
      for (int64_t k = 0; k < p.count; ++k)
        store_first<how>(load_first_widened(from + p.slot[k], n), to + p.source[k], n);
    }
  }
}

template <Store how, class S>
void unpack_along_rows(const UnpackTask<S>& t) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  using V = Vec<Sum<S>>;
  const Positions& p = t.positions;
  S* to[lanes];
  V v[lanes];
  for (int64_t c = 0; c < t.channels; ++c) {
    for (int64_t l = 0; l < t.lanes.active; ++l) to[l] = t.lane(l) + c * t.image.channel_stride;
    const Sum<S>* from = t.from + c * t.pitch;
    for (int64_t k = 0; k < p.count;) {
      const int64_t end = p.run_end(k);
      for (; k < end; k += lanes) {
        const int64_t n = smaller(lanes, end - k);
        if (n == lanes) {
#pragma GCC unroll 16
          for (int j = 0; j < lanes; ++j) v[j] = V::load(from + p.slot[k + j]);
        } else {
          for (int j = 0; j < lanes; ++j) v[j] = j < n ? V::load(from + p.slot[k + j]) : V::zero();
        }
        store_block<how>(v, to, p.source[k], t.lanes.active, n);
      }
      k = end;
    }
  }
}

template <Store how, class S>
void unpack_across_channels(const UnpackTask<S>& t) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  using V = Vec<Sum<S>>;
  const Positions& p = t.positions;
  S* to[lanes];
  V v[lanes];
  for (int64_t l = 0; l < t.lanes.active; ++l) to[l] = t.lane(l);
  for (int64_t k = 0; k < p.count; ++k)
    for (int64_t c = 0; c < t.channels; c += lanes) {
      const Sum<S>* from = t.from + c * t.pitch + p.slot[k];
      const int64_t n = smaller(lanes, t.channels - c);
      for (int j = 0; j < lanes; ++j) v[j] = j < n ? V::load(from + j * t.pitch) : V::zero();
      store_block<how>(v, to, p.source[k] + c, t.lanes.active, n);
    }
}

template <class S>
void unpack_scalar(const UnpackTask<S>& t) {
  const Window& w = t.window;
  for (int64_t c = 0; c < t.channels; ++c)
    for (int64_t i = 0; i < w.rows; ++i)
      for (int64_t j = 0; j < w.cols; ++j) {
        const Sum<S>* from = t.from + c * t.pitch + w.slot[i * w.cols + j];
        for (int64_t l = 0; l < t.lanes.active; ++l) {
          const int64_t row = t.lanes.row[l] + w.row_place[i], col = t.lanes.col[l] + w.col_place[j];
          if (row < 0 || row >= t.height || col < 0 || col >= t.width) continue;
          S& to = t.lane(l)[c * t.image.channel_stride + row * t.image.row_stride + col * t.image.col_stride];
          narrow(t.adds ? widen(to) + from[l] : from[l], to);
        }
      }
}

template <Store how, class S>
void unpack_aligned(const UnpackTask<S>& t) {
  switch (copy_order(t.image, t.lanes, t.width)) {
    case CopyOrder::kAcrossBatch:
      return unpack_across_batch<how>(t);
    case CopyOrder::kAlongRows:
      return unpack_along_rows<how>(t);
    case CopyOrder::kAcrossChannels:
      return unpack_across_channels<how>(t);
    case CopyOrder::kScalar:
      return unpack_scalar(t);
  }
}

template <class S>
void unpack(const UnpackTask<S>& t) {
  if (!t.lanes.aligned) {
    if (t.image.batch_stride != 1) return unpack_scalar(t);
    return t.adds ? unpack_runs_across_batch<Store::kAdd>(t) : unpack_runs_across_batch<Store::kPlain>(t);
  }
  if (t.adds) return unpack_aligned<Store::kAdd>(t);
  if (t.streams()) return unpack_aligned<Store::kStream>(t);
  unpack_aligned<Store::kPlain>(t);
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
