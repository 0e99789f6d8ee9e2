"""The densities below which sparse kernels win: a table of defaults, and what :func:`calibrate` measured here."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from . import _C, _cuda_routes


class Crossovers(NamedTuple):
    """The density below which the sparse kernel of each operation is faster than dense torch, and how that is known."""

    forward: float
    grad_input: float
    grad_weight: float
    source: str


# Below these no layer of benchmarks/ loses on any of three AVX-512 machines: AMD Zen 4 and Zen 5, Intel family 6 model
# 207. NCHW input unless said otherwise.
DEFAULTS: dict[str, tuple[float, float, float]] = {
    "cpu/conv": (0.55, 0.55, 0.55),
    "cpu/conv1x1": (0.55, 0.55, 0.55),
    "cpu/linear": (0.3, 0.25, 0.25),
    "cpu/conv/batch-last": (0.9, 0.9, 0.9),
    "cpu/conv1x1/batch-last": (0.9, 0.9, 0.9),
}
_NEVER = (0.0, 0.0, 0.0)
# Predicted for the Triton kernels where the CUDA ones are not built: a gathered input costs a tenth of a clock, against
# which dense tensor-core products leave room only where few of 64 rows' columns are live. calibrate() measures instead.
_TRITON = {
    (kind, dtype): (density,) * 3
    for dtype, densities in (
        (torch.float32, {"conv": 0.01, "conv1x1": 0.01, "linear": 0.03}),  # torch's convolutions take TF32, linear not
        (torch.float16, {"conv": 0.005, "conv1x1": 0.005, "linear": 0.005}),
        (torch.bfloat16, {"conv": 0.005, "conv1x1": 0.005, "linear": 0.005}),
    )
    for kind, density in densities.items()
}


def table_key(device: str, kind: str, dtype: torch.dtype, batch_last: bool) -> str:
    parts = [device, kind, "batch-last" if batch_last else "", "" if dtype == torch.float32 else str(dtype)[6:]]
    return "/".join(part for part in parts if part)


def crossovers_for(device: torch.device, kind: str, dtype: torch.dtype, batch_last: bool) -> Crossovers:
    """The numbers calibrated on this device, else the defaults; for CUDA devices they are predicted.

    On the CPU a dtype without numbers of its own has those of float32.
    """
    if (known := _looked_up(device, kind, dtype, batch_last, torch.get_num_threads())) is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_available() and dtype != torch.float64:
        if _cuda_routes.why_not(device) is not None:
            return Crossovers(*_TRITON[kind, dtype], _cuda_routes.SOURCE)
        capability = torch.cuda.get_device_capability(device)
        return Crossovers(*_cuda_routes.predicted(kind, dtype, capability), _cuda_routes.SOURCE)
    return Crossovers(*_NEVER, "nothing is known about this device")


@cache
def _looked_up(
    device: torch.device, kind: str, dtype: torch.dtype, batch_last: bool, threads: int
) -> Crossovers | None:
    # On a GPU dense torch computes each dtype on units of its own.
    for wanted in (dtype, torch.float32) if device.type == "cpu" else (dtype,):
        key = table_key(device.type, kind, wanted, batch_last)
        if (measured := _stored(device).get(key)) is not None:
            return Crossovers(*measured, "calibrated on this machine")
        if key in DEFAULTS:
            return Crossovers(*DEFAULTS[key], "default table")
    return None


def cache_file() -> Path:
    """Where :func:`calibrate` keeps its numbers: the user's cache folder of the platform."""
    home = Path.home()
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "ilnas" / "Cache"
    elif sys.platform == "darwin":
        folder = home / "Library" / "Caches" / "ilnas"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "ilnas"
    return folder / "crossovers.json"


def machine_key(device: torch.device) -> str:
    """What stored numbers hold for."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, {_C.best_instruction_set()}, {torch.get_num_threads()} threads"


@cache
def _all_stored() -> dict:
    try:
        return json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _stored(device: torch.device) -> dict[str, Sequence[float]]:
    """This device's numbers; none when there is no file, or one that is not ours."""
    everything = _all_stored()
    mine = everything.get(machine_key(device)) if isinstance(everything, dict) else None
    return mine if isinstance(mine, dict) else {}


def write(device: torch.device, found: dict[str, tuple[float, float, float]]) -> None:
    forget()
    everything = {**_all_stored(), machine_key(device): {**_stored(device), **found}}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that another process never reads half a file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(everything, file, indent=1)
    os.replace(file.name, path)
    forget()


def forget() -> None:
    """Reads the stored numbers anew at the next call."""
    _all_stored.cache_clear()
    _looked_up.cache_clear()
