"""Pictures of a run: curves, live parameters, density by layer, the network's graph, the kernels that emerged."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import LogLocator

from ilnas.checkpoint import RunFolder, network_from_state
from ilnas.structure import Part, is_identity, output_part
from ilnas.template import Network, masked_layers
from ilnas_kernels import MaskedConv2d

Log = list[dict[str, Any]]
PLAIN_BOX = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
CURVE = 0.42  # how much an edge past other boxes bends
EXPANSION = {"color": "0.75", "linewidth": 0.8, "zorder": 0}


def draw_run(run: RunFolder, folder: Path) -> list[Path]:
    """Draw everything that the run holds so far; returns the files."""
    log = run.read_log()
    network = network_from_state(run.load()["network"])
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "curves": curves(log),
        "live": live_parameters_drawn(log),
        "density": density_by_layer(log),
        "graph": graph(network),
        "kernels": kernels(network),
    }
    paths = []
    for name, figure in pictures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        paths.append(path)
    return paths


def curves(log: Log) -> Figure:
    """Loss and accuracy by epoch; grey lines are expansions."""
    epochs = [entry for entry in log if entry["event"] == "epoch"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    x = [entry["epoch"] for entry in epochs]
    loss.plot(x, [entry["loss"] for entry in epochs], label="training")
    accuracy.plot(x, [100 * entry["train_accuracy"] for entry in epochs], label="training")
    seen = [entry for entry in epochs if "validation_loss" in entry]
    if seen:
        x = [entry["epoch"] for entry in seen]
        loss.plot(x, [entry["validation_loss"] for entry in seen], label="validation")
        accuracy.plot(x, [100 * entry["validation_accuracy"] for entry in seen], label="validation")
    _plain_log_scale(loss)
    for axes, name in ((loss, "cross-entropy"), (accuracy, "accuracy (%)")):
        _mark_expansions(axes, log)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.legend()
    return figure


def live_parameters_drawn(log: Log) -> Figure:
    """Live parameters over the epochs against the budget C."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    start = log[0]
    x, y = [0.0], [start["live"]]
    for entry in log:
        if entry["event"] == "expansion":
            x += [entry["epoch"]] * 2
            y += [y[-1], entry["live"]]
    last = max([entry["epoch"] for entry in log if entry["event"] == "epoch"], default=x[-1])
    axes.plot([*x, last], [*y, y[-1]], label="live")
    axes.axhline(start["budget"], color="C3", linestyle="--", label="budget C")
    axes.set_ylim(0, 1.08 * max(start["budget"], *y))
    axes.set_xlabel("epoch")
    axes.set_ylabel("parameters")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="lower right")
    return figure


