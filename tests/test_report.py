"""The measuring and reporting code: contenders do the same work, and the tables tell what was measured."""

import itertools

import pytest
import torch

pytest.importorskip("matplotlib")
from benchmarks import (
    bench_absent_topk,
    bench_expansion,
    bench_masked_conv2d,
    bench_masked_linear,
    goals,
    memory,
    report,
    tables,
    template_twin,
)
from benchmarks.cases import DENSITIES, SPARSE_DENSITIES, Case
from benchmarks.machine import describe_machine, file_stem
from benchmarks.results import Measurement, Results
from benchmarks.timing import fastest, interleave, speedup, threads
from ilnas.base import random_network
from ilnas.structure import Block, Structure


def test_contenders_take_turns_and_the_first_changes():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) or torch.ones(10**6).sum() for name in "abc"}
    samples = interleave(contenders, seconds=0.0)
    assert {name: len(times) for name, times in samples.items()} == {"a": 5, "b": 5, "c": 5}
    assert all(time > 0 for times in samples.values() for time in times)
    turns = [name for name, _ in itertools.groupby(calls)]
    assert turns[3:] == list("abcbcacababcbca")  # after one warm-up and one trial each


def test_speedup_is_the_median_of_the_ratios_in_each_round():
    samples = {"ours": [1.0, 2.0, 4.0], "dense": [3.0, 4.0, 40.0]}
    assert speedup(samples, "ours", "dense") == 3.0
    assert fastest({"a": [1.0, 9.0, 9.0], "b": [8.0, 8.0, 8.0]}, ["a", "b"]) == "b"


def test_thread_count_is_restored_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before


def test_case_names_are_unique_and_every_goal_is_measured():
    cases = report.all_cases()
    assert len({case.id for case in cases}) == len(cases)
    measured = {(case.op, case.density) for case in cases}
    assert {(goal.op, density) for goal in goals.SPARSE for density in DENSITIES} <= measured
    named = {case.op: set(case.names) for case in cases}
    for goal in goals.SPARSE:
        assert {*goal.ours, *goal.baselines} <= named[goal.op]


@pytest.mark.parametrize("density", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_contenders_compute_the_same(direction, density):
    density = min(SPARSE_DENSITIES, key=lambda d: abs(d - density)) if density < 1 else density
    conv = bench_masked_conv2d.build(direction, 3, 7, 9, 5, 3, density)
    linear = bench_masked_linear.build(direction, 6, 20, 11, density)
    for contenders, terms in ((conv, 7 * 9 * 3 * 25), (linear, 20 * 11)):
        results = {name: call() for name, call in contenders.items()}
        reference = results[next(iter(results))]
        for result in results.values():
            if direction == "forward":
                _assert_close(result if result.shape == reference.shape else result.t(), reference, terms)
            else:
                grad_x = result[0] if result[0].shape == reference[0].shape else result[0].t()
                _assert_close(grad_x, reference[0], terms)


@torch.no_grad()
def test_template_twin_computes_the_same_function():
    structure = Structure(
        (3, 8, 8), 5, [[Block(6), Block(7, identities=1)], [Block(9)]], hidden=[Block(8, identities=1)]
    )
    network = random_network(structure, 700, torch.Generator().manual_seed(0)).eval()
    twin = template_twin.TemplateTwin(structure).copy_from(network).eval().double()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    largest_fan_in, layers = 16 * 9, 7
    _assert_close(network.double()(x), twin(x), terms=largest_fan_in * layers)


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_absent_topk_contenders_find_the_same_entries(density):
    for contenders, ours in (
        (bench_absent_topk.build_conv(3, 20, 30, 5, 3, density), ("ours_nchw", "ours_batch_last")),
        (bench_absent_topk.build_linear(6, 40, 50, density), ("ours",)),
    ):
        steps = next(call for name, call in contenders.items() if name.startswith("four_steps"))
        for name in ours:
            index, _ = contenders[name]()
            assert sorted(index.tolist()) == sorted(steps().tolist())


def test_results_survive_the_file(tmp_path):
    results = _made_up()
    results.save(tmp_path / "machine.json")
    assert Results.load(tmp_path / "machine.json") == results


def test_ratio_over_shapes_is_the_geometric_mean():
    results = Results({})
    for shape, ours in (("a", 0.5), ("b", 0.125)):
        case = Case("conv3x3 forward", shape, 0.1, 1, ("dense_nchw", "ours_nchw"), dict)
        results.add(case, {"dense_nchw": [1.0] * 3, "ours_nchw": [ours] * 3})
    assert results.speedup("conv3x3 forward", 0.1, 1, ("ours_nchw",), ("dense_nchw",)) == pytest.approx(4.0)
    assert results.speedup("conv3x3 forward", 0.2, 1, ("ours_nchw",), ("dense_nchw",)) is None


def test_tables_mark_exactly_the_goals_that_are_reached():
    results = _made_up()
    rows = {row[0]: row[1:] for row in tables.goal_rows(results, threads=1)}
    conv = rows["conv 3x3 forward"]  # 4 times as fast at every density; the goals are 1.4, 3, 5, 8, 12, 16
    assert conv == ["**4.00** / 1.4", "**4.00** / 3", "4.00 / 5", "4.00 / 8", "4.00 / 12", "4.00 / 16"]
    step = {"dense_nchw": [5.0] * 3, "dense_channels_last": [6.0] * 3, "ours_batch_last": [1.0] * 3}
    results.add(Case("training step ILNAS network", "64x3 32x32", 0.05, 1, tuple(step), dict), step)
    assert list(tables.step_rows(results)) == [["ILNAS network", "1", "0.05", "", "", "**5.00** / 4", "5000"]]
    text = tables.render(results)
    assert "made-up processor" in text
    assert "Not measured." in text


def test_an_expansion_is_told_in_training_steps():
    results = Results(describe_machine())
    times = {"three_steps": [3.0] * 3, "dense_gradients": [2.0] * 3, "ours_expansion": [4.5] * 3}
    results.add(Case("expansion", "default", 0.05, 1, tuple(times), dict), times)
    assert list(tables.expansion_rows(results)) == [["default", "1", "1e+03", "2e+03", "4.5e+03", "**2.50**"]]


def test_every_measured_expansion_finds_the_same_task():
    contenders = bench_expansion.build("4,4/6", (1, 8, 8), 1600)
    trainer = contenders["ours_expansion"].args[0]
    assert tuple(contenders) == bench_expansion.NAMES
    live, config = trainer.live, trainer.config
    for _ in range(2):
        done = contenders["ours_expansion"]()
        assert done["added"] == done["removed"] == round((config.alr + config.move) * live)
        assert trainer.live == live
    contenders["dense_gradients"]()
    contenders["three_steps"]()


def test_render_writes_tables_and_chart(tmp_path):
    path = tmp_path / "machine.json"
    _made_up().save(path)
    report.main(["--render", str(path)])
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".svg", ".png"}
    assert "made-up processor" in (tmp_path / "machine.svg").read_text()


