// The images that a tile reads. Of a batch-last batch each number of an image lies in a cache line of its own, so a few
// images are turned over together, register by register, before the tile takes them one after the other.
#pragma once
#include "cpu/conv_copy.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// Whether images are neighbours in memory, and pixels at one stride are not.
inline bool is_batch_last(const ImageView& v, int64_t height, int64_t width) {
  const bool even = height == 1 || width == 1 || v.row_stride == width * v.col_stride;
  return v.batch_stride == 1 && height * width > 1 && even && (width == 1 ? v.row_stride : v.col_stride) > 1;
}

// Images [first, first + images) of a batch-last batch, their first `channels` channels, copied to NCHW.
template <class S>
ImageView turn_over(const ImageView& v, int64_t height, int64_t width, int64_t first, int64_t images, int64_t channels,
                    S* to) {
  constexpr int lanes = Vec<Sum<S>>::lanes;
  const int64_t plane = height * width, pixel_stride = width == 1 ? v.row_stride : v.col_stride;
  Vec<Sum<S>> block[lanes];
  S* image[lanes];
  for (int64_t i = 0; i < images; i += lanes) {
    const int64_t active = smaller(lanes, images - i);
    for (int64_t c = 0; c < channels; ++c) {
      const S* from = static_cast<const S*>(v.data) + first + i + c * v.channel_stride;
      for (int64_t l = 0; l < active; ++l) image[l] = to + ((i + l) * channels + c) * plane;
      for (int64_t p = 0; p < plane; p += lanes) {
        const int64_t pixels = smaller(lanes, plane - p);
        for (int64_t j = 0; j < lanes; ++j)
          block[j] = j >= pixels       ? Vec<Sum<S>>::zero()
                     : active == lanes ? load_widened(from + (p + j) * pixel_stride)
                                       : load_first_widened(from + (p + j) * pixel_stride, static_cast<int>(active));
        store_block<Store::kPlain, S>(block, image, p, active, pixels);
      }
    }
  }
  return {to, channels * plane, plane, width, 1};
}

// One side of a tile, x or grad_out: some channels of a batch.
template <class S>
class TileImages {
 public:
  // turned: room for `at_once` images; null where they are read as they are.
  TileImages(const ImageView& v, int64_t batch, int64_t height, int64_t width, int64_t channel, int64_t channels,
             int64_t at_once, S* turned)
      : all_(v),
        view_(v),
        batch_(batch),
        height_(height),
        width_(width),
        channels_(channels),
        at_once_(at_once),
        turned_(turned) {
    view_.data = all_.data = static_cast<S*>(v.data) + channel * v.channel_stride;
  }
  // Makes images [first, last] ready, at most at_once; `first` never falls.
  void reach(int64_t first, int64_t last) {
    if (turned_ == nullptr || last < end_) return;
    first_ = first, end_ = smaller(first + at_once_, batch_);
    view_ = turn_over(all_, height_, width_, first_, end_ - first_, channels_, turned_);
  }
  // Begins with image first(), and with the tile's first channel.
  const ImageView& view() const { return view_; }
  int64_t first() const { return first_; }

 private:
  ImageView all_, view_;
  int64_t batch_, height_, width_, channels_, at_once_;
  S* turned_;
  int64_t first_ = 0, end_ = 0;
};

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
