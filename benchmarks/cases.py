"""What is measured: one operator at one shape, density and thread count, done in several ways."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from .timing import Seconds, interleave, threads

# 1.0 and 0.6 lie above the crossover to the dense route: there the question is whether anything is lost.
SPARSE_DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
DENSITIES = (1.0, 0.6, *SPARSE_DENSITIES)
THREADS = tuple(sorted({1, min(2, os.cpu_count() or 1)}))
SECONDS_A_CASE = 1.5

Contenders = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One group of contenders.

    A contender's name begins with ``dense`` (a baseline: torch with the masked weight ready), ``ours``, or is another
    rival's name. ``build`` makes the inputs and returns the contenders, in the order of ``names``.
    """

    op: str
    shape: str
    density: float
    threads: int
    names: tuple[str, ...]
    build: Callable[[], Contenders] = field(compare=False, repr=False)

    @property
    def id(self) -> str:
        return f"{self.op} {self.shape} density {self.density:g} threads {self.threads}"

    def measure(self, seconds: float = SECONDS_A_CASE) -> Seconds:
        """The times of all contenders, interleaved."""
        with threads(self.threads):
            contenders = self.build()
            if tuple(contenders) != self.names:
                raise ValueError(f"{self.id}: built {tuple(contenders)}, announced {self.names}")
            return interleave(contenders, seconds)


def is_quick(case: Case) -> bool:
    """Whether the case belongs to the short selection."""
    return case.threads == max(THREADS) and case.density in (0.6, 0.1, 0.05, 0.01)


def groups(cases: list[Case]) -> list[tuple[Case, str]]:
    """Every contender of every case, as parameters of a test."""
    return [(case, name) for case in cases for name in case.names]


def label(parameter: Case | str) -> str:
    return parameter.id if isinstance(parameter, Case) else parameter
