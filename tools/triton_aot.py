"""Compiles every entry of the Triton launch tables for every family of GPUs, without one.

Fails if an entry does not compile, spills registers, or takes more shared memory than the family has.
Run as `python tools/triton_aot.py [FAMILY ...]`, in a process of its own: not where Triton interprets.
"""

import io
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ilnas_kernels.triton import absent_topk, condensed, masked_conv2d, masked_linear
from ilnas_kernels.triton.condensed_conv2d import gather_kernel, grad_values_kernel
from ilnas_kernels.triton.launch import FAMILIES, Config, input_precision

# The log of the very run of ptxas that Triton makes: which ptxas and which options differ between its versions, and
# with them the spills. A kernel from the cache would have none.
triton.knobs.nvidia.dump_ptxas_log = True
triton.knobs.compilation.always_compile = True

TARGETS = {
    "sm75": GPUTarget("cuda", 75, 32),
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that one block can have.
SHARED_MEMORY = {"sm75": 64 << 10, "sm80": 163 << 10, "sm86": 99 << 10, "sm90": 227 << 10, "gfx942": 64 << 10}
ELEMENT = {"float32": "fp32", "tf32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Pointers to something else than the inputs' dtype.
POINTEES = {
    "block_ptr": "i32", "col_ptr": "i32", "place_ptr": "i32", "number_ptr": "i32", "partial_ptr": "fp32",
    "blocked_ptr": "i32", "row_ptr": "i32", "control_ptr": "i64", "buffer_ptr": "i64", "counters_ptr": "i32",
    "histogram_ptr": "i32",
}  # fmt: skip
WINDOW = {
    "KERNEL_HEIGHT": 3, "KERNEL_WIDTH": 3, "STRIDE_HEIGHT": 1, "STRIDE_WIDTH": 1,
    "DILATION_HEIGHT": 1, "DILATION_WIDTH": 1,
}  # fmt: skip
POINT = dict.fromkeys(WINDOW, 1)


class Case(NamedTuple):
    """One kernel to compile: its constants, and the innermost stride, which a launch knows to be 1."""

    name: str
    kernel: triton.JITFunction
    precision: str
    constants: dict[str, object]
    config: Config | None
    unit_strides: tuple[str, ...] = ()


def gather_cases(name: str, table: dict, family: str, window: dict[str, int], linear: bool) -> Iterator[Case]:
    """The forward pass in one orientation of the inputs and the gradient of the input in the other; linear has one."""
    for (entry_family, precision), entries in table.items():
        if entry_family != family:
            continue
        common = {"PRECISION": input_precision(precision), "INTERPRETED": False, "BATCH_INNER": False, **window}
        for width in ("narrow", "wide"):
            config = entries[width]
            for transposed in (False,) if linear else (False, True):
                inner = linear or transposed
                constants = {
                    **common, "TRANSPOSED": transposed, "CHECKED": not linear, "HAS_BIAS": not transposed,
                    "CHANNELS_INNER": inner, **config.tiles,
                }  # fmt: skip
                unit = ("source_channel_stride",) if inner else ("source_col_stride",)
                label = f"{name} {'grad_x' if transposed else 'forward'} {width}"
                yield Case(label, gather_kernel, precision, constants, config, unit)
            config = entries[f"{width}_values"]
            inner = linear
            constants = {**common, "CHANNELS_INNER": inner, **config.tiles}
            unit = ("x_channel_stride", "out_channel_stride") if inner else ("x_col_stride", "out_col_stride")
            yield Case(f"{name} grad_values {width}", grad_values_kernel, precision, constants, config, unit)


def topk_cases(family: str) -> Iterator[Case]:
    for (entry_family, precision), entries in absent_topk.LAUNCH_TABLE.items():
        if entry_family != family:
            continue
        for width, config in entries.items():
            for by_kernel in (False, True) if width == "small" else (False,):
                constants = {
                    "PRECISION": input_precision(precision), "INTERPRETED": False, "BATCH_INNER": False,
                    "CHANNELS_INNER": by_kernel, "BY_KERNEL": by_kernel, "BINS": absent_topk.BINS,
                    **WINDOW, **config.tiles,
                }  # fmt: skip
                unit = ("x_channel_stride", "out_channel_stride") if by_kernel else ("x_col_stride", "out_col_stride")
                name = f"absent_topk {'kernel' if by_kernel else 'weight'} {width}"
                yield Case(name, absent_topk.rank_kernel, precision, constants, config, unit)
    yield Case("absent_topk block", absent_topk.block_kernel, "float32", {"BLOCK": absent_topk.BLOCK}, None)


def cases(family: str) -> Iterator[Case]:
    yield from gather_cases("masked_conv2d", masked_conv2d.LAUNCH_TABLE, family, WINDOW, linear=False)
    yield from gather_cases("masked_linear", masked_linear.LAUNCH_TABLE, family, POINT, linear=True)
    for precision in ("float32", "float16"):
        for numbered in (False, True):
            yield Case(
                f"expand {'numbers' if numbered else 'values'}", condensed.expand_kernel, precision,
                {"NUMBERED": numbered, "BLOCK": condensed.EXPAND_BLOCK}, None,
            )  # fmt: skip
    yield from topk_cases(family)


def compile_case(case: Case, family: str) -> CompiledKernel:
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        if name.isupper() or name in case.unit_strides:
            signature[name] = "constexpr"
            constants[(place,)] = 1 if name in case.unit_strides else case.constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTEES.get(name, ELEMENT[case.precision])
            if name == "condensed_ptr" and case.constants["NUMBERED"]:
                signature[name] = "*i32"
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[family], options=case.config.resources if case.config else {})


class Usage(NamedTuple):
    registers: int
    spilled: int
    shared: int


def usage(case: Case, family: str) -> Usage:
    """What one program takes."""
    log = io.StringIO()
    with redirect_stdout(log):
        kernel = compile_case(case, family)
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        count = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        return Usage(count["vgpr_count"], count["vgpr_spill_count"], kernel.metadata.shared)
    registers = max(map(int, re.findall(r"Used (\d+) registers", log.getvalue())))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    return Usage(registers, spilled, kernel.metadata.shared)


def check(family: str, case: Case) -> tuple[bool, str]:
    """Whether a case is sound, and its line of the table."""
    label = f"{family:7} {case.precision:9} {case.name:34}"
    try:
        used = usage(case, family)
    except Exception as error:  # any failure of the compiler is this check's finding
        return False, f"{label} FAILED: {type(error).__name__}: {str(error).strip()[:2000]}"
    verdict = ""
    if used.spilled:
        verdict = "FAILED: spills"
    elif used.shared > SHARED_MEMORY[family]:
        verdict = f"FAILED: the family has {SHARED_MEMORY[family]} bytes of shared memory"
    text = f"{label} {used.registers:4} registers {used.spilled:5} spilled {used.shared:7} bytes shared"
    return not verdict, f"{text} {verdict}".rstrip()


def check_numbered(family: str, number: int) -> tuple[bool, str]:
    return check(family, list(cases(family))[number])


def main(families: list[str]) -> int:
    print(f"triton {triton.__version__}")
    chosen = [(family, number) for family in families or FAMILIES for number, _ in enumerate(cases(family))]
    sound = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for passed, line in pool.map(check_numbered, *zip(*chosen, strict=True)):
            print(line, flush=True)
            sound.append(passed)
    print(f"{len(sound)} kernels, {sound.count(False)} failed")
    return int(not all(sound))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
