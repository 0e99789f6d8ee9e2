// The sum that forward, grad of the input and both linear operators share:
//
//   target[n, r, y, x] = bias[r] + sum over the entries (s, kh, kw) of row r of value * source[n, s, sy, sx]
//
// Forward: rows are output channels, the source is x. Grad of the input: rows are input channels, the source is
// grad_out, the entries are the transposed pattern's.
#pragma once
#include "cpu/kernels.h"
#include "cuda/device.cuh"

namespace ilnas::cuda {

struct Strides {
  int64_t batch, channel, row, col;
};

// source = (scale * target + offset + dilation * tap) / divisor, where the division leaves no rest.
struct Axis {
  int scale, offset, dilation, divisor;
};

struct Gather {
  int64_t batch;
  int groups, rows_per_group, sources_per_group;
  int height, width;                // of the target
  int source_height, source_width;  // of the source
  int kernel_height, kernel_width;
  Axis vertical, horizontal;
  Strides target, source;
};

// Exact unsigned division of numbers below 2^31 by one fixed number, in two instructions (Granlund and Montgomery,
// "Division by invariant integers using multiplication").
struct Divisor {
  unsigned value, multiplier, shift;
};

inline Divisor divisor_of(int64_t value) {
  unsigned bits = 0;
  while ((int64_t{1} << bits) < value) ++bits;
  if (value <= 1) return {1, 0, 0};
  return {static_cast<unsigned>(value), static_cast<unsigned>((uint64_t{1} << (31 + bits)) / value + 1), bits - 1};
}

__device__ __forceinline__ unsigned quotient(unsigned dividend, const Divisor& by) {
  return by.value == 1 ? dividend : __umulhi(dividend, by.multiplier) >> by.shift;
}

// The quotient; dividend becomes the rest.
__device__ __forceinline__ unsigned split(unsigned& dividend, const Divisor& by) {
  const unsigned q = quotient(dividend, by);
  dividend -= q * by.value;
  return q;
}

// The first of the sorted columns [begin, end) that is not below `column`.
__device__ __forceinline__ int lower_bound(Global<const int32_t> col, int begin, int end, int column) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (col[middle] < column)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The source coordinate that `tap` joins to `target`, or -1 where there is none.
__device__ __forceinline__ int source_of(const Axis& axis, int target, int tap, int extent) {
  const int scaled = axis.scale * target + axis.offset + axis.dilation * tap;
  if (axis.divisor == 1) return scaled >= 0 && scaled < extent ? scaled : -1;
  if (scaled < 0 || scaled % axis.divisor != 0) return -1;
  return scaled / axis.divisor < extent ? scaled / axis.divisor : -1;
}

// Targets of one remainder modulo the divisor meet the same taps at the same distance: with target = remainder +
// divisor * t, source = scale * t + shift(tap). A divisor of 1 has one remainder.
struct AxisClass {
  int scale, base, dilation, divisor, origin;  // origin: the smallest shift of any tap
};

__host__ __device__ __forceinline__ AxisClass axis_class(const Axis& axis, int remainder, int kernel) {
  const int base = axis.scale * remainder + axis.offset;
  const int lowest = base + (axis.dilation < 0 ? axis.dilation * (kernel - 1) : 0);
  const int rest = ((lowest % axis.divisor) + axis.divisor) % axis.divisor;
  return {axis.scale, base, axis.dilation, axis.divisor, (lowest - rest) / axis.divisor + (rest != 0)};
}

// shift(tap) - origin, or -1 where the tap joins no target of the class.
__device__ __forceinline__ int shift_of(const AxisClass& axis, int tap) {
  const int scaled = axis.base + axis.dilation * tap;
  if (axis.divisor == 1) return scaled - axis.origin;
  return scaled % axis.divisor == 0 ? scaled / axis.divisor - axis.origin : -1;
}

// How many source coordinates `targets` neighbours of one class reach.
inline int64_t reach(const Axis& axis, int kernel, int64_t targets) {
  const int64_t span = static_cast<int64_t>(axis.dilation < 0 ? -axis.dilation : axis.dilation) * (kernel - 1);
  return (targets - 1) * axis.scale + span / axis.divisor + 1;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Strides strides_of(const ImageView& v) { return {v.batch_stride, v.channel_stride, v.row_stride, v.col_stride}; }

// One side of a convolution, all groups together.
struct Side {
  int64_t channels, height, width;
  const ImageView& images;
};

inline Gather gather_between(const Conv2dShape& s, const Side& target, const Side& source, const Axis& vertical,
                             const Axis& horizontal) {
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  return {s.batch,
          i(s.groups),
          i(target.channels / s.groups),
          i(source.channels / s.groups),
          i(target.height),
          i(target.width),
          i(source.height),
          i(source.width),
          i(s.kernel_height),
          i(s.kernel_width),
          vertical,
          horizontal,
          strides_of(target.images),
          strides_of(source.images)};
}

inline Axis forward_axis(int64_t stride, int64_t pad, int64_t dilation) {
  return {static_cast<int>(stride), -static_cast<int>(pad), static_cast<int>(dilation), 1};
}
inline Axis backward_axis(int64_t stride, int64_t pad, int64_t dilation) {
  return {1, static_cast<int>(pad), -static_cast<int>(dilation), static_cast<int>(stride)};
}

inline Gather forward_gather(const Conv2dShape& s, const ImageView& x, const ImageView& out) {
  return gather_between(s, {s.out_channels, s.out_height, s.out_width, out}, {s.in_channels, s.height, s.width, x},
                        forward_axis(s.stride_height, s.pad_top, s.dilation_height),
                        forward_axis(s.stride_width, s.pad_left, s.dilation_width));
}

inline Gather backward_gather(const Conv2dShape& s, const ImageView& grad_out, const ImageView& grad_x) {
  return gather_between(s, {s.in_channels, s.height, s.width, grad_x},
                        {s.out_channels, s.out_height, s.out_width, grad_out},
                        backward_axis(s.stride_height, s.pad_top, s.dilation_height),
                        backward_axis(s.stride_width, s.pad_left, s.dilation_width));
}

}  // namespace ilnas::cuda
