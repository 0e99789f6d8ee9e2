// The CPU kernels on raw pointers, one set of function pointers per compiled instruction set.
//
// Kernels allocate nothing that outlives a call, keep no state, and take the thread pool as an argument.
// Given the same inputs and the same thread count they return the same bits.
#pragma once
#include <cstdint>

#include "cpu/storage.h"

namespace ilnas {

// Runs body(context, task) for task in [0, tasks), possibly at once on several threads.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void* context, void (*body)(void* context, int64_t task));
};

// The live positions of a weight [rows, cols], row-compressed, and the same compressed by input channel.
//   row_ptr [rows + 1]; col [nnz] ascending within a row, col = (input channel in group) * taps + tap.
//   t_row_ptr [in_channels + 1]; t_col [nnz] = (output channel in group) * taps + tap, ascending within a row;
//   t_perm [nnz]: the position of the transposed entry in `col` order, the order of the packed values.
struct PatternView {
  const int32_t* row_ptr;
  const int32_t* col;
  const int32_t* t_row_ptr;
  const int32_t* t_col;
  const int32_t* t_perm;
  int64_t nnz;
};

// An image batch [batch, channels, height, width] with strides counted in elements.
struct ImageView {
  void* data;
  int64_t batch_stride, channel_stride, row_stride, col_stride;
};

// [batch, channels, height, width] -> [batch, out_channels, out_height, out_width]; bottom and right padding follow
// from the output size. Positions outside the image read as zero.
struct Conv2dShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left;
  int64_t dilation_height, dilation_width;
  int64_t groups;
};

// A matrix [rows, cols] with strides counted in elements.
struct MatrixView {
  void* data;
  int64_t row_stride, col_stride;
};

struct LinearShape {
  int64_t batch, in_features, out_features;
};

// What absent_topk ranks, and where the answer goes.
//   by_kernel: one candidate per (output channel, input channel) with an absent tap, scored by the root mean square of
//   its absent taps' gradients; otherwise one candidate per absent weight.
//   Candidates scored below `floor` are left out. index [k] and grad [k] come sorted by falling |grad|, ties by rising
//   index; places without a candidate hold index -1 and grad 0. non_finite: how many candidates had NaN or Inf.
struct TopkQuery {
  int64_t k;
  bool by_kernel;
  float floor;
  int64_t* index;
  float* grad;
  int64_t* non_finite;
};

// Batch normalisation of a ReLU, channel by channel of a matrix [channels, length]; everything of one dtype, float32 or
// float64. training: by the mean and variance of each channel, which the running ones follow; otherwise by these.
//   mean, inverse_std [channels]: what was used, for the backward.
struct ReluNorm {
  int64_t channels, length;
  const void *x, *weight, *bias;
  void *running_mean, *running_var;
  bool training;
  double momentum, eps;
  void *mean, *inverse_std, *out;
};
struct ReluNormBackward {
  int64_t channels, length;
  const void *grad_out, *x, *weight, *mean, *inverse_std;
  bool training;
  void *grad_x, *grad_weight, *grad_bias;
};

// 2x2 max pooling with stride 2, matrices [channels, height, width, batch]; float32 or float64.
struct MaxPool {
  int64_t channels, height, width, batch;
  const void* x;
  void* out;  // [channels, height / 2, width / 2, batch]
};
struct MaxPoolBackward {
  int64_t channels, height, width, batch;
  const void *grad_out, *x;
  void* grad_x;
};

// values, bias and their gradients have the dtype of x. bias may be null; a null gradient is not computed.
struct Kernels {
  // out[n,o,:,:] = bias[o] + sum over live (o,c,kh,kw) of values * x[n,c,...]
  void (*masked_conv2d)(DType, const Conv2dShape&, const PatternView&, const ImageView& x, const void* values,
                        const void* bias, const ImageView& out, const Parallel&);
  // adds_grad_x: the gradient of x is added to what grad_x holds.
  void (*masked_conv2d_backward)(DType, const Conv2dShape&, const PatternView&, const ImageView& grad_out,
                                 const ImageView& x, const void* values, const ImageView* grad_x, bool adds_grad_x,
                                 void* grad_values, void* grad_bias, const Parallel&);
  // out[b,o] = bias[o] + sum over live (o,i) of values * x[b,i]
  void (*masked_linear)(DType, const LinearShape&, const PatternView&, const MatrixView& x, const void* values,
                        const void* bias, const MatrixView& out, const Parallel&);
  void (*masked_linear_backward)(DType, const LinearShape&, const PatternView&, const MatrixView& grad_out,
                                 const MatrixView& x, const void* values, const MatrixView* grad_x, void* grad_values,
                                 void* grad_bias, const Parallel&);
  // The k best absent weights by |sum over n,oh,ow of grad_out * x|; `blocked` holds the live and excluded positions.
  // A linear layer is a 1x1 convolution over 1x1 images.
  void (*absent_topk)(DType, const Conv2dShape&, const PatternView& blocked, const ImageView& grad_out,
                      const ImageView& x, const TopkQuery&, const Parallel&);
  // out = (relu(x) - mean) / sqrt(variance + eps) * weight + bias
  void (*relu_norm)(DType, const ReluNorm&, const Parallel&);
  void (*relu_norm_backward)(DType, const ReluNormBackward&, const Parallel&);
  void (*max_pool)(DType, const MaxPool&, const Parallel&);
  void (*max_pool_backward)(DType, const MaxPoolBackward&, const Parallel&);
  // Of a contiguous weight with elements of 1, 2, 4 or 8 bytes, element i live if bit i % 8 of byte i / 8 is set, the
  // elements of whole bytes [begin, end): whether an absent one holds anything but a zero (NaN counts); zeroing those.
  bool (*has_strays)(int64_t element_size, const void* weight, const uint8_t* live_bits, int64_t begin, int64_t end);
  void (*zero_absent)(int64_t element_size, void* weight, const uint8_t* live_bits, int64_t begin, int64_t end);
};

enum class InstructionSet : int { kBaseline, kAvx2, kAvx512 };

// The kernels of one set; null where this binary does not hold it.
const Kernels* kernels(InstructionSet);
// Whether this binary holds the set and this processor and operating system run it.
bool runs_here(InstructionSet);
// Whether this processor is one on which Intel's MKL stays behind oneDNN: x86, but not of Intel's make.
bool mkl_is_slower();
// The fastest set that runs here.
InstructionSet best_instruction_set();

}  // namespace ilnas
