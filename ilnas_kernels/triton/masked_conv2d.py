"""masked_conv2d in Triton: out[n,o,h,w] = bias[o] + sum over live (o,c,kh,kw) of values * x[n,c,h',w'], its gradients,
and the operators ilnas::masked_conv2d_triton and ilnas::masked_conv2d_backward_triton."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .._geometry import conv_output_size
from ..layout import empty_in_layout, layout_of
from ..pattern import Pattern
from .condensed import CondensedPlan, build_plan, condensed_size, expand, expand_numbers
from .condensed_conv2d import gather_kernel, grad_values_kernel
from .gradients import register_backward
from .launch import Config, Table, cdiv, config_for, input_precision, interpreted, precision_of, width_for

# Products on tensor cores. The addresses of gathered inputs take most registers: eight warps share them.
_TENSOR_CORES = {
    "narrow": Config(16, 128, 32, warps=8, stages=3),
    "wide": Config(64, 128, 32, warps=8, stages=3),
    "narrow_values": Config(16, 32, 64, warps=4, stages=3),
    "wide_values": Config(64, 32, 64, warps=4, stages=3),
}
# Products by FMA, whose operands and sums must all fit into registers.
_FMA = {
    "narrow": Config(16, 128, 16, warps=4, stages=2),
    "wide": Config(64, 64, 16, warps=4, stages=2),
    "narrow_values": Config(16, 16, 64, warps=4, stages=2),
    "wide_values": Config(64, 16, 64, warps=4, stages=2),
}
# 64 KB of shared memory.
_CDNA = {name: config._replace(stages=2) for name, config in _TENSOR_CORES.items()}
_INTERPRETER = {
    "narrow": Config(16, 32, 16, warps=1, stages=1),
    "wide": Config(32, 16, 32, warps=1, stages=1),
    "narrow_values": Config(16, 32, 16, warps=1, stages=1),
    "wide_values": Config(32, 16, 32, warps=1, stages=1),
}
LAUNCH_TABLE: Table = {
    **{("sm75", precision): _FMA for precision in ("float32", "float16")},
    **{
        (family, precision): _FMA if precision == "float32" else _TENSOR_CORES
        for family in ("sm80", "sm86", "sm90")
        for precision in ("float32", "tf32", "float16", "bfloat16")
    },
    **{("gfx942", precision): _CDNA for precision in ("float32", "float16", "bfloat16")},
    **{("interpreter", precision): _INTERPRETER for precision in ("float32", "float16", "bfloat16")},
}
# Programs that keep a large GPU busy; the pixels of grad_values are split for about so many. A constant, since the
# order of summation depends on it. Partial sums then take at most 1024 tiles of 64 x 64 floats, 16 MB.
_BUSY = 1024


class Geometry(NamedTuple):
    """A masked convolution's sizes, and the arithmetic that its launches take."""

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    precision: str

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def in_per_group(self) -> int:
        return self.in_channels // self.groups

    @property
    def out_per_group(self) -> int:
        return self.out_channels // self.groups

    @property
    def windows(self) -> dict[str, int]:
        """The kernels' constants."""
        return {
            "KERNEL_HEIGHT": self.kernel[0],
            "KERNEL_WIDTH": self.kernel[1],
            "STRIDE_HEIGHT": self.stride[0],
            "STRIDE_WIDTH": self.stride[1],
            "DILATION_HEIGHT": self.dilation[0],
            "DILATION_WIDTH": self.dilation[1],
        }

    def density(self, nnz: int) -> float:
        return nnz / max(self.out_channels * self.in_per_group * self.taps, 1)


def geometry(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
) -> Geometry:
    """padding: top, bottom, left, right."""
    batch, in_channels, height, width = x.shape
    out_height = conv_output_size(height, padding[0], padding[1], kernel_size[0], stride[0], dilation[0])
    out_width = conv_output_size(width, padding[2], padding[3], kernel_size[1], stride[1], dilation[1])
    return Geometry(
        batch, in_channels, height, width, out_channels, out_height, out_width,
        tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups, precision,
    )  # fmt: skip


