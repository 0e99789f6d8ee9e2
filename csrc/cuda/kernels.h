// The CUDA kernels on raw device pointers. Launchers enqueue on `stream` of the current device and return at once;
// they allocate nothing: what they need beyond their arguments is a workspace whose size they tell.
// float32, float16 and bfloat16; sums in float32, in an order that depends on the arguments alone.
#pragma once
#ifdef ILNAS_SIMT
#include "cuda/device.cuh"
#else
#include <cuda_runtime.h>
#endif

#include "cpu/kernels.h"

namespace ilnas::cuda {

// 10 * major + minor of the current device.
cudaError_t compute_capability(int* arch);

// How a convolution is computed. All give the same sums up to rounding.
//   kGeneral: one thread per result. Every geometry.
//   kDirect: images staged in shared memory, one multiply-add per live weight and result. Needs a tile that fits.
//   kCondensed: tensor cores over the union of the columns of eight rows. 16-bit types; bfloat16 from sm_80 on.
enum class Route : int { kBest, kGeneral, kDirect, kCondensed };

// What kCondensed derives from the pattern and the shape alone: a caller may build it once and hand it to every
// launcher of the same direction, shape and device. cudaErrorNotSupported where kCondensed does not serve the shape.
cudaError_t condensed_form_bytes(const Conv2dShape&, int64_t nnz, bool backward, int64_t* bytes);
cudaError_t launch_condensed_form(const Conv2dShape&, const PatternView&, bool backward, void* form, cudaStream_t);

// Bytes of workspace of the two launchers below; cudaErrorNotSupported where the route cannot serve the arguments.
cudaError_t masked_conv2d_workspace(Route, DType, const Conv2dShape&, int64_t nnz, bool backward, bool has_form,
                                    int64_t* bytes);

// out[n,o,:,:] = bias[o] + sum over live (o,c,kh,kw) of values * x[n,c,...]; bias may be null, and so may form.
cudaError_t launch_masked_conv2d(Route, DType, const Conv2dShape&, const PatternView&, const ImageView& x,
                                 const void* values, const void* bias, const ImageView& out, const void* form,
                                 void* workspace, cudaStream_t stream);
// grad_x[n,c,:,:] = sum over live (o,c,kh,kw) of values * grad_out[n,o,...]
cudaError_t launch_masked_conv2d_grad_x(Route, DType, const Conv2dShape&, const PatternView&, const ImageView& grad_out,
                                        const void* values, const ImageView& grad_x, const void* form, void* workspace,
                                        cudaStream_t stream);

// grad_values[j] = sum over n,oh,ow of grad_out[n,o,oh,ow] * x[n,c,...] for every live weight j.
cudaError_t masked_conv2d_grad_values_workspace(Route, DType, const Conv2dShape&, int64_t nnz, int64_t* bytes);
cudaError_t launch_masked_conv2d_grad_values(Route, DType, const Conv2dShape&, const PatternView&,
                                             const ImageView& grad_out, const ImageView& x, void* grad_values,
                                             void* workspace, cudaStream_t stream);

// grad_bias[o] = sum over n,oh,ow of grad_out
int64_t grad_bias_workspace(const Conv2dShape&);
cudaError_t launch_grad_bias(DType, const Conv2dShape&, const ImageView& grad_out, void* grad_bias, void* workspace,
                             cudaStream_t stream);

// The k best absent weights, see TopkQuery. `blocked` holds the live and the excluded positions. Weights of fewer than
// 2^32 - 1 elements; batches below 2^30; granularity "kernel" to 4096 taps; cudaErrorNotSupported beyond.
cudaError_t absent_topk_workspace(const Conv2dShape&, int64_t k, bool by_kernel, int64_t* bytes);
cudaError_t launch_absent_topk(DType, const Conv2dShape&, const PatternView& blocked, const ImageView& grad_out,
                               const ImageView& x, const TopkQuery&, void* workspace, cudaStream_t stream);

}  // namespace ilnas::cuda
