"""``python -m benchmarks.report``: measure, then write the tables and the chart.

Leaves in the folder of results, named after the machine: NAME.json with every time, NAME.md with the tables of ratios
against the goals, NAME.svg and NAME.png with the chart.
"""

import argparse
import os
import re
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ilnas_kernels import instruction_set

from . import (
    bench_absent_topk,
    bench_expansion,
    bench_masked_conv2d,
    bench_masked_linear,
    bench_search_network,
    bench_sparseprop,
    bench_thread_scaling,
    bench_training_step,
    chart,
    memory,
    tables,
)
from .cases import SECONDS_A_CASE, Case, is_quick
from .machine import describe_machine, file_stem
from .results import Results
from .timing import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
MODULES = (
    bench_masked_conv2d,
    bench_masked_linear,
    bench_absent_topk,
    bench_sparseprop,
    bench_thread_scaling,
    bench_training_step,
    bench_search_network,
    bench_expansion,
)


def all_cases() -> list[Case]:
    return [case for module in MODULES for case in module.cases()]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument(
        "--only", type=re.compile, default="", metavar="REGEX", help="measure only cases so named (and 'memory')"
    )
    parser.add_argument(
        "--instruction-set", choices=("avx512", "avx2"), default="", help="let oneDNN, MKL and ours go no further"
    )
    parser.add_argument("--quick", action="store_true", help="the largest thread count and four densities")
    parser.add_argument("--resume", action="store_true", help="keep what this machine's file holds, measure the rest")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop after this long; --resume goes on")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing: tables and chart of this file")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, path: Path) -> Results:
    """Measure every chosen case; the file at ``path`` is written after each."""
    results = Results.load(path) if options.resume and path.exists() else Results({})
    results.machine = describe_machine()
    keep_freed_memory()
    chosen = [c for c in all_cases() if re.search(options.only, c.id) and (not options.quick or is_quick(c))]
    missing = [c for c in chosen if not (options.resume and c.id in results.measurements)]
    begin = time.monotonic()
    for number, case in enumerate(missing, 1):
        if options.limit is not None and time.monotonic() - begin > options.limit:
            print(f"stopped at the limit with {len(missing) - number + 1} cases to go", file=sys.stderr)
            return results
        print(f"{number}/{len(missing)} {case.id}", file=sys.stderr)
        results.add(case, case.measure(SECONDS_A_CASE))
        results.save(path)
    if not results.memory and re.search(options.only, "memory") and not options.quick and sys.platform == "linux":
        results.memory = {"weight state": memory.measure_weight_state(), "peaks": memory.measure_peaks()}
        results.save(path)
    return results


def write(results: Results, stem: Path) -> None:
    stem.with_suffix(".md").write_text(tables.render(results))
    chart.draw(results, stem)


def main(arguments: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.list:
        print("\n".join(case.id for case in all_cases()))
        return
    warnings.filterwarnings("ignore", "Sparse CSR tensor support")
    if options.render:
        write(Results.load(options.render), options.render.with_suffix(""))
        return
    with limited_to(options.instruction_set):
        stem = options.output / file_stem(describe_machine())
        write(measure(options, stem.with_suffix(".json")), stem)
    print(stem.with_suffix(".md"))


def limited_to(name: str) -> AbstractContextManager:
    """The process as it would be on a processor with this instruction set; "" for the one at hand."""
    if not name:
        return nullcontext()
    # Read when the libraries compute for the first time.
    os.environ["ONEDNN_MAX_CPU_ISA"] = {"avx512": "AVX512_CORE", "avx2": "AVX2"}[name]
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = name.upper()
    return instruction_set(name)


if __name__ == "__main__":
    main()
