"""The Triton kernels against dense torch on this GPU: ``python -m benchmarks.bench_gpu_triton --out FOLDER``.

The layers, the dense ways and the timing are bench_gpu's. Plans are made beforehand, as the layers keep them. Writes
``gpu_triton.json``; the Triton kernels serve machines without the CUDA extension, so nothing else is compared.
"""

from collections.abc import Callable

import torch

from benchmarks import bench_gpu
from ilnas_kernels import triton as kernels

POINT = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
SQUARE = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)


class TritonLayer(bench_gpu.Layer):
    """A layer whose own way is Triton's."""

    def ours(self, op: str, layout: torch.memory_format) -> Callable[[], object]:
        x, grad_out = self._laid_out(self.x, layout), self._laid_out(self.grad_out, layout)
        operands, geometry = self.pattern.operands, SQUARE if self.is_conv else ()
        if op == "absent_topk":
            k = round(bench_gpu.TOPK_SHARE * self.pattern.numel)
            if not self.is_conv:
                x, grad_out, geometry = x[:, :, None, None], grad_out[:, :, None, None], POINT
            return lambda: kernels.absent_topk_triton(x, grad_out, *operands[:2], k, *geometry, False, 0.0)
        if self.is_conv:
            forward, backward = kernels.masked_conv2d_triton, kernels.masked_conv2d_backward_triton
            plan = kernels.conv2d_plan(x, self.pattern, *geometry[:-1])
        else:
            forward, backward = kernels.masked_linear_triton, kernels.masked_linear_backward_triton
            plan = kernels.linear_plan(x, self.pattern)
        if op == "forward":
            return lambda: forward(x, self.values, None, *operands, *geometry, plan)
        wanted = [op == "grad_input", op == "grad_values", False]
        return lambda: backward(grad_out, x, self.values, *operands, *geometry, wanted, plan)


if __name__ == "__main__":
    bench_gpu.main(TritonLayer, "gpu_triton.json")