def channels_inner(image: Tensor) -> bool:
    return image.shape[1] > 1 and image.stride(1) == 1


def batch_inner(image: Tensor) -> bool:
    return image.shape[0] > 1 and image.stride(0) == 1


def forward_plan(g: Geometry, row_ptr: Tensor, col: Tensor, config: Config, by_channels: bool) -> CondensedPlan:
    return build_plan(
        row_ptr, col, None, g.in_per_group * g.taps, g.groups, config.block_rows, [0] * g.taps,
        channels_inner=by_channels,
    )  # fmt: skip


def transposed_plan(
    g: Geometry, t_row_ptr: Tensor, t_col: Tensor, t_perm: Tensor, config: Config, by_channels: bool
) -> CondensedPlan:
    (stride_h, stride_w), (dilation_h, dilation_w) = g.stride, g.dilation
    tap_phases = [
        kh * dilation_h % stride_h * stride_w + kw * dilation_w % stride_w
        for kh in range(g.kernel[0])
        for kw in range(g.kernel[1])
    ]
    return build_plan(
        t_row_ptr, t_col, t_perm, g.out_per_group * g.taps, g.groups, config.block_rows, tap_phases,
        phases=stride_h * stride_w, channels_inner=by_channels,
    )  # fmt: skip


def configs(table: Table, g: Geometry, device: torch.device, nnz: int) -> tuple[Config, Config, Config]:
    """Those of the forward pass, of the gradient of the input, and of the gradient of the values."""
    density = g.density(nnz)
    width = width_for(g.precision, g.out_per_group, density)
    t_width = width_for(g.precision, g.in_per_group, density)
    return tuple(config_for(table, device, g.precision, name) for name in (width, t_width, width + "_values"))


