"""The measurements of one machine, in memory and as a JSON file."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from .cases import Case
from .timing import Seconds, fastest, speedup


@dataclass(frozen=True)
class Measurement:
    """The times of one case's contenders, in seconds, one a round."""

    op: str
    shape: str
    density: float
    threads: int
    seconds: Seconds

    def speedup(self, ours: tuple[str, ...], baselines: tuple[str, ...]) -> float:
        """How many times faster the fastest of ``ours`` is than the fastest of ``baselines``."""
        baseline = fastest(self.seconds, list(baselines))
        return max(speedup(self.seconds, name, baseline) for name in ours)


@dataclass
class Results:
    machine: dict[str, str | int]
    measurements: dict[str, Measurement] = field(default_factory=dict)  # by case id
    memory: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)

    def add(self, case: Case, seconds: Seconds) -> None:
        rounded = {name: [float(f"{time:.4g}") for time in times] for name, times in seconds.items()}
        self.measurements[case.id] = Measurement(case.op, case.shape, case.density, case.threads, rounded)

    def select(self, op: str, density: float, threads: int) -> list[Measurement]:
        """Every shape's measurement."""
        return [m for m in self.measurements.values() if (m.op, m.density, m.threads) == (op, density, threads)]

    def speedup(
        self, op: str, density: float, threads: int, ours: tuple[str, ...], baselines: tuple[str, ...]
    ) -> float | None:
        """The geometric mean over the shapes; None where nothing was measured."""
        ratios = [m.speedup(ours, baselines) for m in self.select(op, density, threads)]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    def save(self, path: Path) -> None:
        """One line a measurement. The file is replaced whole, so an interruption leaves the earlier one."""
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(vars(m))}" for key, m in self.measurements.items())
        text = (
            f'{{"machine": {json.dumps(self.machine)},\n"memory": {json.dumps(self.memory)},\n'
            f'"measurements": {{\n{lines}\n}}}}\n'
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "Results":
        content = json.loads(path.read_text())
        measurements = {key: Measurement(**fields) for key, fields in content["measurements"].items()}
        return cls(content["machine"], measurements, content["memory"])
