"""The command ``ilnas``: search, eval, plot, export, info."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ilnas.allocator import reuse_memory
from ilnas.checkpoint import RunError, RunFolder, network_from_state
from ilnas.config import CHOICES, Config, make_config, options, read_toml
from ilnas.data import Dataset, load_dataset
from ilnas.trainer import Interrupted, Result, Trainer, evaluate

SEARCH_TEXT = """\
Grow a sparse network from a small random base until it has --budget live parameters, training all the while.

Everything goes into a run folder: config.toml, log.jsonl, checkpoint.pt. Ctrl-C saves a checkpoint first.

examples
  ilnas search                                                     digits, in about a minute
  ilnas search --dataset fashion-mnist --data DIR --budget 100000 --epochs 10 --widths 32,32/64,64/64
  ilnas search --run runs/first --resume                           go on where a run stopped
  ilnas search --method rigl --move 0.3                            a baseline on the same template
  ilnas search --config runs/first/config.toml --seed 1            the same again with another seed
"""

METAVARS = {"data": "DIR", "widths": "LAYERS", "hidden": "LAYERS", "autocast": "TYPE"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0 when it did what was asked, 130 after Ctrl-C, else 1 or 2."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        return given.function(given)
    except (RunError, OSError, ValueError) as error:
        print(f"ilnas: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ilnas: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ilnas", description="Intra-layer neural architecture search: networks that grow weight by weight."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    search = commands.add_parser(
        "search", help="grow a network on a data set", description=SEARCH_TEXT,
        usage="ilnas search [--run DIR] [--resume] [--config FILE] [OPTION ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    search.set_defaults(function=run_search)
    search.add_argument("--run", metavar="DIR", help="run folder; default: the first free runs/DATASET-NUMBER")
    search.add_argument("--resume", action="store_true", help="go on from the checkpoint of --run")
    search.add_argument("--config", metavar="FILE", help="TOML file of options; options given here win over it")
    _add_options(search)
    for name, function, text in (
        ("eval", run_eval, "accuracy of a run's network on the test and validation part"),
        ("plot", run_plot, "draw a run: curves, density by layer, the network's graph, its kernels"),
        ("info", run_info, "layers, live counts, multiply-accumulates, memory, speed against dense"),
        ("export", run_export, "write the network as a plain dense PyTorch module (and ONNX)"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(function=function)
        command.add_argument("run", metavar="RUN", help="run folder")
        if name in ("eval", "info"):
            command.add_argument("--threads", type=int, default=0, help="threads of torch; 0 for torch's choice")
        if name == "eval":
            command.add_argument("--data", default="", help="folder of the original files, if it has moved")
        if name == "plot":
            command.add_argument("--out", metavar="DIR", help="folder for the pictures; default: RUN/plots")
        if name == "export":
            command.add_argument("--out", metavar="DIR", help="folder for the files; default: RUN/export")
            command.add_argument("--onnx", action="store_true", help="also ONNX (needs the onnx extra)")
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    """One argument per option of Config, in its group; unset ones stay out so that a config file can give them."""
    groups: dict[str, Any] = {}
    for option in options():
        group = option.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag = "--" + option.name.replace("_", "-")
        shown = {"": "", False: " (default: off)", True: " (default: on)"}
        default = option.default if option.type in (str, bool) else None
        text = option.metadata["help"] + shown.get(default, f" (default: {option.default})")
        common = {"dest": option.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if option.type is bool:
            groups[group].add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif option.name in CHOICES:
            groups[group].add_argument(flag, choices=CHOICES[option.name], **common)
        else:
            metavar = METAVARS.get(option.name) or {int: "N", float: "X", str: "TEXT"}[option.type]
            groups[group].add_argument(flag, type=option.type, metavar=metavar, **common)


def run_search(given: argparse.Namespace) -> int:
    chosen = {option.name: getattr(given, option.name) for option in options() if hasattr(given, option.name)}
    state = None
    if given.resume:
        run, config, state = _resumed(given, chosen)
    else:
        config = make_config(read_toml(given.config) if given.config else {}, chosen)
    # Before the folder is made: what is missing must not leave an empty run behind.
    dataset = dataset_of(config)
    writer = _summary_writer() if config.tensorboard else None
    if not given.resume:
        run = RunFolder.create(given.run or _free_folder(config.dataset), config)
    set_threads(config.threads)
    reuse_memory()
    with _Display(run, writer) as display:
        trainer = Trainer(config, dataset, run, state=state, progress=display.step, on_event=display.event)
        previous = signal.signal(signal.SIGINT, lambda *_: _stop(trainer))
        try:
            result = trainer.train()
        except Interrupted:
            display.close()
            print(
                f"stopped at step {trainer.step} of {trainer.total_steps}, saved; go on with:\n"
                f"  ilnas search --run {run.path} --resume"
            )
            return 130
        finally:
            signal.signal(signal.SIGINT, previous)
    print(final_line(result, config))
    return 0


def final_line(result: Result, config: Config) -> str:
    return (
        f"test accuracy {100 * result.test_accuracy:.2f} % | live parameters {result.live:,} of at most "
        f"{config.budget:,} | density {100 * result.density:.2f} % | {result.seconds:.1f} s"
    )


def run_eval(given: argparse.Namespace) -> int:
    run = RunFolder.open(given.run)
    config = run.config()
    set_threads(given.threads)
    dataset = dataset_of(config, given.data)
    network = network_from_state(run.load()["network"])
    for name, part in (("validation", dataset.validation), ("test", dataset.test)):
        if len(part):
            loss, accuracy = evaluate(network, part, dataset, config)
            print(f"{name}: accuracy {100 * accuracy:.2f} %, cross-entropy {loss:.4f}, {len(part):,} images")
    return 0


def run_plot(given: argparse.Namespace) -> int:
    from ilnas.plot import draw_run

    run = RunFolder.open(given.run)
    for path in draw_run(run, Path(given.out) if given.out else run.path / "plots"):
        print(path)
    return 0


def run_info(given: argparse.Namespace) -> int:
    from ilnas.report import describe

    run = RunFolder.open(given.run)
    set_threads(given.threads)
    print(describe(network_from_state(run.load()["network"]), run.config()))
    return 0


def run_export(given: argparse.Namespace) -> int:
    from ilnas.export import export_run

    run = RunFolder.open(given.run)
    for line in export_run(run, Path(given.out) if given.out else run.path / "export", onnx=given.onnx):
        print(line)
    return 0


def dataset_of(config: Config, directory: str = "") -> Dataset:
    """The data set that the options name."""
    return load_dataset(
        config.dataset, directory or config.data or None, validation=config.validation,
        train_images=config.train_images, image_size=config.image_size, seed=config.seed,
    )  # fmt: skip


def set_threads(threads: int) -> None:
    if threads > 0:
        torch.set_num_threads(threads)


def _resumed(given: argparse.Namespace, chosen: dict[str, Any]):
    """The run to go on with; only what does not change the result may differ from its start."""
    if not given.run:
        raise RunError("--resume needs --run DIR, the folder of the run to go on with")
    run = RunFolder.open(given.run)
    free = {"threads", "data"}
    config = run.config()
    changed = sorted(name for name in chosen if name not in free and chosen[name] != getattr(config, name))
    if changed:
        raise RunError(f"--resume: {given.run} was started with another --{changed[0].replace('_', '-')}; leave it out")
    config = make_config(config.to_dict(), {name: chosen[name] for name in free & chosen.keys()})
    return run, config, run.load()


def _free_folder(dataset: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{dataset}-{number}").exists():
        number += 1
    return path


def _stop(trainer: Trainer) -> None:
    if trainer.stop_requested:  # asked twice: the user does not want to wait for the checkpoint
        raise KeyboardInterrupt
    trainer.stop_requested = True


def _summary_writer() -> Callable[[Path], Any]:
    """TensorBoard's writer; RunError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("--tensorboard needs the extra: pip install 'ilnas[tensorboard]'") from error
    return SummaryWriter


