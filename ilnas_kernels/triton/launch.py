"""What every launch needs: the processor family, the precision of a product, and the launch configuration."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# The families the launch tables know; the ahead-of-time check compiles for each but the interpreter.
FAMILIES = ("sm75", "sm80", "sm86", "sm90", "gfx942")


class Config(NamedTuple):
    """Tile sizes and resources of one kernel.

    block_rows: weight rows that share the union of their columns; block_pixels: output positions;
    block_cols: columns of the weight; each a power of two, those that a product sums over at least 16.
    """

    block_rows: int
    block_pixels: int
    block_cols: int
    warps: int
    stages: int

    @property
    def tiles(self) -> dict[str, int]:
        return {"BLOCK_ROWS": self.block_rows, "BLOCK_PIXELS": self.block_pixels, "BLOCK_COLS": self.block_cols}

    @property
    def resources(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


Table = dict[tuple[str, str], dict[str, Config]]


def interpreted(kernel: object) -> bool:
    """Whether Triton's interpreter runs the kernel, on tensors of any device."""
    return not isinstance(kernel, JITFunction)


def family_of(device: torch.device) -> str:
    """The key of the launch tables for a device: the nearest family at or below it in shared memory."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return "sm75"
    if major >= 12 or (major == 8 and minor > 0):
        return "sm86"
    return "sm80" if major == 8 else "sm90"


def precision_of(x: Tensor, allow_tf32: bool) -> str:
    """The table's name for the arithmetic: the dtype, or tf32 where the device has it and torch allows it."""
    if x.dtype == torch.float32 and allow_tf32 and family_of(x.device) in ("sm80", "sm86", "sm90"):
        return "tf32"
    return DTYPES[x.dtype]


def input_precision(precision: str) -> str:
    """The same as tl.dot's argument."""
    return "tf32" if precision == "tf32" else "ieee"


def config_for(table: Table, device: torch.device, precision: str, width: str) -> Config:
    """The launch table's entry for a device, an arithmetic and a width."""
    return table[family_of(device), precision][width]


def width_for(precision: str, rows: int, density: float) -> str:
    """narrow or wide: how many of a group's rows should share their columns.

    More rows a tile read each input fewer times but multiply more zeros. Tensor cores make zeros nearly free, so there
    only a group with few rows is narrow. fp32 without them does 128 multiplications a clock against about 10 gathered
    inputs, and the two balance at a density of about 7 %.
    """
    few = rows <= 16
    sparse = precision == "float32" and density < 0.07
    return "narrow" if few or sparse else "wide"


def why_not(dtype: torch.dtype, device: torch.device, positions: int) -> str | None:
    """Why the Triton kernels do not serve a call; None if they do. positions: batch * height * width, in or out."""
    if dtype not in DTYPES:
        return f"Triton kernels are for float32, float16 and bfloat16, not {dtype}"
    if device.type != "cuda":
        return f"Triton kernels need a GPU, not {device.type}"
    if dtype == torch.bfloat16 and family_of(device) == "sm75":
        return "bfloat16 needs compute capability 8.0"
    if positions >= 2**31 - 1024:
        return f"Triton kernels number positions with 32 bits; {positions} are too many"
    return None


def cdiv(size: int, block: int) -> int:
    return triton.cdiv(size, block)
