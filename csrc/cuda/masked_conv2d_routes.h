// Host side: what the launchers of the routes share.
#pragma once
#include "cuda/gather.cuh"
#include "cuda/kernels.h"

namespace ilnas::cuda {

// The compressed rows of a pattern.
struct Entries {
  const int32_t *row_ptr, *col;
  int64_t nnz;
};

struct GatherCall {
  DType dtype;
  Gather g;
  Entries entries;
  const int32_t* perm;                 // the place of an entry's value; null where it is the entry's own
  const void *source, *values, *bias;  // bias may be null
  void* target;
};

struct GradValuesArguments {
  DType dtype;
  Gather g;  // the forward's
  Entries entries;
  const void *grad_out, *x;
  void* grad_values;
};

// f(a value of the stored type)
template <class F>
cudaError_t with_stored_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    default:
      return cudaErrorNotSupported;
  }
}

// Each answers cudaErrorNotSupported where it cannot serve the call.
cudaError_t launch_general(const GatherCall&, cudaStream_t);
cudaError_t launch_direct(const GatherCall&, cudaStream_t);

bool tensor_cores_take(DType, int arch);
cudaError_t condensed_form_bytes(const Gather&, int64_t nnz, int64_t* bytes);
cudaError_t launch_condensed_form(const Gather&, const Entries&, void* form, cudaStream_t);
// A null form is built in the workspace.
cudaError_t condensed_workspace(DType, const Gather&, int64_t nnz, bool has_form, int64_t* bytes);
cudaError_t launch_condensed(const GatherCall&, const void* form, void* workspace, cudaStream_t);

cudaError_t condensed_grad_values_workspace(DType, const Gather&, int64_t nnz, int64_t* bytes);
cudaError_t launch_condensed_grad_values(const GradValuesArguments&, void* workspace, cudaStream_t);

// The direct kernel, or for Route::kGeneral and what fits no tile the general one.
cudaError_t direct_grad_values_workspace(Route, DType, const Gather&, int64_t nnz, int64_t* bytes);
cudaError_t launch_direct_grad_values(Route, const GradValuesArguments&, void* workspace, cudaStream_t);

}  // namespace ilnas::cuda
