// Every CPU kernel, compiled once per instruction set: the including file names the set in ILNAS_ISA and has switched
// the compiler to it. Nothing here may use a standard-library template: the linker would keep one copy of it, perhaps
// the one compiled for a set this processor lacks.
#include "cpu/absent_topk.inl"
#include "cpu/live_bits.inl"
#include "cpu/masked_conv2d.inl"
#include "cpu/masked_linear.inl"
#include "cpu/max_pool.inl"
#include "cpu/relu_norm.inl"

namespace ilnas {
namespace ILNAS_ISA {
extern const Kernels kernel_table;
const Kernels kernel_table = {masked_conv2d, masked_conv2d_backward, masked_linear, masked_linear_backward, absent_topk,
                              relu_norm,     relu_norm_backward,     max_pool,      max_pool_backward,      has_strays,
                              zero_absent};
}  // namespace ILNAS_ISA
}  // namespace ilnas
