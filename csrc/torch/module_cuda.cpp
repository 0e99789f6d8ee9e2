// The extension module ilnas_kernels._C_cuda: importing it registers the CUDA kernels of the operators that _C defines.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) { m.doc() = "The CUDA kernels of torch.ops.ilnas."; }
