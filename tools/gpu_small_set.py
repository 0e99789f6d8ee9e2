"""Every CUDA kernel once, on layers small enough for compute-sanitizer, which slows a program a hundredfold."""

import torch

import ilnas_kernels  # noqa: F401 - registers the operators
from ilnas_kernels.pattern import Pattern

# batch, in, height, width, out, kernel, stride, padding, groups
LAYERS = [
    (9, 10, 7, 6, 19, 3, 1, 1, 1),
    (5, 8, 9, 8, 12, 3, 2, 1, 2),
    (35, 40, 1, 1, 21, 1, 1, 0, 1),
]


def main() -> None:
    ops, tensor_cores = torch.ops.ilnas, torch.cuda.get_device_capability() >= (8, 0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for batch, channels, height, width, out, kernel, stride, padding, groups in LAYERS:
            pattern = Pattern.random((out if groups == 1 else 12, channels // groups, kernel, kernel), 0.3, groups)
            pattern = pattern.to("cuda")
            geometry = ((kernel, kernel), (stride, stride), (padding,) * 4, (1, 1), groups)
            x = torch.randn(batch, channels, height, width).to("cuda", dtype)
            values = torch.randn(pattern.nnz).to("cuda", dtype)
            bias = torch.randn(pattern.shape[0]).to("cuda", dtype)
            routes = ["general", "direct"]
            if dtype == torch.float16 or (dtype == torch.bfloat16 and tensor_cores):
                routes.append("condensed")
            for route in routes:
                y = ops.masked_conv2d(x, values, bias, *pattern.operands, *geometry, route)
                grad_out = y.to(memory_format=torch.channels_last)
                ops.masked_conv2d_backward(grad_out, x, values, *pattern.operands, *geometry, [True] * 3, route)
            for by_kernel in (False, True):
                ops.absent_topk(x, y, *pattern.operands[:2], 30, *geometry, by_kernel, 0.0, "")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
