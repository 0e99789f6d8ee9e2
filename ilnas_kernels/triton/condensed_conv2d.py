"""Convolution kernels on column-condensed weights, for masked_conv2d and, as a 1x1 convolution, masked_linear."""

import triton
import triton.language as tl

from .tiles import dot, inside, locate


@triton.jit
def gather_kernel(
    source_ptr,
    weight_ptr,
    bias_ptr,
    result_ptr,
    block_ptr,
    col_ptr,
    row_blocks,
    blocks_per_group,
    rows_per_group,
    channels_per_group,
    batch,
    grid_height,
    grid_width,
    source_height,
    source_width,
    result_height,
    result_width,
    pad_top,
    pad_left,
    source_batch_stride,
    source_channel_stride,
    source_row_stride,
    source_col_stride,
    result_batch_stride,
    result_channel_stride,
    result_row_stride,
    result_col_stride,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHECKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    BATCH_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """result[n,r,h,w] = bias[r] + sum over listed columns (c,kh,kw) of weight[c,kh,kw,r] * source[n,c,h',w'].

    Forward: h' = h * stride - pad + kh * dilation, rows are output channels. TRANSPOSED, the gradient of the input:
    h' = (h + pad - kh * dilation) / stride where that is whole, rows are input channels. A program takes positions of
    one phase (h + pad) % stride, to which only the taps of the same phase contribute; the plan lists them apart.
    weight [columns, BLOCK_ROWS]; grid_height, grid_width: positions of one phase. CHECKED: some h', w' lie outside.
    """
    row_block = tl.program_id(0) % row_blocks
    phase = tl.program_id(1)
    phases = tl.num_programs(1)
    first = tl.load(block_ptr + row_block * phases + phase)
    end = tl.load(block_ptr + row_block * phases + phase + 1)

    pixels = batch * grid_height * grid_width
    pixel = tl.program_id(0) // row_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    wanted = pixel < pixels
    # Positions past the end compute what the last one does, so that no load needs a mask for them.
    image, row, col = locate(tl.minimum(pixel, pixels - 1), batch, grid_height, grid_width, BATCH_INNER)
    if TRANSPOSED:
        phase_row = phase // STRIDE_WIDTH
        phase_col = phase % STRIDE_WIDTH
        base_row = row + (pad_top - phase_row + STRIDE_HEIGHT - 1) // STRIDE_HEIGHT
        base_col = col + (pad_left - phase_col + STRIDE_WIDTH - 1) // STRIDE_WIDTH
        row = base_row * STRIDE_HEIGHT + phase_row - pad_top
        col = base_col * STRIDE_WIDTH + phase_col - pad_left
        wanted = wanted & (row < result_height) & (col < result_width)
    else:
        base_row = row * STRIDE_HEIGHT - pad_top
        base_col = col * STRIDE_WIDTH - pad_left

    group = row_block // blocks_per_group
    source_pixel = (
        source_ptr
        + group.to(tl.int64) * channels_per_group * source_channel_stride
        + image.to(tl.int64) * source_batch_stride
        + base_row.to(tl.int64) * source_row_stride
        + base_col.to(tl.int64) * source_col_stride
    )
    slot = tl.arange(0, BLOCK_ROWS)
    acc = tl.zeros([BLOCK_PIXELS, BLOCK_ROWS], tl.float32)
    for begin in range(first, end, BLOCK_COLS):
        k = begin + tl.arange(0, BLOCK_COLS)
        listed = k < end
        column = tl.load(col_ptr + k, mask=listed, other=0)
        weight_row = weight_ptr + k.to(tl.int64) * BLOCK_ROWS
        weight = tl.load(weight_row[:, None] + slot[None, :], mask=listed[:, None], other=0)
        channel = column // (KERNEL_HEIGHT * KERNEL_WIDTH)
        step_row = column // KERNEL_WIDTH % KERNEL_HEIGHT * DILATION_HEIGHT
        step_col = column % KERNEL_WIDTH * DILATION_WIDTH
        if TRANSPOSED:
            step_row = -(step_row // STRIDE_HEIGHT)
            step_col = -(step_col // STRIDE_WIDTH)
        offset = (
            channel.to(tl.int64) * source_channel_stride
            + step_row.to(tl.int64) * source_row_stride
            + step_col.to(tl.int64) * source_col_stride
        )
        if CHANNELS_INNER:
            present = listed[None, :]
            if CHECKED:
                present = present & inside(
                    base_row[:, None] + step_row[None, :],
                    base_col[:, None] + step_col[None, :],
                    source_height,
                    source_width,
                )
            inputs = tl.load(source_pixel[:, None] + offset[None, :], mask=present, other=0)
        else:
            present = listed[:, None]
            if CHECKED:
                present = present & inside(
                    base_row[None, :] + step_row[:, None],
                    base_col[None, :] + step_col[:, None],
                    source_height,
                    source_width,
                )
            inputs = tl.trans(tl.load(source_pixel[None, :] + offset[:, None], mask=present, other=0))
        acc = dot(inputs, weight, acc, PRECISION, INTERPRETED)

    row_in_group = row_block % blocks_per_group * BLOCK_ROWS + slot
    channel = group * rows_per_group + row_in_group
    wanted = wanted[:, None] & (row_in_group < rows_per_group)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel, mask=row_in_group < rows_per_group, other=0).to(tl.float32)[None, :]
    target = (
        result_ptr
        + (
            image.to(tl.int64) * result_batch_stride
            + row.to(tl.int64) * result_row_stride
            + col.to(tl.int64) * result_col_stride
        )[:, None]
        + (channel.to(tl.int64) * result_channel_stride)[None, :]
    )
    tl.store(target, acc.to(result_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def grad_values_kernel(
    grad_out_ptr,
    x_ptr,
    number_ptr,
    partial_ptr,
    block_ptr,
    col_ptr,
    nnz,
    row_blocks,
    blocks_per_group,
    rows_per_group,
    channels_per_group,
    pixels_per_split,
    batch,
    out_height,
    out_width,
    height,
    width,
    pad_top,
    pad_left,
    x_batch_stride,
    x_channel_stride,
    x_row_stride,
    x_col_stride,
    out_batch_stride,
    out_channel_stride,
    out_row_stride,
    out_col_stride,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    BATCH_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """partial[split, i] = sum over the split's output positions (n,h,w) of grad_out[n,o,h,w] * x[n,c,h',w'], for the
    live weight i = (o,c,kh,kw) and h' = h * stride - pad + kh * dilation.

    A program computes the gradients of BLOCK_COLS listed columns for one block of rows and keeps those of live weights:
    number [columns, BLOCK_ROWS] says which they are.
    """
    row_block = tl.program_id(0) % row_blocks
    first = tl.load(block_ptr + row_block) + tl.program_id(0) // row_blocks * BLOCK_COLS
    end = tl.load(block_ptr + row_block + 1)
    if first >= end:
        return
    split = tl.program_id(1)
    k = first + tl.arange(0, BLOCK_COLS)
    listed = k < end
    column = tl.load(col_ptr + k, mask=listed, other=0)
    step_row = column // KERNEL_WIDTH % KERNEL_HEIGHT * DILATION_HEIGHT - pad_top
    step_col = column % KERNEL_WIDTH * DILATION_WIDTH - pad_left
    group = row_block // blocks_per_group
    in_channel = group * channels_per_group + column // (KERNEL_HEIGHT * KERNEL_WIDTH)
    x_column = (
        x_ptr
        + in_channel.to(tl.int64) * x_channel_stride
        + step_row.to(tl.int64) * x_row_stride
        + step_col.to(tl.int64) * x_col_stride
    )
    slot = tl.arange(0, BLOCK_ROWS)
    row_in_group = row_block % blocks_per_group * BLOCK_ROWS + slot
    in_rows = row_in_group < rows_per_group
    grad_row = grad_out_ptr + (group * rows_per_group + row_in_group).to(tl.int64) * out_channel_stride

    pixels = batch * out_height * out_width
    acc = tl.zeros([BLOCK_COLS, BLOCK_ROWS], tl.float32)
    begin = split * pixels_per_split
    for start in range(begin, tl.minimum(begin + pixels_per_split, pixels), BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        in_pixels = pixel < pixels
        image, row, col = locate(pixel, batch, out_height, out_width, BATCH_INNER)
        grad_pixel = (
            image.to(tl.int64) * out_batch_stride
            + row.to(tl.int64) * out_row_stride
            + col.to(tl.int64) * out_col_stride
        )
        base_row = row * STRIDE_HEIGHT
        base_col = col * STRIDE_WIDTH
        x_pixel = (
            image.to(tl.int64) * x_batch_stride
            + base_row.to(tl.int64) * x_row_stride
            + base_col.to(tl.int64) * x_col_stride
        )
        if CHANNELS_INNER:
            grad_out = tl.load(
                grad_row[None, :] + grad_pixel[:, None], mask=in_pixels[:, None] & in_rows[None, :], other=0
            )
            present = (in_pixels[:, None] & listed[None, :]) & inside(
                base_row[:, None] + step_row[None, :], base_col[:, None] + step_col[None, :], height, width
            )
            inputs = tl.trans(tl.load(x_column[None, :] + x_pixel[:, None], mask=present, other=0))
        else:
            grad_out = tl.trans(
                tl.load(grad_row[:, None] + grad_pixel[None, :], mask=in_pixels[None, :] & in_rows[:, None], other=0)
            )
            present = (in_pixels[None, :] & listed[:, None]) & inside(
                base_row[None, :] + step_row[:, None], base_col[None, :] + step_col[:, None], height, width
            )
            inputs = tl.load(x_column[:, None] + x_pixel[None, :], mask=present, other=0)
        acc = dot(inputs, grad_out, acc, PRECISION, INTERPRETED)

    number_row = number_ptr + k.to(tl.int64) * BLOCK_ROWS
    number = tl.load(number_row[:, None] + slot[None, :], mask=listed[:, None], other=-1)
    tl.store(partial_ptr + split.to(tl.int64) * nnz + number, acc, mask=number >= 0)
