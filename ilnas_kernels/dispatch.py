"""Which route an operator takes: dense torch, or the sparse kernels of the device (C++, CUDA, Triton)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, _blocked_topk, _cuda_routes
from ._crossovers import Crossovers, crossovers_for
from .layout import is_strided_batch_last
from .pattern import Pattern

_forced_isa: ContextVar[str] = ContextVar("ilnas_isa", default="")
_forced_route: ContextVar[str | None] = ContextVar("ilnas_route", default=None)


class Routes(NamedTuple):
    """The route of each of a layer's three operations."""

    forward: str
    grad_input: str
    grad_weight: str


class Choice(NamedTuple):
    """One operation's route and the reason; the sparse route wins below the ``crossover`` density."""

    operation: str
    route: str
    density: float
    crossover: float
    why: str


@dataclass(frozen=True)
class Explanation:
    """The choices for forward, grad_input and grad_weight; prints as one line each."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{c.operation:<12}{c.route:<8}density {c.density:.4g}, crossover {c.crossover:.4g}: {c.why}"
            for c in self.choices
        )


def instruction_sets() -> dict[str, bool]:
    """The CPU instruction sets compiled in, each with whether this processor runs it."""
    return _C.instruction_sets()


def current_instruction_set() -> str:
    """The CPU instruction set that a call made now would use."""
    return _forced_isa.get() or _C.best_instruction_set()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Within it the CPU kernels of this instruction set are used, also in the backward of what ran within it.

    name: one of :func:`instruction_sets` that runs here; ValueError for any other. What torch.compile traced within it
    keeps it.
    """
    runs = instruction_sets()
    if not runs.get(name, False):
        usable = ", ".join(sorted(n for n, ok in runs.items() if ok))
        raise ValueError(f"instruction_set: name must be compiled in and run here ({usable}), got {name!r}")
    token = _forced_isa.set(name)
    try:
        yield
    finally:
        _forced_isa.reset(token)


@contextmanager
def use_route(route: str) -> Iterator[None]:
    """Within it the masked layers take this route whatever is faster: "dense", or "sparse" for the best sparse one."""
    if route not in ("dense", "sparse"):
        raise ValueError(f"use_route: route must be 'dense' or 'sparse', got {route!r}")
    token = _forced_route.set(route)
    try:
        yield
    finally:
        _forced_route.reset(token)


# torch.compile cannot read a ContextVar; it takes what holds while it traces.
@torch.compiler.assume_constant_result
def isa_argument() -> str:
    return _forced_isa.get()


@torch.compiler.assume_constant_result
def forced_route() -> str | None:
    return _forced_route.get()


@torch.compiler.assume_constant_result
def _crossovers(device: torch.device, kind: str, dtype: torch.dtype, batch_last: bool) -> Crossovers:
    return crossovers_for(device, kind, dtype, batch_last)


# A 3x3 layer of 16 input channels. Up to this many weights an output, changing the layout to torch's and back takes 1.4
# to 5 times as long as the sparse kernels take with every weight live (one thread, AVX-512).
_FEW_INPUTS = 144


def _crossovers_of(call, x: Tensor) -> Crossovers:
    converts = converts_layout(call, x)
    few = call.pattern.numel <= _FEW_INPUTS * call.pattern.shape[0]
    # What a traced forward needs of an all-live pattern cannot be made there.
    if converts and few and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return Crossovers(2.0, 2.0, 2.0, "an output has few weights, and the layout would have to be changed")
    return _crossovers(x.device, call.kind, x.dtype, converts)


