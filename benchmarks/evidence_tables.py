"""The tables of docs/evidence.md: mean and standard deviation over the seeds."""

import re
import statistics
from pathlib import Path
from typing import Any


def write_tables(page: Path, results: dict[str, Any], names: dict[str, list[str]]) -> None:
    """Replace what stands between ``<!-- table SCALE -->`` and ``<!-- end -->`` on the page by that scale's table."""
    text = page.read_text()
    for scale, rows in names.items():
        marked = re.compile(rf"(<!-- table {scale} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        text = marked.sub(lambda found, rows=rows, scale=scale: found[1] + table(results, scale, rows) + found[2], text)
    page.write_text(text)


def table(results: dict[str, Any], scale: str, names: list[str]) -> str:
    """One row a name, best mean test accuracy first."""
    rows = []
    for name in names:
        found = [run["result"] for key, run in results["runs"].items() if key.rsplit("/", 1)[0] == f"{scale}/{name}"]
        if found:
            epochs = [
                run["options"]["epochs"]
                for key, run in results["runs"].items()
                if key.rsplit("/", 1)[0] == f"{scale}/{name}"
            ]
            rows.append(
                (
                    statistics.mean(result["test_accuracy"] for result in found),
                    f"| {name} | {percent(found, 'test_accuracy')} | {percent(found, 'validation_accuracy')} "
                    f"| {len(found)} | {'-'.join(str(e) for e in sorted(set(epochs)))} "
                    f"| {round(statistics.mean(result['live'] for result in found)):,} "
                    f"| {statistics.mean(result['macs'] for result in found) / 1e6:.2f} "
                    f"| {statistics.mean(result['training_macs'] for result in found) / 1e12:.3f} |",
                )
            )
    head = [
        "| method | test accuracy, % | validation accuracy, % | seeds | epochs | live | 10^6 MACs an image "
        "| 10^12 MACs of training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row for _, row in sorted(rows, reverse=True))]) + "\n"


def percent(found: list[dict[str, Any]], name: str) -> str:
    values = [100 * result[name] for result in found]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
