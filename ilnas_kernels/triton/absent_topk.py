"""absent_topk in Triton, and the operator ilnas::absent_topk_triton: the k absent weights whose gradient, the sum over
n,h,w of grad_out[n,o,h,w] * x[n,c,h',w'], is largest in magnitude.

The gradient is computed tile by tile and leaves the chip only as the keys of entries at or above a threshold. A key is
one 63-bit number that falls in the order wanted and is unique, so that the order of arrival does not matter:

    bits of the magnitude as float32 (31) | 2**31 - 1 - flat index (31) | sign of the gradient (1)
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import masked_conv2d as conv2d
from .launch import Config, Table, cdiv, config_for, input_precision, interpreted, precision_of
from .tiles import dot, inside, locate

# large: many tiles; small: those of a layer that would not occupy the device otherwise, and of granularity kernel,
# which keeps its sums in registers over all taps.
_SMALL = Config(32, 16, 16, warps=8, stages=2)
_TENSOR_CORES = {"large": Config(64, 16, 32, warps=8, stages=3), "small": _SMALL}
_FMA = {"large": Config(64, 16, 32, warps=8, stages=2), "small": _SMALL}
_CDNA = {"large": Config(64, 32, 64, warps=8, stages=2), "small": Config(32, 32, 32, warps=4, stages=2)}
_INTERPRETER = {"large": Config(32, 32, 16, warps=1, stages=1), "small": Config(16, 16, 16, warps=1, stages=1)}
LAUNCH_TABLE: Table = {
    **{("sm75", precision): _FMA for precision in ("float32", "float16")},
    **{
        (family, precision): _FMA if precision == "float32" else _TENSOR_CORES
        for family in ("sm80", "sm86", "sm90")
        for precision in ("float32", "tf32", "float16", "bfloat16")
    },
    **{
        ("gfx942", precision): _FMA if precision == "float32" else _CDNA
        for precision in ("float32", "float16", "bfloat16")
    },
    **{("interpreter", precision): _INTERPRETER for precision in ("float32", "float16", "bfloat16")},
    # Spills a few registers with two stages and Triton 3.9.
    ("sm80", "float32"): {**_FMA, "large": _FMA["large"]._replace(stages=3)},
}
BLOCK = 256  # blocked positions that a program marks at a time
BINS = 2048  # of the histogram: 11 bits of the key a pass
_KEY_BITS = 63
_LAST_INDEX = 2**31 - 1
_MANY_TILES = 512  # from here on large tiles occupy the device
_SMALLEST_BUFFER = 1 << 16  # keys, 512 KB: layers up to this size need no threshold at all
_SAMPLED_SHARE = 16  # one tile in so many is computed twice, to guess the threshold


@triton.jit
def block_kernel(row_ptr, col_ptr, blocked_ptr, cols, BLOCK: tl.constexpr):
    """Sets bit (row * cols + col) of blocked for every col of a row."""
    row = tl.program_id(0)
    first = tl.load(row_ptr + row)
    end = tl.load(row_ptr + row + 1)
    for begin in range(first, end, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        flat = row * cols + tl.load(col_ptr + entry, mask=entry < end, other=0)
        bit = tl.full([BLOCK], 1, tl.int32) << (flat & 31)
        tl.atomic_or(blocked_ptr + (flat >> 5), bit, mask=entry < end, sem="relaxed")


@triton.jit
def gradient_tile(
    grad_row, in_rows, x_channel, in_channels, tap, pixels, batch, out_height, out_width, height, width,
    pad_top, pad_left, x_batch_stride, x_row_stride, x_col_stride, out_batch_stride, out_row_stride, out_col_stride,
    KERNEL_WIDTH: tl.constexpr, STRIDE_HEIGHT: tl.constexpr, STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr, DILATION_WIDTH: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    BATCH_INNER: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The dense weight gradient [BLOCK_COLS channels, BLOCK_ROWS] of one tap."""
    step_row = tap // KERNEL_WIDTH * DILATION_HEIGHT - pad_top
    step_col = tap % KERNEL_WIDTH * DILATION_WIDTH - pad_left
    acc = tl.zeros([BLOCK_COLS, BLOCK_ROWS], tl.float32)
    for start in range(0, pixels, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        in_pixels = pixel < pixels
        image, row, col = locate(pixel, batch, out_height, out_width, BATCH_INNER)
        grad_pixel = (
            image.to(tl.int64) * out_batch_stride
            + row.to(tl.int64) * out_row_stride
            + col.to(tl.int64) * out_col_stride
        )
        row = row * STRIDE_HEIGHT + step_row
        col = col * STRIDE_WIDTH + step_col
        x_pixel = (
            image.to(tl.int64) * x_batch_stride + row.to(tl.int64) * x_row_stride + col.to(tl.int64) * x_col_stride
        )
        in_image = in_pixels & inside(row, col, height, width)
        if CHANNELS_INNER:
            grad_out = tl.load(
                grad_row[None, :] + grad_pixel[:, None], mask=in_pixels[:, None] & in_rows[None, :], other=0
            )
            inputs = tl.trans(
                tl.load(x_channel[None, :] + x_pixel[:, None], mask=in_image[:, None] & in_channels[None, :], other=0)
            )
        else:
            grad_out = tl.trans(
                tl.load(grad_row[:, None] + grad_pixel[None, :], mask=in_pixels[None, :] & in_rows[:, None], other=0)
            )
            inputs = tl.load(
                x_channel[:, None] + x_pixel[None, :], mask=in_image[None, :] & in_channels[:, None], other=0
            )
        acc = dot(inputs, grad_out, acc, PRECISION, INTERPRETED)
    return acc


@triton.jit
def absent_at(blocked_ptr, flat, inside_weight):
    """Which of the flat positions inside the weight are not blocked."""
    word = tl.load(blocked_ptr + (flat >> 5), mask=inside_weight, other=0)
    return inside_weight & (((word >> (flat & 31)) & 1) == 0)


@triton.jit
def root_mean(total, count):
    """sqrt(total / count) of float64 totals, float32; powers of two bring totals beyond float32 into its range."""
    large = total > 2.0**100
    small = total < 2.0**-100
    total = total * tl.where(large, 2.0**-160, tl.where(small, 2.0**200, 1.0)).to(tl.float64)
    root = tl.sqrt_rn(tl.div_rn(total.to(tl.float32), count.to(tl.float32)))
    return root * tl.where(large, 2.0**80, tl.where(small, 2.0**-100, 1.0))


@triton.jit
def rank_kernel(
    grad_out_ptr,
    x_ptr,
    blocked_ptr,
    control_ptr,
    counters_ptr,
    histogram_ptr,
    buffer_ptr,
    capacity,
    first_tile,
    tile_step,
    blocks_per_group,
    channel_blocks,
    rows_per_group,
    channels_per_group,
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
    BY_KERNEL: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    BATCH_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """One tile of candidates: appends the keys at or above the threshold to the buffer, and counts all.

    control [4] int64: the lowest key of a candidate, the threshold, the key where the histogram's first bin begins, and
    log2 of a bin's width. counters [2] int32: keys appended, also those that found no room; candidates not finite.
    BY_KERNEL: a candidate is a kernel with an absent tap, scored by the root mean square of its absent taps' gradients.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    tile = first_tile + tl.program_id(0) * tile_step
    if BY_KERNEL:
        tap = 0
    else:
        tap = tile % TAPS
        tile = tile // TAPS
    row_block = tile // channel_blocks
    group = row_block // blocks_per_group
    row_in_group = row_block % blocks_per_group * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tile % channel_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_rows = row_in_group < rows_per_group
    in_channels = channel < channels_per_group
    in_weight = in_channels[:, None] & in_rows[None, :]
    row = group * rows_per_group + row_in_group
    kernel_index = row[None, :] * channels_per_group + channel[:, None]
    grad_row = grad_out_ptr + row.to(tl.int64) * out_channel_stride
    x_channel = x_ptr + (group * channels_per_group + channel).to(tl.int64) * x_channel_stride
    pixels = batch * out_height * out_width

    if BY_KERNEL:
        # float64 holds the square of every float32.
        squares = tl.zeros([BLOCK_COLS, BLOCK_ROWS], tl.float64)
        absent_taps = tl.zeros([BLOCK_COLS, BLOCK_ROWS], tl.int32)
        for each_tap in range(TAPS):
            grad = gradient_tile(
                grad_row, in_rows, x_channel, in_channels, each_tap, pixels, batch, out_height, out_width,
                height, width, pad_top, pad_left, x_batch_stride, x_row_stride, x_col_stride,
                out_batch_stride, out_row_stride, out_col_stride,
                KERNEL_WIDTH, STRIDE_HEIGHT, STRIDE_WIDTH, DILATION_HEIGHT, DILATION_WIDTH, CHANNELS_INNER,
                BATCH_INNER, PRECISION, INTERPRETED, BLOCK_ROWS, BLOCK_PIXELS, BLOCK_COLS,
            )  # fmt: skip
            absent = absent_at(blocked_ptr, kernel_index * TAPS + each_tap, in_weight)
            wide_grad = grad.to(tl.float64)
            squares += tl.where(absent, wide_grad * wide_grad, 0.0)
            absent_taps += absent.to(tl.int32)
        candidate = absent_taps > 0
        grad = root_mean(squares, tl.maximum(absent_taps, 1))
        index = kernel_index
    else:
        grad = gradient_tile(
            grad_row, in_rows, x_channel, in_channels, tap, pixels, batch, out_height, out_width,
            height, width, pad_top, pad_left, x_batch_stride, x_row_stride, x_col_stride,
            out_batch_stride, out_row_stride, out_col_stride,
            KERNEL_WIDTH, STRIDE_HEIGHT, STRIDE_WIDTH, DILATION_HEIGHT, DILATION_WIDTH, CHANNELS_INNER,
            BATCH_INNER, PRECISION, INTERPRETED, BLOCK_ROWS, BLOCK_PIXELS, BLOCK_COLS,
        )  # fmt: skip
        index = kernel_index * TAPS + tap
        candidate = absent_at(blocked_ptr, index, in_weight)

    score = tl.abs(grad)
    finite = score <= 3.4028234663852886e38
    not_finite = tl.sum((candidate & (finite == 0)).to(tl.int32))
    if not_finite > 0:
        tl.atomic_add(counters_ptr + 1, not_finite, sem="relaxed")
    key = (
        (score.to(tl.int32, bitcast=True).to(tl.int64) << 32)
        | ((0x7FFFFFFF - index).to(tl.int64) << 1)
        | (grad < 0).to(tl.int64)
    )
    candidate = candidate & finite & (key >= tl.load(control_ptr))
    key = tl.ravel(key)
    candidate = tl.ravel(candidate)

    bin_start = tl.load(control_ptr + 2)
    bins = (key - bin_start) >> tl.load(control_ptr + 3)
    counted = candidate & (key >= bin_start) & (bins < BINS)
    in_bin = tl.histogram(tl.where(counted, bins, 0).to(tl.int32), BINS)
    bin_number = tl.arange(0, BINS)
    # The entries that are not counted were put into the first bin.
    not_counted = tl.sum((counted == 0).to(tl.int32))
    in_bin -= tl.where(bin_number == 0, not_counted, 0)
    tl.atomic_add(histogram_ptr + bin_number, in_bin, mask=in_bin > 0, sem="relaxed")

    chosen = candidate & (key >= tl.load(control_ptr + 1))
    chosen_count = tl.sum(chosen.to(tl.int32))
    if chosen_count > 0:
        first = tl.atomic_add(counters_ptr, chosen_count, sem="relaxed")
        place = first + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(buffer_ptr + place, key, mask=chosen & (place < capacity))


class _Passes:
    """The tiles of one question, and what a pass over them needs."""

    def __init__(self, g: conv2d.Geometry, x: Tensor, grad_out: Tensor, row_ptr: Tensor, col: Tensor, by_kernel: bool):
        self.g, self.x, self.grad_out, self.by_kernel = g, x, grad_out, by_kernel
        self.config = self._config("large")
        if by_kernel or self._tiles() < _MANY_TILES:
            self.config = self._config("small")
        self.tiles = self._tiles()
        cols = g.in_per_group * g.taps
        self.blocked = torch.zeros(cdiv(g.out_channels * cols, 32), dtype=torch.int32, device=x.device)
        block_kernel[(g.out_channels,)](row_ptr, col, self.blocked, cols, BLOCK=BLOCK, num_warps=4)

    @property
    def computed(self) -> int:
        """The gradients in all tiles, an upper bound on the candidates."""
        return self.tiles * self.config.block_rows * self.config.block_cols

    def _config(self, width: str) -> Config:
        return config_for(LAUNCH_TABLE, self.x.device, self.g.precision, width)

    def _tiles(self) -> int:
        self.blocks = cdiv(self.g.out_per_group, self.config.block_rows)
        self.channel_blocks = cdiv(self.g.in_per_group, self.config.block_cols)
        return self.g.groups * self.blocks * self.channel_blocks * (1 if self.by_kernel else self.g.taps)

    def run(self, control: list[int], buffer: Tensor, step: int = 1) -> tuple[int, int, list[int]]:
        """Appended keys, candidates not finite, histogram. control: see rank_kernel; step: compute one tile in step."""
        g, first = self.g, step // 2
        control = torch.tensor(control, dtype=torch.int64, device=self.x.device)
        counts = torch.zeros(2 + BINS, dtype=torch.int32, device=self.x.device)
        rank_kernel[(cdiv(self.tiles - first, step),)](
            self.grad_out, self.x, self.blocked, control, counts, counts[2:], buffer, buffer.numel(), first, step,
            self.blocks, self.channel_blocks, g.out_per_group, g.in_per_group, g.batch, g.out_height, g.out_width,
            g.height, g.width, g.padding[0], g.padding[2], *self.x.stride(), *self.grad_out.stride(),
            **g.windows, BY_KERNEL=self.by_kernel, CHANNELS_INNER=conv2d.channels_inner(self.x),
            BATCH_INNER=conv2d.batch_inner(self.x), PRECISION=input_precision(g.precision),
            INTERPRETED=interpreted(rank_kernel), BINS=BINS, **self.config.tiles, **self.config.resources,
        )  # fmt: skip
        appended, not_finite, *histogram = counts.tolist()
        return appended, not_finite, histogram


def _bin_of_rank(histogram: list[int], rank: int, above: int) -> tuple[int, int, int]:
    """The last bin with at least rank keys at or above its beginning, these keys, and those above the bin."""
    reached = above
    for number in range(len(histogram) - 1, -1, -1):
        reached += histogram[number]
        if reached >= rank:
            return number, reached, reached - histogram[number]
    raise RuntimeError(f"absent_topk: the histogram holds {reached} keys, fewer than rank {rank}")


def _key_near_rank(histogram: list[int], rank: int, above: int, bin_start: int, shift: int) -> int:
    """A key that about rank keys reach, taking their logarithm as linear within a bin, as in the tail of a bell."""
    number, reached, above_bin = _bin_of_rank(histogram, rank, above)
    share = math.log(reached / rank) / math.log(reached / max(above_bin, 0.5))
    return bin_start + (number << shift) + int(share * (1 << shift))


def _best_keys(passes: _Passes, k: int, lowest: int) -> tuple[Tensor, int]:
    """The k largest keys from lowest on, falling, and the number of candidates that are not finite."""
    buffer = torch.empty(max(4 * k, _SMALLEST_BUFFER), dtype=torch.int64, device=passes.x.device)
    capacity = buffer.numel()
    wanted = math.isqrt(k * capacity)  # as far from too few as from too many
    bin_start, shift, above = 0, _KEY_BITS - 11, 0
    threshold = lowest
    if passes.computed > capacity:
        no_key = (1 << _KEY_BITS) - 1
        _, _, histogram = passes.run([lowest, no_key, bin_start, shift], buffer, step=_SAMPLED_SHARE)
        sampled = max(wanted // _SAMPLED_SHARE, 1)
        if sum(histogram) > sampled:
            threshold = max(lowest, _key_near_rank(histogram, sampled, above, bin_start, shift))
    appended, not_finite, histogram = passes.run([lowest, threshold, bin_start, shift], buffer)
    k = min(k, sum(histogram))
    while not k <= appended <= capacity:
        number, reached, above_bin = _bin_of_rank(histogram, k, above)
        threshold = bin_start + (number << shift)
        if reached > capacity:
            # More keys in one bin than fit: divide it. At a width of 2**8 it cannot happen, since keys are unique.
            threshold = _key_near_rank(histogram, min(wanted, reached), above, bin_start, shift)
            bin_start, shift, above = bin_start + (number << shift), shift - 11, above_bin
        appended, _, histogram = passes.run([lowest, threshold, bin_start, shift], buffer)
    return torch.topk(buffer[:appended], k).values, not_finite


@torch.library.custom_op("ilnas::absent_topk_triton", mutates_args=())
def absent_topk_triton(
    x: Tensor, grad_out: Tensor, row_ptr: Tensor, col: Tensor, k: int, kernel_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, by_kernel: bool,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The arguments and results of ilnas::absent_topk. Opaque to torch.compile: how often it passes over the tiles
    depends on what it finds there."""
    index = torch.full((k,), -1, dtype=torch.int64, device=x.device)
    grad = torch.zeros(k, dtype=torch.float32, device=x.device)
    precision = precision_of(x, torch.backends.cudnn.allow_tf32)
    g = conv2d.geometry(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups, precision)
    numel = g.out_channels * g.in_per_group * g.taps
    if numel >= 2**31:
        raise ValueError(f"absent_topk: the Triton kernel ranks weights of fewer than 2**31 elements, not {numel}")
    not_finite = 0
    if k and numel:
        passes = _Passes(g, x, grad_out, row_ptr, col, by_kernel)
        lowest = int(torch.tensor(max(floor, 0.0), dtype=torch.float32).view(torch.int32)) << 32
        keys, not_finite = _best_keys(passes, k, lowest)
        index[: keys.numel()] = _LAST_INDEX - (keys >> 1 & _LAST_INDEX)
        magnitude = (keys >> 32).int().view(torch.float32)
        grad[: keys.numel()] = torch.where((keys & 1).bool(), -magnitude, magnitude)
    return index, grad, torch.tensor([not_finite], dtype=torch.int64, device=x.device)


@absent_topk_triton.register_fake
def _fake(x, grad_out, row_ptr, col, k, kernel_size, stride, padding, dilation, groups, by_kernel, floor):
    return (
        x.new_empty(k, dtype=torch.int64),
        x.new_empty(k, dtype=torch.float32),
        x.new_empty(1, dtype=torch.int64),
    )
