"""The pieces of a tile that the kernels share."""

import triton
import triton.language as tl


@triton.jit
def locate(pixel, batch, height, width, BATCH_INNER: tl.constexpr):
    """Image, row and column of a position's number; images run fastest in batch-last memory, columns otherwise."""
    if BATCH_INNER:
        rest = pixel // batch
        image = pixel % batch
        row = rest // width
        col = rest % width
    else:
        rest = pixel // width
        image = rest // height
        row = rest % height
        col = pixel % width
    return image, row, col


@triton.jit
def inside(row, col, height, width):
    """0 <= row < height and 0 <= col < width, with one comparison each: negative numbers become huge ones."""
    height = tl.cast(height, tl.uint32)
    width = tl.cast(width, tl.uint32)
    return (row.to(tl.uint32, bitcast=True) < height) & (col.to(tl.uint32, bitcast=True) < width)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a @ b in fp32. Triton's interpreter multiplies the bit patterns of bfloat16: it gets fp32 operands."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
