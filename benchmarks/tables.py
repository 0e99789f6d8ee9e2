"""The Markdown tables of a machine's results."""

from collections.abc import Iterable
from statistics import median

from . import goals
from .bench_sparseprop import RIVALS as SPARSEPROP
from .cases import DENSITIES, SPARSE_DENSITIES
from .memory import DENSITY, LARGE
from .results import Measurement, Results

LIKE = (  # our layer in a layout against torch's in the same, where the dense route may be taken
    ("", "ours_nchw", "dense_nchw"),
    ("", "ours_channels_last", "dense_channels_last"),
    (", against nn.Linear", "ours", "dense_mkl"),
    (", against oneDNN", "ours", "dense_onednn"),
)


def render(results: Results) -> str:
    """All tables, with the machine and how to read them."""
    machine = results.machine
    threads = sorted({m.threads for m in results.measurements.values()})
    parts = [
        f"# Measured on {machine['processor']}, {machine['cores']} cores\n",
        f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}, instruction set "
        f"{machine['instruction_set']}, {machine['date']}. `python -m benchmarks.report` makes this file.\n",
        "Figures are speed-ups: the time of the baseline, with the masked weight ready, over ours; float32. Contenders "
        "took turns in one process, and a figure is the median over the rounds of the ratio within a round, then the "
        "geometric mean over the shapes. The baseline is the faster of torch's NCHW and channels_last. The C allocator "
        "kept freed memory. Convolution and linear weights are stored packed up to density 0.5. Goals are this "
        "project's own, in `benchmarks/goals.py`.\n",
    ]
    for count in threads:
        parts.append(f"## Speed-up over dense torch, {count} thread{'s' if count > 1 else ''}\n")
        parts.append("Measured / goal; **bold** where the goal is reached.\n")
        parts.append(table(["", *map(_sparsity, SPARSE_DENSITIES)], goal_rows(results, count)))
    parts += ["## Against SparseProp\n", sparseprop_text(), table(["", *map(_sparsity, SPARSE_DENSITIES)],
              sparseprop_rows(results))]  # fmt: skip
    parts += ["## Never slower than dense\n", never_slower_text(), table(["", "density", "threads", "worst ratio",
              "at"], never_slower_rows(results))]  # fmt: skip
    parts += ["## absent_topk, k = 1 %\n", topk_text(), table(["", "threads", "density", "over the gradient alone",
              "over the four steps"], topk_rows(results))]  # fmt: skip
    parts += ["## One training step\n", step_text(), table(["network", "threads", "density", "NCHW", "channels_last",
              "batch-last", "dense, ms"], step_rows(results))]  # fmt: skip
    parts += ["## One expansion of the search\n", expansion_text(), table(["template", "threads", "step, ms",
              "dense gradients, ms", "expansion, ms", "steps"], expansion_rows(results))]  # fmt: skip
    parts += ["## Two threads over one\n", f"Goal: {goals.TWO_THREADS}.\n", table(["", "density", "dense", "NCHW",
              "batch-last"], scaling_rows(results))]  # fmt: skip
    parts += memory_parts(results)
    parts += ["## Every shape\n", "Speed-up of each layout of ours (NCHW, channels_last, batch-last; linear has one), "
              "and the dense baseline's median time.\n", table(["", "shape", "threads", "dense, ms",
              *map(_sparsity, DENSITIES)], shape_rows(results))]  # fmt: skip
    return "\n".join(parts)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; a remark where there are no rows."""
    rows = list(rows)
    if not rows:
        return "Not measured.\n"
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def goal_rows(results: Results, threads: int) -> Iterable[list[str]]:
    for goal in goals.SPARSE:
        cells = []
        for density in SPARSE_DENSITIES:
            ratio = results.speedup(goal.op, density, threads, goal.ours, goal.baselines)
            cells.append(_against(ratio, goal.ratio(density)))
        yield [goal.title, *cells]
        if goal.baselines == goals.TORCH_CONV:
            batch_last = [
                results.speedup(goal.op, density, threads, ("ours_batch_last",), goal.baselines)
                for density in SPARSE_DENSITIES
            ]
            yield ["&nbsp; the same, batch-last", *map(_figure, batch_last)]


def sparseprop_text() -> str:
    return (
        "The time of the faster of SparseProp's two ways over ours, NCHW in and out, one thread; measured where its "
        "package is installed.\n"
    )


def sparseprop_rows(results: Results) -> Iterable[list[str]]:
    ops = dict.fromkeys(m.op for m in results.measurements.values() if m.op.startswith("sparseprop"))
    for op in ops:
        ratios = [results.speedup(op, d, 1, ("ours_nchw",), SPARSEPROP) for d in SPARSE_DENSITIES]
        yield [op.removeprefix("sparseprop "), *map(_against, ratios, goals.SPARSEPROP[op.split()[-1]])]


def never_slower_text() -> str:
    return (
        f"Goal: at least {goals.NEVER_SLOWER_THAN}. Here each layout of ours is compared with torch in the same "
        "layout, and linear with nn.Linear, which calls MKL, and with oneDNN's linear. The layer keeps its weight "
        "dense, as it does by default. The worst shape and layout:\n"
    )


def never_slower_rows(results: Results) -> Iterable[list[str]]:
    for op in dict.fromkeys(goal.op for goal in goals.SPARSE):
        for density in (d for d in DENSITIES if d not in SPARSE_DENSITIES):
            for threads in (1, 2):
                worst: dict[str, tuple[float, str]] = {}
                for m in results.select(op, density, threads):
                    for against, name, baseline in LIKE:
                        if name in m.seconds:
                            found = m.speedup((name,), (baseline,)), f"{m.shape} {name}"
                            worst[against] = min(worst.get(against, found), found)
                for against, (ratio, where) in worst.items():
                    yield [op + against, f"{density:g}", str(threads), _bold(ratio, goals.NEVER_SLOWER_THAN), where]


def topk_text() -> str:
    (gradient, steps), (conv_gradient, conv_steps) = goals.ABSENT_TOPK["linear"], goals.ABSENT_TOPK["conv"]
    return (
        "The gradient alone is torch's dense weight gradient; the four steps are gradient, abs, mask, torch.topk. "
        f"Goals: linear {gradient:g} and {steps:g}, convolution {conv_gradient:.2f} and {conv_steps:g}.\n"
    )


def topk_rows(results: Results) -> Iterable[list[str]]:
    ops = dict.fromkeys(m.op for m in results.measurements.values() if m.op.startswith("absent_topk"))
    for op in ops:
        gradient_goal, steps_goal = goals.ABSENT_TOPK["linear" if op.endswith("linear") else "conv"]
        for threads in (1, 2):
            for density in DENSITIES:
                chosen = results.select(op, density, threads)
                if not chosen:
                    continue
                names = list(chosen[0].seconds)
                ours, gradient, steps = (
                    tuple(name for name in names if name.startswith(prefix))
                    for prefix in ("ours", "dense_gradient", "four_steps")
                )
                yield [
                    op.removeprefix("absent_topk "),
                    str(threads),
                    f"{density:g}",
                    _against(results.speedup(op, density, threads, ours, gradient), gradient_goal),
                    _against(results.speedup(op, density, threads, ours, steps), steps_goal),
                ]


def step_text() -> str:
    return (
        "Forward, loss, backward and SGD with momentum; batch of 64 images of 32x32, brought into the layout within "
        "the step. Dense is the faster of NCHW and channels_last.\n"
    )


def step_rows(results: Results) -> Iterable[list[str]]:
    for m in results.measurements.values():
        if m.op.startswith("training step"):
            goal = goals.TRAINING_STEP.get(m.op, {}).get(m.density)
            cells = [
                _figure(m.speedup((name,), goals.TORCH_CONV)) if name in m.seconds else ""
                for name in ("ours_nchw", "ours_channels_last")
            ]
            cells.append(_against(m.speedup(("ours_batch_last",), goals.TORCH_CONV), goal))
            name = m.op.removeprefix("training step ")
            yield [name, str(m.threads), f"{m.density:g}", *cells, _milliseconds(m, goals.TORCH_CONV)]


def expansion_text() -> str:
    return (
        "Steps: by how many training steps an expansion takes longer than torch's dense gradients of all conv and "
        f"linear weights on one scoring batch. Goal: at most {goals.EXPANSION_STEPS}.\n"
    )


def expansion_rows(results: Results) -> Iterable[list[str]]:
    for m in results.measurements.values():
        if m.op == "expansion":
            columns = [m.seconds[name] for name in ("three_steps", "dense_gradients", "ours_expansion")]
            steps = median(3 * (ours - dense) / three for three, dense, ours in zip(*columns, strict=True))
            three, dense, ours = (median(column) * 1e3 for column in columns)
            cell = f"**{steps:.2f}**" if steps <= goals.EXPANSION_STEPS else f"{steps:.2f}"
            yield [m.shape, str(m.threads), f"{three / 3:.3g}", f"{dense:.3g}", f"{ours:.3g}", cell]


def scaling_rows(results: Results) -> Iterable[list[str]]:
    ops = dict.fromkeys(m.op for m in results.measurements.values() if m.op.startswith("two threads"))
    for op in ops:
        for density in DENSITIES:
            if results.select(op, density, 2):
                ratios = [
                    results.speedup(op, density, 2, (f"{way}_2_threads",), (f"{way}_1_threads",))
                    for way in ("dense_nchw", "ours_nchw", "ours_batch_last")
                ]
                dense, *ours = ratios
                yield [
                    op.removeprefix("two threads "),
                    f"{density:g}",
                    _figure(dense),
                    *(_bold(ratio, goals.TWO_THREADS) for ratio in ours),
                ]


def memory_parts(results: Results) -> list[str]:
    if not results.memory:
        return ["## Memory\n", "Not measured.\n"]
    state, peaks = results.memory["weight state"], results.memory["peaks"]
    dense = _state(state["dense"])
    rows = []
    for name, entry in state.items():
        density = float(name.removeprefix("density ")) if name != "dense" else 1.0
        share = _state(entry) / (density * dense)
        limit = "" if name == "dense" else f"{share:.2f}"
        rows.append([name, *(f"{entry[key] / 2**20:.2f}" for key in ("weights", "gradients", "momentum")), limit,
                     f"{entry['plan'] / 2**20:.2f}"])  # fmt: skip
    batch, in_channels, out_channels, size, kernel = LARGE
    k = round(0.01 * in_channels * out_channels * kernel**2)
    each, besides = goals.ABSENT_TOPK_BYTES
    return [
        "## Memory\n",
        f"ResNet-18's convolution and linear weights in MiB; goal: at most {goals.WEIGHT_STATE} of density x dense, "
        "plans apart.\n",
        table(["", "weights", "gradients", "momentum", "of density x dense", "plan"], rows),
        "Peak resident memory of one call above its inputs, output included, in MiB, a fresh process each; the layer "
        f"of absent_topk has {in_channels * out_channels * kernel**2 / 1e6:.1f} million weights and density {DENSITY}; "
        f"its goal is {each} B x k + {besides / 2**20:g} MiB = {(each * k + besides) / 2**20:.1f} MiB.\n",
        table(
            ["", "contender", "peak"],
            [[op, name, f"{peak / 2**20:.1f}"] for op, named in peaks.items() for name, peak in named.items()],
        ),
    ]


def shape_rows(results: Results) -> Iterable[list[str]]:
    for op in dict.fromkeys(goal.op for goal in goals.SPARSE):
        for threads in (1, 2):
            of_op = [m for m in results.measurements.values() if (m.op, m.threads) == (op, threads)]
            for shape in dict.fromkeys(m.shape for m in of_op):
                by_density = {m.density: m for m in of_op if m.shape == shape}
                cells = [_layouts(by_density[d]) if d in by_density else "" for d in DENSITIES]
                first = next(iter(by_density.values()))
                yield [op, shape, str(threads), _milliseconds(first, _dense(first)), *cells]


def _layouts(m: Measurement) -> str:
    return " ".join(_figure(m.speedup((name,), _dense(m))) for name in m.seconds if name.startswith("ours"))


def _dense(m: Measurement) -> tuple[str, ...]:
    return tuple(name for name in m.seconds if name.startswith("dense"))


def _milliseconds(m: Measurement, names: tuple[str, ...]) -> str:
    value = min(median(m.seconds[name]) for name in names) * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _state(entry: dict[str, int]) -> int:
    return entry["weights"] + entry["gradients"] + entry["momentum"]


def _sparsity(density: float) -> str:
    return f"{100 * (1 - density):.0f} %"


def _figure(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def _bold(ratio: float, goal: float) -> str:
    return f"**{_figure(ratio)}**" if ratio >= goal else _figure(ratio)


def _against(ratio: float | None, goal: float | None) -> str:
    if ratio is None or goal is None:
        return _figure(ratio)
    return f"{_bold(ratio, goal)} / {goal:.3g}"
