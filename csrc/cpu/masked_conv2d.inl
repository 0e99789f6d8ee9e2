// Masked 2-d convolution: forward, gradient of the input, gradients of the live weights and of the bias.
#include "cpu/conv_grad_values.inl"
#include "cpu/conv_run.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

// Whether an image's rows follow each other without a gap, so that its pixels form one row.
inline bool is_plane(const ImageView& v, int64_t height, int64_t width) {
  return (width == 1 || v.col_stride == 1) && (height == 1 || v.row_stride == width);
}

// A 1x1 convolution does not know which positions are neighbours. Where the pixels of an image are, lanes are best
// taken from them: registers then load and store without being turned over, in streams as long as an image.
template <class S>
void take_pixels_as_batch(Conv2dShape& s, ImageView& x, ImageView& out) {
  constexpr int64_t lanes = Vec<Sum<S>>::lanes;
  const bool pointwise = s.kernel_height == 1 && s.kernel_width == 1 && s.stride_height == 1 && s.stride_width == 1 &&
                         s.height == s.out_height && s.width == s.out_width && s.pad_top == 0 && s.pad_left == 0;
  const int64_t pixels = s.height * s.width;
  if (!pointwise || pixels % lanes != 0 || !is_plane(x, s.height, s.width) || !is_plane(out, s.height, s.width)) return;
  const auto turn = [](const ImageView& v) { return ImageView{v.data, 1, v.channel_stride, v.batch_stride, lanes}; };
  x = turn(x), out = turn(out);
  s.height = s.out_height = s.batch, s.width = s.out_width = pixels / lanes, s.batch = lanes;
}

void masked_conv2d(DType dtype, const Conv2dShape& s, const PatternView& p, const ImageView& x, const void* values,
                   const void* bias, const ImageView& out, const Parallel& parallel) {
  with_stored_type(dtype, [&](auto stored) {
    using S = decltype(stored);
    Conv2dShape shape = s;
    ImageView from = x, to = out;
    take_pixels_as_batch<S>(shape, from, to);
    run_problem(forward_problem(shape, from, to), {p.row_ptr, p.col, nullptr, p.nnz}, static_cast<const S*>(values),
                static_cast<const S*>(bias), p.t_row_ptr, parallel);
  });
}

void masked_conv2d_backward(DType dtype, const Conv2dShape& s, const PatternView& p, const ImageView& grad_out,
                            const ImageView& x, const void* values, const ImageView* grad_x, bool adds_grad_x,
                            void* grad_values, void* grad_bias, const Parallel& parallel) {
  with_stored_type(dtype, [&](auto stored) {
    using S = decltype(stored);
    if (grad_x) {
      Conv2dShape shape = s;
      ImageView from = grad_out, to = *grad_x;
      take_pixels_as_batch<S>(shape, from, to);
      TiledConv problem = transposed_problem(shape, from, to);
      problem.adds = adds_grad_x;
      run_problem<S>(problem, {p.t_row_ptr, p.t_col, p.t_perm, p.nnz}, static_cast<const S*>(values), nullptr,
                     p.row_ptr, parallel);
    }
    if (grad_values || grad_bias) {
      Conv2dShape shape = s;
      ImageView from = x, to = grad_out;
      take_pixels_as_batch<S>(shape, from, to);
      run_grad_values(forward_problem(shape, from, to), {p.row_ptr, p.col, nullptr, p.nnz}, p.t_row_ptr,
                      static_cast<S*>(grad_values), static_cast<S*>(grad_bias), parallel);
    }
  });
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