def density_by_layer(log: Log) -> Figure:
    """The share of each layer's positions that is live, over the epochs."""
    entries = [(0, log[0])] + [(entry["epoch"], entry) for entry in log if entry["event"] == "epoch"]
    names = list(entries[-1][1]["layers"])
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"](torch.linspace(0, 0.95, len(names)).tolist())
    for name, colour in zip(names, colours, strict=True):
        seen = [(epoch, entry["layers"][name]) for epoch, entry in entries if name in entry["layers"]]
        axes.plot(
            [e for e, _ in seen], [100 * live / size for _, (live, size) in seen], color=colour, label=_short(name)
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("density (%)")
    _plain_log_scale(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    return figure


def graph(network: Network) -> Figure:
    """Groups of nodes from input to output; a line's width says how many live weights join two groups."""
    structure = network.structure
    order = list(structure.node_offsets())
    place = {part: i for i, part in enumerate(order)}
    edges = part_edges(network)
    most = max(edges.values(), default=1)
    arcs: dict[tuple[Part, Part], float] = {}  # how high above the boxes an edge passes
    for source, target in edges:
        distance = place[target] - place[source]
        if distance > 0:
            side = -1 if place[source] % 2 == 0 else 1
            arcs[source, target] = side * CURVE * (distance - 0.6) / 2 if distance > 1 else 0.0
    top, bottom = max([0.25, *arcs.values()]) + 0.15, min([-0.25, *arcs.values()]) - 0.15
    figure = Figure(figsize=(1.5 * len(order), 1.5 * (top - bottom) + 0.3), layout="constrained")
    axes = figure.subplots()
    for (source, target), height in sorted(arcs.items(), key=lambda item: edges[item[0]]):
        live = edges[source, target]
        bend = 0.0 if height == 0 else -CURVE if height > 0 else CURVE
        axes.add_patch(
            FancyArrowPatch(
                (place[source] + 0.3, 0), (place[target] - 0.3, 0), connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-", linewidth=0.4 + 7 * (live / most) ** 0.5, color="C0", alpha=0.35, zorder=1,
                capstyle="round",
            )
        )  # fmt: skip
        middle = (place[source] + place[target]) / 2
        axes.text(middle, height, f"{live:,}", ha="center", va="center", fontsize=7, zorder=3, bbox=PLAIN_BOX)
    for part in order:
        axes.add_patch(
            FancyBboxPatch(
                (place[part] - 0.24, -0.16), 0.48, 0.32, boxstyle="round,pad=0.05", zorder=2, facecolor="white",
                edgecolor="C0",
            )
        )  # fmt: skip
        label = _part_label(network, part, edges.get((part, part), 0))
        axes.text(place[part], 0, label, ha="center", va="center", fontsize=7, zorder=3)
    axes.set(xlim=(-0.5, len(order) - 0.5), ylim=(bottom, top), aspect="equal")
    axes.set_axis_off()
    axes.set_title("live weights between groups of nodes", fontsize=9)
    return figure


def part_edges(network: Network) -> dict[tuple[tuple, tuple], int]:
    """Live weights between each two groups of nodes (keys of Structure.node_offsets)."""
    structure = network.structure
    edges: dict[tuple[tuple, tuple], int] = {}
    for name, layer in masked_layers(network):
        offsets, target = structure.node_offsets(), output_part(name)
        channels = layer.pattern.col.long() // layer.pattern.taps
        start = 0
        for part in structure.input_parts(name):
            stop = start + offsets[part][1] * structure.cells(name)
            live = int(((channels >= start) & (channels < stop)).sum())
            if live:
                edges[part, target] = edges.get((part, target), 0) + live
            start = stop
    return edges


def kernels(network: Network, shown: int = 10) -> Figure:
    """For each conv layer how often each tap is live (left), and its most frequent kernel shapes with their counts."""
    layers = [(name, layer) for name, layer in masked_layers(network) if isinstance(layer, MaskedConv2d)]
    figure = Figure(figsize=(1.0 * (shown + 2.6), 1.12 * len(layers) + 0.3), layout="constrained")
    grid = figure.subplots(len(layers), shown + 1, squeeze=False)
    for row, (name, layer) in zip(grid, layers, strict=True):
        size = layer.pattern.shape[2]
        shapes, counts = kernel_shapes(layer)
        taps = torch.bincount(layer.pattern.col.long() % layer.pattern.taps, minlength=layer.pattern.taps)
        row[0].imshow(taps.view(size, size).numpy(), cmap="viridis", vmin=0)
        row[0].set_ylabel(_short(name), rotation=0, ha="right", va="center", fontsize=8)
        row[0].set_title("taps", fontsize=7, pad=2)
        for axes, shape, count in zip(row[1:], shapes, counts.tolist(), strict=False):
            axes.imshow(shape.view(size, size).numpy(), cmap="Greys", vmin=0, vmax=1.3)
            axes.set_title(f"{count:,}", fontsize=7, pad=2)
        for axes in row[1 + len(shapes) :]:
            axes.set_visible(False)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    figure.suptitle("live weights by tap, and the most frequent kernel shapes with their counts", fontsize=9)
    return figure


def kernel_shapes(layer: MaskedConv2d, shown: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """The most frequent shapes among kernels with a live tap: (bool [shapes, taps], how often [shapes])."""
    alive = layer.mask.flatten(0, 1).flatten(1)
    shapes, counts = alive[alive.any(1)].unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:shown]
    return shapes[order], counts[order]


def _mark_expansions(axes, log: Log) -> None:
    """Where the network grew; steps that only moved weights are too many to be marked."""
    grown = [entry for entry in log if entry["event"] == "expansion" and entry["live"] != entry["live_before"]]
    for number, entry in enumerate(grown):
        axes.axvline(entry["epoch"], label=None if number else "expansion", **EXPANSION)


def _plain_log_scale(axes) -> None:
    """A logarithmic scale with labels such as 0.5 and 20 instead of powers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")


def _short(name: str) -> str:
    """ "stages.1.blocks.0.identities.2" as "stage 1 layer 0 +3"."""
    kind, *numbers = output_part(name)
    place = f"head {numbers[0]}" if kind == "hidden" else "stage {} layer {}".format(*numbers)
    return f"{place} +{int(name.split('.')[-1]) + 1}" if is_identity(name) else place


def _part_label(network: Network, part: Part, inside: int) -> str:
    """What a box says; inside: live weights of the group's identity layers."""
    structure = network.structure
    nodes = structure.node_offsets()[part][1]
    name = "image" if part[0] == "image" else f"hidden {part[1]}"
    if part[0] == "block":
        name = f"stage {part[1]}\nlayer {part[2]}"
    elif part == ("hidden", len(structure.hidden)):
        name = "classes"
    lines = [name, f"{nodes} {'node' if nodes == 1 else 'nodes'}"]
    if inside:
        layers = structure.blocks()[part].identities
        lines.append(f"+{layers} {'layer' if layers == 1 else 'layers'}: {inside:,}")
    return "\n".join(lines)
