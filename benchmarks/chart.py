"""The chart of the results: speed-up over dense torch against sparsity."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import goals
from .cases import DENSITIES
from .results import Results

OPS = {"conv 3x3": "#1f6fb4", "conv 1x1": "#d1741d", "linear": "#3b8f3b"}
PANELS = {
    "NCHW or channels_last in, the same out": goals.TORCH_LAYOUTS,
    "batch-last in, batch-last out": ("ours_batch_last",),
}


def draw(results: Results, stem: Path) -> None:
    """Write ``stem``.svg and ``stem``.png."""
    threads = max(m.threads for m in results.measurements.values())
    settings = {"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        for axes, (title, layouts) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
            _panel(axes, results, threads, layouts)
            axes.set_title(title, fontsize=10)
        figure.axes[0].set_ylabel("times as fast as dense torch")
        figure.axes[0].legend(frameon=False, loc="upper left", fontsize=9)
        machine = results.machine
        figure.suptitle(
            f"{machine['processor']}, {threads} thread{'s' if threads > 1 else ''}, {machine['instruction_set']}, "
            f"torch {machine['torch']}, float32",
            fontsize=10,
        )
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=150)


def _panel(axes: Axes, results: Results, threads: int, layouts: tuple[str, ...]) -> None:
    for goal in goals.SPARSE:
        kind = next(kind for kind in OPS if goal.title.startswith(kind))
        if goal.baselines == ("dense_mkl",) and layouts == goals.TORCH_LAYOUTS:  # linear knows no other layout
            ours, baselines = goal.ours, goal.baselines  # nn.Linear's
        elif goal.baselines == goals.TORCH_CONV:
            ours, baselines = layouts, goal.baselines
        else:
            continue
        ratios = {d: results.speedup(goal.op, d, threads, ours, baselines) for d in DENSITIES}
        points = [(1 / density, ratio) for density, ratio in ratios.items() if ratio is not None]
        if points:
            style = "--" if "backward" in goal.op else "-"
            axes.plot(*zip(*points, strict=True), style, color=OPS[kind], marker="o", markersize=4, label=goal.op)
    axes.axhline(1, color="black", linewidth=1)
    axes.annotate("as fast as dense", (100, 1), xytext=(0, -4), textcoords="offset points", ha="right", va="top",
                  fontsize=9)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_xticks([1 / d for d in DENSITIES], ["" if d == 0.6 else f"{100 * (1 - d):.0f}" for d in DENSITIES])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("absent weights, %")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
