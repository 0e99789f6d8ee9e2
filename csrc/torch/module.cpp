// The extension module ilnas_kernels._C: the schemas of all operators, and what is no tensor operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/kernels.h"

// row_ptr, col: the live positions; t_*: the same by input channel (see PatternView). padding: top, bottom, left,
// right. isa names the CPU instruction set; empty means the best one. form: what condensed_form made of the rows that
// the operator reads (of the transposed ones for a backward), on CUDA devices; built anew at each call without it.
STABLE_TORCH_LIBRARY(ilnas, m) {
  m.def(
      "masked_conv2d(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor col, Tensor t_row_ptr, "
      "Tensor t_col, Tensor t_perm, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
      "str isa, Tensor? form=None) -> Tensor");
  m.def(
      "masked_conv2d_backward(Tensor grad_out, Tensor x, Tensor values, Tensor row_ptr, Tensor col, "
      "Tensor t_row_ptr, Tensor t_col, Tensor t_perm, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups, bool[] output_mask, str isa, Tensor? form=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "masked_conv2d_backward_add_(Tensor grad_out, Tensor x, Tensor values, Tensor(a!) grad_x, Tensor row_ptr, "
      "Tensor col, Tensor t_row_ptr, Tensor t_col, Tensor t_perm, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups, bool[] output_mask, str isa) -> (Tensor, Tensor)");
  m.def(
      "masked_linear(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor col, Tensor t_row_ptr, "
      "Tensor t_col, Tensor t_perm, str isa, Tensor? form=None) -> Tensor");
  m.def(
      "masked_linear_backward(Tensor grad_out, Tensor x, Tensor values, Tensor row_ptr, Tensor col, "
      "Tensor t_row_ptr, Tensor t_col, Tensor t_perm, bool[] output_mask, str isa, Tensor? form=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "absent_topk(Tensor x, Tensor grad_out, Tensor row_ptr, Tensor col, int k, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups, bool by_kernel, float floor, str isa) -> (Tensor, Tensor, Tensor)");
  m.def(
      "condensed_form(Tensor row_ptr, Tensor col, int[] x_size, int out_channels, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups, bool backward) -> Tensor");
}

PYBIND11_MODULE(_C, m) {
  using ilnas::InstructionSet;
  const std::map<std::string, InstructionSet> sets{
      {"avx512", InstructionSet::kAvx512}, {"avx2", InstructionSet::kAvx2}, {"baseline", InstructionSet::kBaseline}};
  m.def(
      "instruction_sets",
      [sets] {
        std::map<std::string, bool> compiled_and_runs;
        for (const auto& [name, set] : sets)
          if (ilnas::kernels(set)) compiled_and_runs[name] = ilnas::runs_here(set);
        return compiled_and_runs;
      },
      "The instruction sets compiled in, each with whether this processor runs it.");
  m.def(
      "best_instruction_set",
      [sets] {
        for (const auto& [name, set] : sets)
          if (set == ilnas::best_instruction_set()) return name;
        return std::string();
      },
      "The set that is used when none is named.");
  m.attr("mkl_is_slower") = ilnas::mkl_is_slower();
  m.attr("build_flags") = ILNAS_BUILD_FLAGS;
  m.attr("cuda_outcome") = ILNAS_CUDA_OUTCOME;  // whether the CUDA kernels were built beside this module, and why not
}
