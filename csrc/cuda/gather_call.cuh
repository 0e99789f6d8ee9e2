// The arguments of the direct and the general kernel.
#pragma once
#include "cuda/masked_conv2d_routes.h"

namespace ilnas::cuda {

template <class S>
struct TypedCall {
  Gather g;
  Global<const S> source, values, bias;
  Global<const int32_t> row_ptr, col, perm;
  Global<S> target;
  bool has_bias, has_perm;
};

template <class S>
TypedCall<S> typed_call(const GatherCall& c) {
  return {c.g,
          static_cast<const S*>(c.source),
          static_cast<const S*>(c.values),
          static_cast<const S*>(c.bias),
          c.entries.row_ptr,
          c.entries.col,
          c.perm,
          static_cast<S*>(c.target),
          c.bias != nullptr,
          c.perm != nullptr};
}

}  // namespace ilnas::cuda
