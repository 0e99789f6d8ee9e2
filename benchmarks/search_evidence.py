"""ILNAS against its rivals on Fashion-MNIST: runs them, keeps results as JSON, writes the tables of docs/evidence.md.

    python -m benchmarks.search_evidence --data DIR                     everything: several hours on one core
    python -m benchmarks.search_evidence --data DIR --scale small       one scale
    python -m benchmarks.search_evidence --tables                       only write the tables anew

All runs of a scale share template, images, batches, epochs and learning rate schedule, and differ in the options named
here alone. A run that the JSON file holds is not repeated, so the script can be stopped and started at will, and two of
them may share the work (``--only``).
"""

import argparse
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence_tables import write_tables
from benchmarks.machine import describe_machine
from ilnas.allocator import reuse_memory
from ilnas.cli import dataset_of
from ilnas.config import make_config
from ilnas.trainer import Trainer

Options = dict[str, Any]

COMMON: Options = {"dataset": "fashion-mnist", "image_size": 14, "train_images": 20_000, "crop": 0, "test_every": 1000}
# Half of the 60,000 images validate here: what is chosen at this scale must not hang on chance.
SMALL: Options = COMMON | {"widths": "16,32/48,64", "budget": 8_000, "epochs": 8, "validation": 0.5}
SCALES: dict[str, Options] = {
    "main": COMMON | {"widths": "24,32/192,256", "budget": 100_000, "epochs": 6},
    "sparse": COMMON | {"widths": "16,32/192,256", "budget": 8_000, "epochs": 8},
    "small": SMALL,
    "long": SMALL | {"epochs": 48},
}
RIVALS: dict[str, Options] = {
    "ILNAS": {},
    "random growth": {"method": "random"},
    "static random sparse": {"method": "static"},
    "SET": {"method": "set", "move": 0.3},
    "RigL": {"method": "rigl", "move": 0.3},
    "dense, then pruned": {"method": "prune", "growth_start": 0.25, "interval": 0.25},
    "narrow dense": {"method": "dense"},
    "the paper's preset": {"preset": "paper"},
    "the paper's preset, connections only": {"preset": "paper", "nodes": 0, "layers": 0, "granularity": "weight"},
}
EQUAL_MACS = "ILNAS, at most the MACs of static"
RIVAL_OF_EQUAL_MACS = "static random sparse"
ABLATIONS: dict[str, Options] = {
    "A_lr 0.03": {"alr": 0.03},
    "A_lr 0.05": {"alr": 0.05},
    "A_lr 0.3": {"alr": 0.3},
    "no hyper-step": {"hyper_step": False},
    "kernels": {"granularity": "kernel"},
    "mixed": {"granularity": "mixed"},
    "top instead of sampled": {"selection": "top"},
    "nothing moved": {"move": 0.0},
    "nodes and layers": {"nodes": 2, "layers": 1},
    "n/m 2": {"candidates": 2.0},
    "n/m 16": {"candidates": 16.0},
}
NAMES = {
    "main": [*RIVALS, EQUAL_MACS, "A_lr 0.03", "A_lr 0.05", "A_lr 0.3", "no hyper-step", "kernels", "mixed"],
    # A tenth of this budget is too little to connect the template: the paper's preset cannot begin.
    "sparse": [*(name for name in RIVALS if "preset" not in name), EQUAL_MACS],
    "small": [*RIVALS, EQUAL_MACS, *ABLATIONS],
    "long": ["ILNAS", "random growth", "static random sparse", "RigL", "the paper's preset, connections only"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Fashion-MNIST's original files")
    parser.add_argument("--scale", choices=SCALES, nargs="*", default=list(SCALES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", help="names of runs, as in the tables; default: all of the scale")
    parser.add_argument("--results", type=Path, default=Path("docs/evidence.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables of what is there")
    given = parser.parse_args()
    if not given.tables:
        if not given.data:
            parser.error("--data DIR is needed to run anything")
        torch.set_num_threads(given.threads)
        reuse_memory()
        for scale in given.scale:
            for seed in given.seeds:
                for name in given.only or NAMES[scale]:
                    run_once(given.results, scale, name, seed, given.data)
    write_tables(given.page, read(given.results), NAMES)


def run_once(path: Path, scale: str, name: str, seed: int, data: str) -> None:
    """One run, unless it has been made already."""
    runs = read(path)
    if key(scale, name, seed) in runs:
        return
    options = options_of(runs, scale, name, seed) | {"seed": seed}
    same = [run["result"] for run in runs.values() if run["options"] == options]
    if same:
        result = same[0]
    else:
        config = make_config(options, {"data": data})
        result = vars(Trainer(config, dataset_of(config)).train())
    keep(path, key(scale, name, seed), options, result)
    print(f"{key(scale, name, seed)}: {100 * result['test_accuracy']:.2f} %, {result['seconds']:.0f} s", flush=True)


def options_of(runs: dict[str, Any], scale: str, name: str, seed: int) -> Options:
    """What a run is given. The run at equal multiply-accumulates gets as many whole epochs as its rival's would pay."""
    if name != EQUAL_MACS:
        return (RIVALS | ABLATIONS)[name] | SCALES[scale]
    ours, rival = (runs[key(scale, n, seed)]["result"]["training_macs"] for n in ("ILNAS", RIVAL_OF_EQUAL_MACS))
    return SCALES[scale] | {"epochs": int(SCALES[scale]["epochs"] * rival / ours)}


def key(scale: str, name: str, seed: int) -> str:
    return f"{scale}/{name}/{seed}"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def keep(path: Path, name: str, options: Options, result: dict[str, Any]) -> None:
    """Add one run to the file, which another process may be adding to as well; one line a run."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        runs = read(path) | {name: {"options": options, "result": result, "machine": describe_machine()}}
        partial = path.with_suffix(".partial")
        partial.write_text(
            "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(runs[k])}" for k in sorted(runs)) + "\n}\n"
        )
        os.replace(partial, path)
    finally:
        os.close(folder)


if __name__ == "__main__":
    main()
