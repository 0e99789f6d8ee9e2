#include "cpu/sampled_products.inl"
#include "cpu/sparse_dots.inl"
#include "cpu/sparse_panels.inl"
#include "cpu/values.inl"

namespace ilnas {
namespace ILNAS_ISA {
namespace {

PanelMatrix features_by_batch(const MatrixView& m, int64_t batch) {
  return {m.data, 1, batch, 0, m.col_stride, m.row_stride};
}

// out[b, r] = bias[r] + sum over row r of values * x[b, col].
template <class S>
void multiply_batch(const SparseRows<Sum<S>>& w, const MatrixView& x, int64_t batch, const Sum<S>* bias,
                    const MatrixView& out, const Parallel& parallel) {
  if (batch <= dots_batch)
    sparse_dots<S>(w, x, batch, bias, out, parallel);
  else
    sparse_times_panels<S>(w, features_by_batch(x, batch), bias, features_by_batch(out, batch), parallel);
}

void masked_linear(DType dtype, const LinearShape& s, const PatternView& p, const MatrixView& x, const void* values,
                   const void* bias, const MatrixView& out, const Parallel& parallel) {
  with_stored_type(dtype, [&](auto stored) {
    using S = decltype(stored);
    const Widened<S> packed(values, p.nnz, parallel), offset(bias, bias ? s.out_features : 0, parallel);
    const SparseRows<Sum<S>> w{p.row_ptr, p.col, packed.data(), s.out_features, s.in_features};
    multiply_batch<S>(w, x, s.batch, bias ? offset.data() : nullptr, out, parallel);
  });
}

void masked_linear_backward(DType dtype, const LinearShape& s, const PatternView& p, const MatrixView& grad_out,
                            const MatrixView& x, const void* values, const MatrixView* grad_x, void* grad_values,
                            void* grad_bias, const Parallel& parallel) {
  with_stored_type(dtype, [&](auto stored) {
    using S = decltype(stored);
    if (grad_x) {
      const Permuted<S> packed(values, p.t_perm, p.nnz, parallel);
      const SparseRows<Sum<S>> w{p.t_row_ptr, p.t_col, packed.data(), s.in_features, s.out_features};
      multiply_batch<S>(w, grad_out, s.batch, nullptr, *grad_x, parallel);
    }
    const PanelMatrix g = features_by_batch(grad_out, s.batch);
    if (grad_values)
      sampled_products<S>({p.row_ptr, p.col, nullptr, s.out_features, s.in_features}, g, features_by_batch(x, s.batch),
                          static_cast<S*>(grad_values), parallel);
    if (grad_bias) sum_positions<S>(g, s.out_features, static_cast<S*>(grad_bias), parallel);
  });
}

}  // namespace
}  // namespace ILNAS_ISA
}  // namespace ilnas