def test_resume_measures_only_what_is_missing(tmp_path, monkeypatch):
    measured = []

    def fake(case, seconds):
        measured.append(case.id)
        return {name: [1.0] * 5 for name in case.names}

    monkeypatch.setattr(Case, "measure", fake)
    monkeypatch.setattr(report, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(memory, "measure_peaks", dict)
    monkeypatch.setattr(memory, "measure_weight_state", dict)
    path = tmp_path / "machine.json"
    report.measure(report.parse(["--quick", "--only", "linear forward"]), path)
    first = list(measured)
    report.measure(report.parse(["--quick", "--only", "linear", "--resume"]), path)
    assert first and all("linear forward" in name for name in first)
    assert len(measured) == len(set(measured)) > len(first)
    assert set(Results.load(path).measurements) == set(measured)


def test_peak_counts_what_a_call_takes():
    size = 64 * 2**20
    peak = memory.peak_of(lambda: torch.ones(size // 4))
    assert 0.9 * size <= peak <= 1.5 * size


def test_machine_file_name_is_plain():
    stem = file_stem(describe_machine())
    assert stem and all(part.isalnum() for part in stem.split("-"))


def _made_up() -> Results:
    machine = describe_machine() | {"processor": "made-up processor"}
    results = Results(machine)
    for density in DENSITIES:
        case = Case("conv3x3 forward", "1x1->1 1x1", density, 1, (), dict)
        results.measurements[case.id] = Measurement(
            case.op,
            case.shape,
            density,
            1,
            {
                "dense_nchw": [1.0] * 3,
                "dense_channels_last": [2.0] * 3,
                "ours_nchw": [0.25] * 3,
                "ours_channels_last": [0.5] * 3,
                "ours_batch_last": [0.1] * 3,
            },
        )
    return results


def _assert_close(result: torch.Tensor, reference: torch.Tensor, terms: int) -> None:
    """Two sums of at most ``terms`` products whose size is that of the result, added up in different orders."""
    scale = max(float(reference.detach().abs().max()), 1.0)
    torch.testing.assert_close(result, reference, rtol=0, atol=terms * torch.finfo(result.dtype).eps * scale)
