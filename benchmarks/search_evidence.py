"""ILNAS against its rivals on one template: runs, keeps results as JSON, and writes the table of docs/evidence.md.

    python -m benchmarks.search_evidence --data DIR                    minutes a run on two cores
    python -m benchmarks.search_evidence --data DIR --scale full       Fashion-MNIST whole, budget 100k: hours

Every run has the same template, epochs, batches and learning rate schedule and differs only in the options named.
Results that the JSON file holds already are not run again, so the script can be stopped and started at will.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from ilnas.cli import dataset_of, reuse_memory
from ilnas.config import make_config
from ilnas.trainer import Trainer

SCALES: dict[str, dict[str, Any]] = {
    "small": {
        "image_size": 14, "train_images": 8_000, "widths": "12,24/32,64", "budget": 8_000, "epochs": 5, "crop": 0,
        "test_every": 100,
    },
    "full": {"widths": "32,32/64,64/128,128", "budget": 100_000, "epochs": 60, "test_every": 100},
}  # fmt: skip
PAPER = {"preset": "paper", "nodes": 0, "layers": 0, "granularity": "weight"}
RIVALS: dict[str, dict[str, Any]] = {
    "ILNAS (default)": {},
    "random growth": {"method": "random"},
    "static random sparse": {"method": "static"},
    "SET, 30 % moved": {"method": "set", "move": 0.3, "growth_end": 0.75},
    "RigL, 30 % moved": {"method": "rigl", "move": 0.3, "growth_end": 0.75},
    "dense, then pruned": {"method": "prune", "growth_start": 0.25, "growth_end": 0.75, "interval": 0.25},
    "narrow dense": {"method": "dense"},
    "paper's setting, connections only": PAPER,
    "paper's setting, nodes and layers": {**PAPER, "nodes": 2, "layers": 1},
    "no hyper-step": {"hyper_step": False},
    "kernels": {"granularity": "kernel"},
    "mixed": {"granularity": "mixed"},
    "nodes and layers": {"nodes": 2, "layers": 1},
    "A_lr 0.03": {"alr": 0.03},
    "A_lr 0.05": {"alr": 0.05},
    "A_lr 0.3": {"alr": 0.3},
    "top instead of sampled": {"selection": "top"},
    "nothing moved": {"move": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST's original files")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(RIVALS), help="names of rivals, as in the table")
    parser.add_argument("--results", type=Path, default=Path("docs/evidence.json"))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    reuse_memory()
    results = json.loads(given.results.read_text()) if given.results.is_file() else {}
    for seed in range(given.seeds):
        for name in given.only:
            key = f"{given.scale}/{name}/{seed}"
            if key not in results:
                results[key] = one_run(SCALES[given.scale] | RIVALS[name], seed, given.data)
                given.results.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{key}: {100 * results[key]['test_accuracy']:.2f} %", flush=True)
    print(table(results, given.scale))


def one_run(options: dict[str, Any], seed: int, data: str) -> dict[str, Any]:
    config = make_config({"dataset": "fashion-mnist", "data": data, "seed": seed}, options)
    return vars(Trainer(config, dataset_of(config)).train())


def table(results: dict[str, dict[str, Any]], scale: str) -> str:
    """Mean and standard deviation over the seeds, as Markdown, best mean first."""
    rows = []
    for name in RIVALS:
        found = [result for key, result in results.items() if key.rsplit("/", 1)[0] == f"{scale}/{name}"]
        if found:
            accuracy = [100 * result["test_accuracy"] for result in found]
            spread = f"{statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else "-"
            macs = statistics.mean(result["training_macs"] for result in found)
            live = round(statistics.mean(result["live"] for result in found))
            rows.append((statistics.mean(accuracy), name, spread, len(found), live, macs))
    lines = [
        "| method | test accuracy, % | standard deviation | seeds | live | training MACs, forward |",
        "|---|---|---|---|---|---|",
    ]
    for mean, name, spread, seeds, live, macs in sorted(rows, reverse=True):
        lines.append(f"| {name} | {mean:.2f} | {spread} | {seeds} | {live:,} | {macs:.2e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