@torch.compiler.assume_constant_result
def sparse_route(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """The sparse kernels for a device and a dtype; None where there are none."""
    if device.type == "cpu":
        return "sparse"
    if device.type != "cuda" or dtype == torch.float64:
        return None
    if _cuda_routes.why_not(device) is None:
        return "cuda"
    return "triton" if _why_not_triton(device, dtype) is None else None


@cache
def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    from . import triton  # registers the operators

    return triton.why_not(dtype, device, 0)


def why_no_sparse_route(device: torch.device, dtype: torch.dtype) -> str:
    """The sentence where :func:`sparse_route` has none."""
    why = f"there are no sparse kernels for {dtype} on {device.type} here"
    if device.type == "cuda" and dtype != torch.float64:
        why += f": {_cuda_routes.why_not(device)}, and {_why_not_triton(device, dtype)}"
    return why


def routes_for(call, x: Tensor) -> Routes:
    """The three routes of a call on checked operands of the dtype it computes in."""
    device = x.device
    sparse, forced = sparse_route(device, x.dtype), forced_route()
    if sparse == "triton" and x.numel() >= 2**31 * max(x.shape[1], 1):
        sparse = None  # its positions are numbered with 32 bits
    if sparse is None or forced == "dense":
        return Routes("dense", "dense", "dense")
    if forced is not None:
        return Routes(sparse, sparse, sparse)
    density = call.pattern.density
    crossovers = _crossovers_of(call, x)
    return Routes(
        sparse if density < crossovers.forward else "dense",
        sparse if density < crossovers.grad_input else "dense",
        sparse if density < crossovers.grad_weight else "dense",
    )


def is_plain(pattern: Pattern, weight: Tensor) -> bool:
    """Whether the layer is nothing but torch's: all live and dense, with no sparse route forced upon it.

    In a traced forward it always is, since the compressed forms of an all-live pattern cannot be made there.
    """
    if pattern.nnz != pattern.numel or weight.dim() == 1:
        return False
    return torch.compiler.is_compiling() or forced_route() != "sparse"


def converts_layout(call, x: Tensor) -> bool:
    """Whether the dense route would have to convert the layout."""
    return call.weight_dim == 4 and is_strided_batch_last(x)


# The largest weight that absent_topk's kernels can rank: an index is part of the key they sort by.
_MOST_RANKED = {"sparse": 2**32, "cuda": 2**32 - 2, "triton": 2**31 - 1}


def topk_route(x: Tensor, grad_out: Tensor, pattern: Pattern) -> tuple[Callable, Tensor, Tensor]:
    """The operator for absent_topk, and its operands where it runs."""
    route = sparse_route(x.device, x.dtype)
    if route is None and (in_float := sparse_route(x.device)) is not None:
        route, x, grad_out = in_float, x.float(), grad_out.float()  # what is returned is float32 anyway
    if route is None or pattern.numel > _MOST_RANKED[route]:
        return _blocked_topk.absent_topk, x, grad_out
    return _topk_triton if route == "triton" else torch.ops.ilnas.absent_topk, x, grad_out


def _topk_triton(*arguments):
    *rest, _ = arguments  # no instruction set there
    return torch.ops.ilnas.absent_topk_triton(*rest)


def explain(call, x: Tensor) -> Explanation:
    """Why :func:`routes_for` says what it says; only device, dtype and layout of ``x`` are looked at."""
    routes, density = routes_for(call, x), call.pattern.density
    crossovers = _crossovers_of(call, x)
    choices = []
    for operation, route in routes._asdict().items():
        crossover = getattr(crossovers, operation)
        if forced_route() is not None:
            why = "forced by use_route"
        elif sparse_route(x.device, x.dtype) is None:
            why = f"{why_no_sparse_route(x.device, x.dtype)}; absent_topk computes the dense gradient in blocks"
        elif call.pattern.nnz == call.pattern.numel and route == "dense":
            library = "by oneDNN, which is faster than MKL here" if call.outruns_torch(x) else "so this is plain torch"
            why = f"all weights are live, {library}"
        else:
            side = "below" if density < crossover else "not below"
            why = f"the density is {side} the crossover ({crossovers.source})"
        choices.append(Choice(operation, route, density, crossover, why))
    return Explanation(tuple(choices))
