#include "cuda/masked_conv2d_routes.h"

namespace ilnas::cuda {
namespace {

// Fewer rows than this leave most of a block of the tiled kernels without work: a depthwise convolution, for one.
constexpr int kFewRows = 4;

Entries rows_of(const PatternView& p) { return {p.row_ptr, p.col, p.nnz}; }
Entries transposed_rows_of(const PatternView& p) { return {p.t_row_ptr, p.t_col, p.nnz}; }

// The routes worth trying, best first; a route asked for is the only one.
int candidates(Route route, DType dtype, const Gather& g, Route (&to)[3]) {
  if (route != Route::kBest) return to[0] = route, 1;
  int count = 0;
  if (g.rows_per_group >= kFewRows) {
    if (dtype != DType::kFloat32) to[count++] = Route::kCondensed;
    to[count++] = Route::kDirect;
  }
  to[count++] = Route::kGeneral;
  return count;
}

// Below this density the condensed gradient of the values stages more than it multiplies, by the resource model
// (docs/cuda_without_a_gpu.md), and the direct kernel is ahead.
constexpr double kCondensedGradDensity = 0.04;
// Its partial sums take eight times the direct kernel's, which a large layer has no memory for.
constexpr int64_t kCondensedGradBytes = 32 * 1024 * 1024;

// kBest where the direct kernel, or the general one for what fits no tile, is to be taken.
Route grad_values_route(Route route, DType dtype, const Gather& g, int64_t nnz) {
  if (route != Route::kBest) return route;
  if (g.rows_per_group < kFewRows) return Route::kGeneral;
  const double places =
      static_cast<double>(g.groups) * g.rows_per_group * g.sources_per_group * g.kernel_height * g.kernel_width;
  int64_t bytes = 0;
  const bool condensed = static_cast<double>(nnz) >= kCondensedGradDensity * places &&
                         condensed_grad_values_workspace(dtype, g, nnz, &bytes) == cudaSuccess &&
                         bytes <= kCondensedGradBytes;
  return condensed ? Route::kCondensed : Route::kBest;
}

cudaError_t launch_gather(Route route, const GatherCall& call, const void* form, void* workspace, cudaStream_t stream) {
  Route routes[3];
  cudaError_t error = cudaErrorNotSupported;
  const int count = candidates(route, call.dtype, call.g, routes);
  for (int i = 0; i < count && error == cudaErrorNotSupported; ++i) {
    if (routes[i] == Route::kCondensed)
      error = launch_condensed(call, form, workspace, stream);
    else if (routes[i] == Route::kDirect)
      error = launch_direct(call, stream);
    else
      error = launch_general(call, stream);
  }
  return error;
}

}  // namespace

cudaError_t compute_capability(int* arch) {
  DeviceLimits limits{};
  const cudaError_t error = device_limits(&limits);
  *arch = limits.arch;
  return error;
}

cudaError_t condensed_form_bytes(const Conv2dShape& s, int64_t nnz, bool backward, int64_t* bytes) {
  return condensed_form_bytes(backward ? backward_gather(s, {}, {}) : forward_gather(s, {}, {}), nnz, bytes);
}

cudaError_t launch_condensed_form(const Conv2dShape& s, const PatternView& p, bool backward, void* form,
                                  cudaStream_t stream) {
  if (backward) return launch_condensed_form(backward_gather(s, {}, {}), transposed_rows_of(p), form, stream);
  return launch_condensed_form(forward_gather(s, {}, {}), rows_of(p), form, stream);
}

cudaError_t masked_conv2d_workspace(Route route, DType dtype, const Conv2dShape& s, int64_t nnz, bool backward,
                                    bool has_form, int64_t* bytes) {
  const Gather g = backward ? backward_gather(s, {}, {}) : forward_gather(s, {}, {});
  *bytes = 0;
  Route routes[3];
  candidates(route, dtype, g, routes);
  if (routes[0] != Route::kCondensed) return cudaSuccess;
  const cudaError_t error = condensed_workspace(dtype, g, nnz, has_form, bytes);
  return error == cudaErrorNotSupported && route == Route::kBest ? cudaSuccess : error;
}

cudaError_t launch_masked_conv2d(Route route, DType dtype, const Conv2dShape& s, const PatternView& p,
                                 const ImageView& x, const void* values, const void* bias, const ImageView& out,
                                 const void* form, void* workspace, cudaStream_t stream) {
  const GatherCall call{dtype, forward_gather(s, x, out), rows_of(p), nullptr, x.data, values, bias, out.data};
  return launch_gather(route, call, form, workspace, stream);
}

cudaError_t launch_masked_conv2d_grad_x(Route route, DType dtype, const Conv2dShape& s, const PatternView& p,
                                        const ImageView& grad_out, const void* values, const ImageView& grad_x,
                                        const void* form, void* workspace, cudaStream_t stream) {
  const GatherCall call{
      dtype,      backward_gather(s, grad_out, grad_x), transposed_rows_of(p), p.t_perm, grad_out.data, values, nullptr,
      grad_x.data};
  return launch_gather(route, call, form, workspace, stream);
}

cudaError_t masked_conv2d_grad_values_workspace(Route route, DType dtype, const Conv2dShape& s, int64_t nnz,
                                                int64_t* bytes) {
  const Gather g = forward_gather(s, {}, {});
  const Route chosen = grad_values_route(route, dtype, g, nnz);
  if (chosen == Route::kCondensed) return condensed_grad_values_workspace(dtype, g, nnz, bytes);
  return direct_grad_values_workspace(chosen, dtype, g, nnz, bytes);
}

cudaError_t launch_masked_conv2d_grad_values(Route route, DType dtype, const Conv2dShape& s, const PatternView& p,
                                             const ImageView& grad_out, const ImageView& x, void* grad_values,
                                             void* workspace, cudaStream_t stream) {
  const GradValuesArguments arguments{dtype,      forward_gather(s, x, grad_out), rows_of(p), grad_out.data, x.data,
                                      grad_values};
  const Route chosen = grad_values_route(route, dtype, arguments.g, p.nnz);
  if (chosen == Route::kCondensed) return launch_condensed_grad_values(arguments, workspace, stream);
  return launch_direct_grad_values(chosen, arguments, workspace, stream);
}

}  // namespace ilnas::cuda