def launch_forward(
    g: Geometry, config: Config, plan: CondensedPlan, x: Tensor, values: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    blocks = cdiv(g.out_per_group, config.block_rows)
    columns = condensed_size(values.numel(), g.groups * blocks, g.in_per_group * g.taps)
    pixel_blocks = cdiv(g.batch * g.out_height * g.out_width, config.block_pixels)
    wrap_triton(gather_kernel)[(g.groups * blocks * pixel_blocks, 1)](
        x, expand(plan, values, columns, config.block_rows), x if bias is None else bias.contiguous(), out,
        plan.block_ptr, plan.cols, g.groups * blocks, blocks, g.out_per_group, g.in_per_group,
        g.batch, g.out_height, g.out_width, g.height, g.width, g.out_height, g.out_width,
        g.padding[0], g.padding[2], *x.stride(), *out.stride(),
        **g.windows, TRANSPOSED=False, CHECKED=any(g.padding), HAS_BIAS=bias is not None,
        CHANNELS_INNER=channels_inner(x), BATCH_INNER=batch_inner(x), PRECISION=input_precision(g.precision),
        INTERPRETED=interpreted(gather_kernel), **config.tiles, **config.resources,
    )  # fmt: skip


def launch_grad_x(
    g: Geometry, config: Config, plan: CondensedPlan, grad_out: Tensor, values: Tensor, grad_x: Tensor
) -> None:
    blocks = cdiv(g.in_per_group, config.block_rows)
    phases = g.stride[0] * g.stride[1]
    columns = condensed_size(values.numel(), g.groups * blocks * phases, g.out_per_group * g.taps)
    grid_height, grid_width = cdiv(g.height, g.stride[0]), cdiv(g.width, g.stride[1])
    pixel_blocks = cdiv(g.batch * grid_height * grid_width, config.block_pixels)
    # Only where every position is one of grad_out's can none lie outside.
    checked = g.taps > 1 or phases > 1 or any(g.padding)
    wrap_triton(gather_kernel)[(g.groups * blocks * pixel_blocks, phases)](
        grad_out, expand(plan, values, columns, config.block_rows), grad_out, grad_x,
        plan.block_ptr, plan.cols, g.groups * blocks, blocks, g.in_per_group, g.out_per_group,
        g.batch, grid_height, grid_width, g.out_height, g.out_width, g.height, g.width,
        g.padding[0], g.padding[2], *grad_out.stride(), *grad_x.stride(),
        **g.windows, TRANSPOSED=True, CHECKED=checked, HAS_BIAS=False,
        CHANNELS_INNER=channels_inner(grad_out), BATCH_INNER=batch_inner(grad_out),
        PRECISION=input_precision(g.precision), INTERPRETED=interpreted(gather_kernel),
        **config.tiles, **config.resources,
    )  # fmt: skip


def launch_grad_values(
    g: Geometry, config: Config, plan: CondensedPlan, grad_out: Tensor, x: Tensor, nnz: int
) -> Tensor:
    """The gradient of the packed values, float32 [nnz]."""
    blocks = cdiv(g.out_per_group, config.block_rows)
    cols = g.in_per_group * g.taps
    columns = condensed_size(nnz, g.groups * blocks, cols)
    pixels = g.batch * g.out_height * g.out_width
    splits = min(cdiv(_BUSY, cdiv(columns, config.block_cols)), cdiv(pixels, 16 * config.block_pixels))
    per_split = cdiv(cdiv(pixels, splits), config.block_pixels) * config.block_pixels
    partial = x.new_empty(splits, nnz, dtype=torch.float32)
    chunks = cdiv(min(nnz, cols), config.block_cols)
    wrap_triton(grad_values_kernel)[(g.groups * blocks * chunks, splits)](
        grad_out, x, expand_numbers(plan, columns, config.block_rows), partial, plan.block_ptr, plan.cols,
        nnz, g.groups * blocks, blocks, g.out_per_group, g.in_per_group, per_split,
        g.batch, g.out_height, g.out_width, g.height, g.width, g.padding[0], g.padding[2],
        *x.stride(), *grad_out.stride(),
        **g.windows, CHANNELS_INNER=channels_inner(x), BATCH_INNER=batch_inner(x),
        PRECISION=input_precision(g.precision), INTERPRETED=interpreted(grad_values_kernel),
        **config.tiles, **config.resources,
    )  # fmt: skip
    return partial.sum(0)


def plan_of(table: Table, g: Geometry, x: Tensor, pattern: Pattern) -> list[Tensor]:
    """Both plans, flat, as the operators take them; built once for a pattern, tile width, window and memory order."""
    config, t_config, _ = configs(table, g, x.device, pattern.nnz)
    by_channels = channels_inner(x)
    row_ptr, col, *transposed = pattern.operands
    name = f"triton {config.block_rows} {t_config.block_rows} {g.stride} {g.dilation} {by_channels}"
    if torch.compiler.is_compiling() and not pattern.has_plan(name):
        return []  # the graph makes it on each call: what is traced must not be kept
    return pattern.plan(
        name,
        lambda _: [
            *forward_plan(g, row_ptr, col, config, by_channels),
            *transposed_plan(g, *transposed, t_config, by_channels),
        ],
    )


def conv2d_plan(
    x: Tensor,
    pattern: Pattern,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Tensor]:
    """What the operators take as `plan` for an input like x: from the pattern's cache, or built and kept there."""
    g = _geometry(x, pattern.row_ptr, kernel_size, stride, padding, dilation, pattern.groups)
    return plan_of(LAUNCH_TABLE, g, x, pattern)


def forward(
    table: Table, g: Geometry, x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, col: Tensor,
    plan: Sequence[Tensor], out: Tensor,
) -> None:  # fmt: skip
    """Fills out."""
    if out.numel() == 0:
        return
    config, _, _ = configs(table, g, x.device, values.numel())
    own = CondensedPlan(*plan[:3]) if plan else forward_plan(g, row_ptr, col, config, channels_inner(x))
    launch_forward(g, config, own, x, values, bias, out)


def backward(
    table: Table, g: Geometry, grad_out: Tensor, x: Tensor, values: Tensor, row_ptr: Tensor, col: Tensor,
    t_row_ptr: Tensor, t_col: Tensor, t_perm: Tensor, output_mask: Sequence[bool], plan: Sequence[Tensor],
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills grad_x; the gradients of values and bias. One that output_mask leaves out is untouched or empty."""
    nnz = values.numel()
    config, t_config, values_config = configs(table, g, x.device, nnz)
    by_channels = channels_inner(x)
    some = grad_out.numel() > 0
    if output_mask[0] and some and x.numel():
        t_plan = (
            CondensedPlan(*plan[3:]) if plan else transposed_plan(g, t_row_ptr, t_col, t_perm, t_config, by_channels)
        )
        launch_grad_x(g, t_config, t_plan, grad_out, values, grad_x)
    elif output_mask[0]:
        grad_x.zero_()
    if not output_mask[1]:
        grad_values = x.new_empty(0)
    elif some and nnz:
        own = CondensedPlan(*plan[:3]) if plan else forward_plan(g, row_ptr, col, config, by_channels)
        grad_values = launch_grad_values(g, values_config, own, grad_out, x, nnz).to(values.dtype)
    else:
        grad_values = torch.zeros_like(values)
    grad_bias = grad_out.sum((0, 2, 3), dtype=torch.float32).to(x.dtype) if output_mask[2] else x.new_empty(0)
    return grad_values, grad_bias


@triton_op("ilnas::masked_conv2d_triton", mutates_args=())
def masked_conv2d_triton(
    x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, col: Tensor, t_row_ptr: Tensor, t_col: Tensor,
    t_perm: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, plan: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The arguments of ilnas::masked_conv2d, and conv2d_plan's answer, or nothing, to have it made on each call."""
    g = _geometry(x, row_ptr, kernel_size, stride, padding, dilation, groups)
    out = empty_in_layout(x, (g.batch, g.out_channels, g.out_height, g.out_width), layout_of(x))
    forward(LAUNCH_TABLE, g, x, values, bias, row_ptr, col, plan, out)
    return out


@triton_op("ilnas::masked_conv2d_backward_triton", mutates_args=())
def masked_conv2d_backward_triton(
    grad_out: Tensor, x: Tensor, values: Tensor, row_ptr: Tensor, col: Tensor, t_row_ptr: Tensor, t_col: Tensor,
    t_perm: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, output_mask: Sequence[bool], plan: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, values and bias; one that output_mask leaves out is an empty tensor."""
    g = _geometry(x, row_ptr, kernel_size, stride, padding, dilation, groups)
    grad_x = empty_in_layout(x, x.shape, layout_of(x)) if output_mask[0] else x.new_empty(0)
    grads = backward(
        LAUNCH_TABLE, g, grad_out, x, values, row_ptr, col, t_row_ptr, t_col, t_perm, output_mask, plan, grad_x
    )
    return grad_x, *grads


def _geometry(x, row_ptr, kernel_size, stride, padding, dilation, groups) -> Geometry:
    precision = precision_of(x, torch.backends.cudnn.allow_tf32)
    return geometry(x, row_ptr.numel() - 1, kernel_size, stride, padding, dilation, groups, precision)


@masked_conv2d_triton.register_fake
def _(x, values, bias, row_ptr, col, t_row_ptr, t_col, t_perm, kernel_size, stride, padding, dilation, groups, plan):
    g = geometry(x, row_ptr.shape[0] - 1, kernel_size, stride, padding, dilation, groups, "")
    return empty_in_layout(x, (g.batch, g.out_channels, g.out_height, g.out_width), layout_of(x))


register_backward("masked_conv2d", masked_conv2d_backward_triton)