class _Display:
    """One line per epoch and skipped expansion, a progress bar below them on a terminal; TensorBoard when asked."""

    def __init__(self, run: RunFolder, writer: Callable[[Path], Any] | None) -> None:
        print(f"run folder: {run.path}")
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(unit="step", dynamic_ncols=True)
        self.writer = writer(run.path / "tensorboard") if writer else None

    def __enter__(self) -> "_Display":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def step(self, step: int, total: int, words: str) -> None:
        if self.bar is not None:
            self.bar.total = total
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.update(step - self.bar.n)

    def event(self, entry: dict[str, Any]) -> None:
        if self.writer is not None:
            for name, value in entry.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self.writer.add_scalar(f"{entry['event']}/{name}", value, entry["step"])
        if entry["event"] == "epoch":
            validation = entry.get("validation_accuracy")
            shown = f", validation {100 * validation:.2f} %" if validation is not None else ""
            self.say(
                f"epoch {entry['epoch']}: loss {entry['loss']:.4f}, training {100 * entry['train_accuracy']:.2f} %"
                f"{shown}, live {entry['live']:,}, {entry['seconds']:.0f} s"
            )
        elif "skipped" in entry:
            self.say(f"expansion at step {entry['step']} skipped: {entry['skipped']}")

    def say(self, line: str) -> None:
        """A line of output, above the progress bar if there is one."""
        if self.bar is not None:
            self.bar.clear()
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
