"""The tables of docs/evidence.md: mean and standard deviation over the seeds."""

import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Run = dict[str, dict[str, Any]]

COLUMNS = [
    "method", "test accuracy, %", "validation accuracy, %", "seeds", "epochs", "live", "10^6 MACs an image",
    "10^9 training MACs",
]  # fmt: skip


def write_tables(page: Path, runs: dict[str, Run], names: dict[str, list[str]]) -> None:
    """Replace what stands between ``<!-- table SCALE -->`` and ``<!-- end -->`` on the page by that scale's table."""
    text = page.read_text()
    for scale, rows in names.items():
        before, marker, rest = text.partition(f"<!-- table {scale} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = before + marker + table(runs, scale, rows) + end + after
    page.write_text(text)


def table(runs: dict[str, Run], scale: str, names: list[str]) -> str:
    """One row a name that has runs, best mean test accuracy first."""
    rows = []
    for name in names:
        found = [run for key, run in runs.items() if re.fullmatch(re.escape(f"{scale}/{name}/") + r"\d+", key)]
        if found:
            rows.append((mean(run["result"]["test_accuracy"] for run in found), row(name, found)))
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    return head + "".join(line for _, line in sorted(rows, reverse=True))


def row(name: str, found: list[Run]) -> str:
    def average(column: str) -> float:
        return mean(run["result"][column] for run in found)

    epochs = "-".join(str(count) for count in sorted({run["options"]["epochs"] for run in found}))
    cells = [
        name, percent(found, "test_accuracy"), percent(found, "validation_accuracy"), len(found), epochs,
        f"{average('live'):,.0f}", f"{average('macs') / 1e6:.2f}", f"{average('training_macs') / 1e9:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def percent(found: list[Run], column: str) -> str:
    values = [100 * run["result"][column] for run in found]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"
