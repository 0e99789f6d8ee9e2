"""The interleaved measurements as pytest-benchmark shows them.

pytest-benchmark would time one contender after the other. Here the first test of a group measures the whole group,
and every test of it replays its own contender's times: a clock is handed to pytest-benchmark that moves as far as the
measured call took. A group is thus measured once, and its table compares times taken in turn.
"""

from collections.abc import Callable

import pytest

from .cases import SECONDS_A_CASE, Case, is_quick
from .machine import describe_machine
from .timing import Seconds, fastest, keep_freed_memory, speedup


class Replay:
    """A clock and a call that moves it by the next of the given times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.times = iter(())

    def clock(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += next(self.times)


REPLAY = pytest.StashKey[Replay]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="largest thread count, four densities, little time")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    benchmarks = [item for item in items if isinstance(getattr(item, "callspec", None) and _case(item), Case)]
    for item in benchmarks:
        item.stash[REPLAY] = Replay()
        item.add_marker(pytest.mark.benchmark(group=_case(item).id, timer=item.stash[REPLAY].clock))
    if config.getoption("--quick"):
        left_out = [item for item in benchmarks if not is_quick(_case(item))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.update(describe_machine())


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Callable[[Case], Seconds]:
    """The times of a case, measured when first asked for."""
    keep_freed_memory()
    seconds = 0.3 if pytestconfig.getoption("--quick") else SECONDS_A_CASE
    known: dict[str, Seconds] = {}

    def times(case: Case) -> Seconds:
        if case.id not in known:
            known[case.id] = case.measure(seconds)
        return known[case.id]

    return times


@pytest.fixture
def compare(request, benchmark, measured) -> Callable[[Case, str], None]:
    """Hand the contender's times, and its speed-up over the faster dense way, to pytest-benchmark."""

    def replay(case: Case, contender: str) -> None:
        samples = measured(case)
        dense = [name for name in samples if name.startswith("dense")]
        benchmark.extra_info["speedup_over_dense"] = speedup(samples, contender, fastest(samples, dense))
        clock = request.node.stash[REPLAY]
        clock.times = iter(samples[contender])
        benchmark.pedantic(clock.step, rounds=len(samples[contender]))

    return replay


def _case(item: pytest.Item) -> Case | None:
    return item.callspec.params.get("case")
