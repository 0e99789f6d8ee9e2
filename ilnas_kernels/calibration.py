"""Measuring on the user's machine where sparse kernels become faster than dense torch."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._calls import ConvCall, LinearCall
from ._crossovers import table_key, write
from .dispatch import sparse_route, why_no_sparse_route
from .layout import to_batch_last
from .pattern import Pattern


def calibrate(
    *,
    device: str | torch.device = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    kinds: Sequence[str] = ("conv", "conv1x1", "linear"),
    seconds: float = 3.0,
    store: bool = True,
) -> dict[str, tuple[float, float, float]]:
    """Measures the crossovers on this machine and keeps them for later runs; returns them by table key.

    Dense and sparse are run in turn on mid-sized layers at several densities, medians compared, and the density at
    which they take the same time is interpolated; ``seconds`` per kind, dtype and layout. They hold for the current
    torch version and GPU or, on the CPU, instruction set and number of threads. store=False measures only. A cache
    folder that cannot be written is an OSError.
    """
    device = torch.device(device)
    if unknown := sorted(set(kinds) - set(_SHAPES)):
        raise ValueError(f"calibrate: kinds must be among {sorted(_SHAPES)}, got {unknown[0]!r}")
    if not seconds > 0:
        raise ValueError(f"calibrate: seconds must be positive, got {seconds}")
    for dtype in dtypes:
        _sparse_route(device, dtype)
    found = {}
    for kind in kinds:
        for dtype in dtypes:
            for batch_last in (False, True) if kind != "linear" and device.type == "cpu" else (False,):
                key = table_key(device.type, kind, dtype, batch_last)
                found[key] = _measure(kind, device, dtype, batch_last, seconds)
    if store:
        write(device, found)
    return found


# (batch, in, out, size): one early and one late layer of a usual network; linear: (batch, in, out).
_SHAPES = {
    "conv": ((32, 64, 64, 32), (32, 256, 256, 8)),
    "conv1x1": ((32, 128, 128, 16), (32, 256, 256, 16)),
    "linear": ((128, 1024, 1024), (256, 2048, 1024)),
}
_DENSITIES = {"cpu": (0.8, 0.6, 0.45, 0.3, 0.2, 0.1), "cuda": (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)}
# A GPU is kept as busy as a training step keeps it: larger batches, and calls that follow each other without waiting.
_GPU_BATCHES, _GPU_CALLS = 4, 10


def _measure(kind: str, device: torch.device, dtype: torch.dtype, batch_last: bool, seconds: float):
    """The three crossovers of one table row."""
    found, densities = [], _DENSITIES[device.type]
    per_density = seconds / len(_SHAPES[kind]) / len(densities)
    for shape in _SHAPES[kind]:
        ratios = [_ratios(kind, shape, density, device, dtype, batch_last, per_density) for density in densities]
        found.append([crossing(densities, [r[i] for r in ratios]) for i in range(3)])
    # The lower of the shapes' crossovers: above it dense is never slower than torch, below it sparse is not.
    return tuple(round(min(column), 3) for column in zip(*found, strict=True))


def crossing(densities: Sequence[float], ratios: Sequence[float]) -> float:
    """The highest density from which downwards sparse / dense time stays below 1, linearly interpolated."""
    below = 0.0
    last = None
    for density, ratio in sorted(zip(densities, ratios, strict=True)):
        if ratio >= 1.0:
            if last is None:
                return 0.0
            last_density, last_ratio = last
            return last_density + (density - last_density) * (1.0 - last_ratio) / (ratio - last_ratio)
        below, last = density, (density, ratio)
    return below


def _ratios(kind, shape, density, device, dtype, batch_last, seconds) -> tuple[float, float, float]:
    """Sparse time / dense time of forward, grad_input and grad_weight."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    batch, in_channels, out_channels = shape[:3]
    if device.type == "cuda":
        batch *= _GPU_BATCHES
    taps = {"conv": (3, 3), "conv1x1": (1, 1), "linear": ()}[kind]
    size = (shape[3], shape[3]) if taps else ()
    pattern = Pattern.random((out_channels, in_channels, *taps), density, generator=generator).to(device)
    pad = 1 if kind == "conv" else 0
    call = ConvCall(pattern, (1, 1), (pad,) * 4, (1, 1)) if taps else LinearCall(pattern)
    x, grad_out = random(batch, in_channels, *size), random(batch, out_channels, *size)
    if batch_last:
        x, grad_out = to_batch_last(x), to_batch_last(grad_out)
    values = random(pattern.nnz)
    weight = torch.ops.ilnas.scatter_live(values, pattern.row_ptr, pattern.col, pattern.shape, pattern.stride)
    route, isa = _sparse_route(device, dtype), ""
    pairs = [
        (lambda: call.forward_sparse(x, values, None, route, isa), lambda: call.forward_dense(x, weight, None)),
        *(
            (
                lambda wanted=wanted: call.backward_sparse(grad_out, x, values, wanted, route, isa),
                lambda wanted=wanted: call.backward_dense(grad_out, x, weight, wanted),
            )
            for wanted in ([True, False, False], [False, True, False])
        ),
    ]
    with torch.no_grad():
        return tuple(_time_ratio(sparse, dense, device, seconds / 3) for sparse, dense in pairs)


def _sparse_route(device: torch.device, dtype: torch.dtype) -> str:
    if (route := sparse_route(device, dtype)) is None:
        raise ValueError(f"calibrate: {why_no_sparse_route(device, dtype)}")
    return route


def _time_ratio(sparse: Callable, dense: Callable, device: torch.device, seconds: float) -> float:
    """Median time of one over the median time of the other, run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    calls = _GPU_CALLS if device.type == "cuda" else 1
    sparse(), dense()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, taken in zip((sparse, dense), times, strict=True):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])
