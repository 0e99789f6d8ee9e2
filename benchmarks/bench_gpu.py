"""The CUDA kernels against dense torch on this GPU: ``python -m benchmarks.bench_gpu --out FOLDER --seconds 200``.

Dense torch has its masked weight ready and takes the faster of its two layouts: cuDNN and cuBLAS in strict float32,
TF32, float16 and bfloat16. Times are medians of CUDA events, the ways taken in turn. Prints one table, writes
``gpu.json``; cases that the time does not reach are named in it.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ilnas_kernels._calls import ConvCall, LinearCall
from ilnas_kernels._geometry import AS_CONVOLUTION
from ilnas_kernels.pattern import Pattern

CONVS = [(128, 256, 256, 16), (32, 512, 512, 8), (128, 128, 128, 16), (128, 64, 64, 32)]  # batch, in, out, side
LINEARS = [(512, 4096, 1024), (128, 1024, 1024)]  # batch, in, out
DENSITIES = [0.1, 0.02, 0.05, 0.01, 0.2]  # the most telling first
OPS = ["forward", "grad_input", "grad_values", "absent_topk"]
SAMPLE_SECONDS, ROUNDS, TOPK_SHARE = 2e-3, 9, 0.01


@dataclass(frozen=True)
class Row:
    """One operation: microseconds of every way, by name; dense ways begin with ``dense``."""

    op: str
    layer: str
    density: float
    dtype: str
    microseconds: dict[str, float]

    def ratio(self, baseline: str) -> float:
        """How many times faster the best of ours is."""
        ours = min(t for name, t in self.microseconds.items() if name.startswith("ours"))
        return self.microseconds.get(baseline, math.nan) / ours


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def interleaved(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds of a call of each way."""
    repeats = {}
    for name, call in ways.items():
        call()
        repeats[name] = max(1, math.ceil(1e3 * SAMPLE_SECONDS / max(milliseconds(call, 2), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, call in ways.items():
            samples[name].append(milliseconds(call, repeats[name]))
    return {name: round(1e3 * statistics.median(taken), 2) for name, taken in samples.items()}


@dataclass
class Layer:
    """A layer's tensors, in NCHW and channels_last, and the two ways to compute with them."""

    name: str
    pattern: Pattern
    x: Tensor
    grad_out: Tensor
    weight: Tensor
    values: Tensor

    @classmethod
    def make(cls, shape: tuple[int, ...], density: float, dtype: torch.dtype) -> "Layer":
        generator = torch.Generator("cuda").manual_seed(0)
        batch, channels, out = shape[:3]
        taps, side = ((3, 3), shape[3:] * 2) if len(shape) == 4 else ((), ())

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", generator=generator).to(dtype)

        pattern = Pattern.random((out, channels, *taps), density, generator=generator)
        values = draw(pattern.nnz)
        weight = torch.zeros(pattern.numel, device="cuda", dtype=dtype)
        weight[pattern.index] = values
        kind = "conv3x3" if taps else "linear"
        return cls(
            f"{kind} {'x'.join(map(str, shape))}", pattern, draw(batch, channels, *side), draw(batch, out, *side),
            weight.view(pattern.shape), values,
        )  # fmt: skip

    @property
    def is_conv(self) -> bool:
        return self.weight.dim() == 4

    def ours(self, op: str, layout: torch.memory_format) -> Callable[[], object]:
        x, grad_out = self._laid_out(self.x, layout), self._laid_out(self.grad_out, layout)
        call = ConvCall(self.pattern, (1, 1), (1,) * 4, (1, 1)) if self.is_conv else LinearCall(self.pattern)
        if op == "absent_topk":
            k, geometry = round(TOPK_SHARE * self.pattern.numel), call.geometry if self.is_conv else AS_CONVOLUTION
            if not self.is_conv:
                x, grad_out = x.view(*x.shape, 1, 1), grad_out.view(*grad_out.shape, 1, 1)
            ranked = (*self.pattern.operands[:2], k, *geometry, False, 0.0, "")
            return lambda: torch.ops.ilnas.absent_topk(x, grad_out, *ranked)
        if op == "forward":
            return lambda: call.forward_sparse(x, self.values, None, "cuda", "")
        wanted = [op == "grad_input", op == "grad_values", False]
        return lambda: call.backward_sparse(grad_out, x, self.values, wanted, "cuda", "")

    def dense(self, op: str, layout: torch.memory_format) -> Callable[[], object]:
        x, grad_out = self._laid_out(self.x, layout), self._laid_out(self.grad_out, layout)
        weight = self._laid_out(self.weight, layout)
        if not self.is_conv:
            calls = {"forward": lambda: F.linear(x, weight), "grad_input": lambda: grad_out @ weight}
            return calls.get(op, lambda: grad_out.t() @ x)
        if op == "forward":
            return lambda: F.conv2d(x, weight, padding=1)
        wanted = [op == "grad_input", op != "grad_input", False]
        backward = torch.ops.aten.convolution_backward
        return lambda: backward(grad_out, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted)

    def _laid_out(self, t: Tensor, layout: torch.memory_format) -> Tensor:
        return t.contiguous(memory_format=layout) if t.dim() == 4 else t


def with_tf32(call: Callable[[], object], allowed: bool) -> Callable[[], object]:
    def run():
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
        call()

    return run


def measure(shape: tuple[int, ...], density: float, dtype: torch.dtype, op: str, kind: type[Layer] = Layer) -> Row:
    layer = kind.make(shape, density, dtype)
    layouts = {"nchw": torch.contiguous_format}
    if layer.is_conv:
        layouts["nhwc"] = torch.channels_last
    modes = {"": False}
    if dtype == torch.float32:
        modes = {" fp32": False}
        if torch.cuda.get_device_capability() >= (8, 0):
            modes[" tf32"] = True
    ways = {f"ours {name}": layer.ours(op, layout) for name, layout in layouts.items()}
    for mode, allowed in modes.items():
        for name, layout in layouts.items():
            ways[f"dense{mode} {name}"] = with_tf32(layer.dense(op, layout), allowed)
    times = interleaved(ways)
    for mode in modes:
        times[f"dense{mode or ' ' + str(dtype)[6:]}"] = min(times[f"dense{mode} {name}"] for name in layouts)
    return Row(op, layer.name, density, str(dtype)[6:], times)


def cases() -> Iterator[tuple[tuple[int, ...], float, torch.dtype, str]]:
    dtypes = [torch.float32, torch.float16]
    if torch.cuda.get_device_capability() >= (8, 0):
        dtypes.append(torch.bfloat16)
    for density in DENSITIES:
        for shape in (CONVS[0], LINEARS[0], *CONVS[1:], *LINEARS[1:]):
            for dtype in dtypes:
                for op in OPS:
                    yield shape, density, dtype, op


def named(case: tuple[tuple[int, ...], float, torch.dtype, str]) -> list:
    shape, density, dtype, op = case
    return [list(shape), density, str(dtype), op]


def table(rows: list[Row]) -> str:
    lines = [f"{'op':<12}{'layer':<26}{'density':>8}{'dtype':>10}{'ours us':>10}{'dense us':>10}{'ratio':>7}  baseline"]
    for row in rows:
        baselines = [n for n in row.microseconds if n.startswith("dense") and not n.endswith(("nchw", "nhwc"))]
        for baseline in baselines:
            dense = row.microseconds[baseline]
            lines.append(
                f"{row.op:<12}{row.layer:<26}{row.density:>8g}{row.dtype:>10}{dense / row.ratio(baseline):>10.1f}"
                f"{dense:>10.1f}{row.ratio(baseline):>7.2f}  {baseline}"
            )
    return "\n".join(lines)


def main(kind: type[Layer] = Layer, file_name: str = "gpu.json") -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder for gpu.json")
    parser.add_argument("--seconds", type=float, default=200.0, help="no case begins after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu: torch finds no GPU")
    torch.backends.cudnn.benchmark = True
    arguments.out.mkdir(parents=True, exist_ok=True)
    end, rows, left_out, failed = time.monotonic() + arguments.seconds, [], [], []
    for case in cases():
        if time.monotonic() > end:
            left_out.append(named(case))
            continue
        try:
            rows.append(measure(*case, kind))
        except Exception as error:  # one case must not cost the others
            failed.append([*named(case), f"{type(error).__name__}: {error}"])
        results = {
            "device": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
            "left_out": left_out,
            "failed": failed,
        }
        (arguments.out / file_name).write_text(json.dumps(results, indent=1))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {len(left_out)} cases left out for want of time")
    print(table(rows))
    if failed:
        raise SystemExit(f"{len(failed)} cases failed, the first one: {failed[0]}")


if __name__ == "__main__":
    main()
