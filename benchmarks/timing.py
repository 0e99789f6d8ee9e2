"""Times of several ways of doing one thing, taken in turn in one process.

A machine's speed drifts, and neighbours disturb it. Ways that take turns are disturbed alike, so the ratio of their
times is steadier than any of the times.
"""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

Seconds = dict[str, list[float]]  # contender -> one time a round

SHORTEST_SAMPLE = 2e-3  # s; shorter work is repeated within a sample, else clock and cold caches would be measured
LONG_CALL = 0.5  # s; the first such call is warm-up and estimate at once
ROUNDS = (5, 40)


def interleave(contenders: Mapping[str, Callable[[], object]], seconds: float) -> Seconds:
    """The time of one call of every contender, round after round, for about ``seconds`` in all.

    In every round each contender has one turn; who begins moves on by one, so that none always follows the same other.
    """
    once = {name: _warm_time(call) for name, call in contenders.items()}
    repeats = {name: math.ceil(SHORTEST_SAMPLE / max(once[name], 1e-7)) for name in contenders}
    round_time = sum(max(once[name], SHORTEST_SAMPLE) for name in contenders)
    rounds = min(max(round(seconds / round_time), ROUNDS[0]), ROUNDS[1])
    names = list(contenders)
    samples: Seconds = {name: [] for name in names}
    with _collector_off():
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(_time(contenders[name], repeats[name]))
    return samples


def speedup(samples: Seconds, name: str, baseline: str) -> float:
    """How many times faster ``name`` is than ``baseline``: the median over the rounds of their ratio in that round."""
    return statistics.median(b / a for a, b in zip(samples[name], samples[baseline], strict=True))


def fastest(samples: Seconds, names: list[str]) -> str:
    """The one of ``names`` with the smallest median time."""
    return min(names, key=lambda name: statistics.median(samples[name]))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with ``count`` threads, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> bool:
    """Let the C allocator keep what is freed instead of handing it back to the system; whether it could be told.

    Otherwise every output above 32 MB is fresh memory whose page faults cost as much as the work on it: dense and
    sparse ways would both be measured at clearing pages. A training run keeps its memory in the same way.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is None:
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def _warm_time(call: Callable[[], object]) -> float:
    first = _time(call, 1)
    return first if first > LONG_CALL else _time(call, 1)


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
