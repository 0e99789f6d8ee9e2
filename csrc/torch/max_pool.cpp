#include "torch/cpu_call.h"

namespace ilnas {
namespace {

// All operands are contiguous [channels, height, width, batch].
void max_pool(const Tensor& x, Tensor out, const std::string& isa) {
  const MaxPool p{x.size(0), x.size(1), x.size(2), x.size(3), x.data_ptr(), out.data_ptr()};
  kernels_named(isa).max_pool(dtype_of(x), p, torch_parallel());
}

void max_pool_backward(const Tensor& grad_out, const Tensor& x, Tensor grad_x, const std::string& isa) {
  const MaxPoolBackward p{x.size(0),           x.size(1),    x.size(2),        x.size(3),
                          grad_out.data_ptr(), x.data_ptr(), grad_x.data_ptr()};
  kernels_named(isa).max_pool_backward(dtype_of(x), p, torch_parallel());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ilnas, m) {
  m.def("max_pool(Tensor x, Tensor(a!) out, str isa) -> ()");
  m.def("max_pool_backward(Tensor grad_out, Tensor x, Tensor(a!) grad_x, str isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ilnas, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&max_pool));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
}

}  // namespace ilnas
