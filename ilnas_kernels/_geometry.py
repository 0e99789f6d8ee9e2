"""Sizes of a convolution; the kernel, stride, padding (top, bottom, left, right), dilation and groups of one."""

# A linear layer is a 1x1 convolution over images of one pixel.
AS_CONVOLUTION = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)


def conv_output_size(size: int, pad_before: int, pad_after: int, kernel: int, stride: int, dilation: int) -> int:
    return (size + pad_before + pad_after - dilation * (kernel - 1) - 1) // stride + 1
