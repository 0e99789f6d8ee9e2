"""Whole runs through the command line: results, resuming, stopping, killing, and folders that cannot be used."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from ilnas.checkpoint import RunError, RunFolder, network_from_state, network_state
from ilnas.cli import build_parser, dataset_of, main
from ilnas.config import make_config, options
from ilnas.data import Batches
from ilnas.template import live_parameters, masked_layers
from ilnas.trainer import Interrupted, Trainer, evaluate

TINY = {
    "widths": "4,4/6", "budget": 500, "base": 0.6, "epochs": 4, "batch_size": 64, "train_images": 256, "threads": 1,
    "alr": 0.1, "move": 0.05,
}  # fmt: skip
EVERYTHING = {"hidden": 6, "nodes": 1, "layers": 2}  # all kinds of additions, in the stages and in the head
NO_CLOCK = ("seconds", "took")


def flags(**changes):
    chosen = TINY | changes
    return [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run that nodes and layers were offered to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["search", "--run", str(folder), *flags(**EVERYTHING)]) == 0
    return RunFolder.open(folder)


def log_without_clock(run):
    return [{k: v for k, v in entry.items() if k not in NO_CLOCK} for entry in run.read_log()]


def assert_same_state(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "log_size"}:  # the clock, and the log whose lines hold it
            assert_same_state(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_state(a, b)
    else:
        assert one == other


def assert_same_run(run, finished):
    assert log_without_clock(run) == log_without_clock(finished)
    assert_same_state(run.load(), finished.load())


def test_a_run_meets_its_budget_and_logs_everything(finished):
    events = [entry["event"] for entry in finished.read_log()]
    assert events[0] == "start"
    assert events[-1] == "result"
    assert events.count("epoch") == 4
    expansions = [entry for entry in finished.read_log() if entry["event"] == "expansion"]
    assert len(expansions) == finished.read_log()[0]["planned_expansions"] > 2
    assert all(entry["live"] == entry["target"] <= 500 for entry in expansions)
    result = finished.read_log()[-1]
    network = network_from_state(finished.load()["network"])
    assert live_parameters(network) == result["live"] == 500
    dataset = dataset_of(finished.config())
    assert evaluate(network, dataset.test, dataset, finished.config())[1] == result["test_accuracy"]


def test_the_final_line(capsys, tmp_path):
    assert main(["search", "--run", str(tmp_path / "r"), *flags(epochs=1)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("test accuracy ")
    for word in ("live parameters 500 of at most 500", "density", " s"):
        assert word in line


def test_eval_repeats_the_result(finished, capsys):
    assert main(["eval", str(finished.path)]) == 0
    accuracy = finished.read_log()[-1]["test_accuracy"]
    assert f"test: accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out


def test_a_network_survives_a_checkpoint(finished):
    state = finished.load()["network"]
    assert_same_state(network_state(network_from_state(state)), state)


@pytest.mark.parametrize("stop_at", [1, 6, 9])
def test_stopped_and_resumed_is_bit_identical(finished, tmp_path, stop_at):
    config = finished.config()
    run = RunFolder.create(tmp_path / "run", config)
    trainer = Trainer(config, dataset_of(config), run)

    def stop(step, *_):
        trainer.stop_requested = step == stop_at

    trainer.progress = stop
    with pytest.raises(Interrupted):
        trainer.train()
    assert run.load()["step"] == stop_at
    run.log(event="noise after the checkpoint", step=stop_at)
    assert main(["search", "--run", str(run.path), "--resume"]) == 0
    assert_same_run(run, finished)


KILLED_PLACES = {  # where, and at which call
    "training": ("ilnas.trainer.Trainer.train_step", 7),
    "expansion": ("ilnas.expansion.gradients_at", 3),
    "committing an expansion": ("ilnas.evolve.commit", 3),
    "checkpoint half written": ("torch._C.PyTorchFileWriter.write_record", 110),
    "checkpoint": ("ilnas.checkpoint.os.fsync", 3),
    "checkpoint before the move": ("ilnas.checkpoint.os.replace", 3),
}
KILLER = """
import os, pkgutil, signal, sys
import sklearn.datasets
from ilnas.cli import main

def kill_at(place, count):
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    real, calls = getattr(owner, name), 0
    def deadly(*given, **named):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)
    setattr(owner, name, deadly)

for line in sys.stdin:
    place, count, *arguments = line.split()
    if not (child := os.fork()):  # nothing has run yet that a fork could break, and the imports are paid only once
        kill_at(place, int(count))
        main(arguments)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """By place the folder of a run that was killed there, and how it ended."""
    folders = {place: tmp_path_factory.mktemp("killed") / "run" for place in KILLED_PLACES}
    lines = [
        " ".join([where, str(count), "search", "--run", str(folders[place]),
                  *flags(**EVERYTHING, checkpoint_every=0.5)])
        for place, (where, count) in KILLED_PLACES.items()
    ]  # fmt: skip
    zygote = subprocess.run(
        [sys.executable, "-c", KILLER], input="\n".join(lines), env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    statuses = [int(line) for line in zygote.stderr.split()]
    return {place: (folders[place], status) for place, status in zip(KILLED_PLACES, statuses, strict=True)}


@pytest.mark.parametrize("place", KILLED_PLACES)
def test_killed_and_resumed_is_bit_identical(finished, killed, place):
    """SIGKILL leaves no chance to tidy up: what is on the disk must be enough."""
    folder, status = killed[place]
    assert status == -signal.SIGKILL
    run = RunFolder.open(folder)
    assert 0 < run.load()["step"] < 16
    unfinished = folder / "checkpoint.unfinished"
    assert unfinished.exists() == place.startswith("checkpoint")
    if place == "checkpoint half written":
        with pytest.raises((OSError, RuntimeError)):
            torch.load(unfinished)
    assert main(["search", "--run", str(folder), "--resume"]) == 0
    assert_same_run(run, finished)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ilnas", "search", "--run", str(folder), *flags(epochs=2000)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and '"epoch"' in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"ilnas search --run {folder} --resume" in out
    assert RunFolder.open(folder).load()["step"] > 0


def test_a_second_ctrl_c_does_not_wait(tmp_path, capsys, monkeypatch):
    def interrupted_twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", interrupted_twice)
    assert main(["search", "--run", str(tmp_path / "run"), *flags()]) == 130
    assert capsys.readouterr().err == "ilnas: interrupted\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_on_a_terminal_only(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["search", "--run", str(tmp_path / "run"), *flags(epochs=1)]) == 0
    out, err = capsys.readouterr()
    assert "epoch 1: loss" in out
    if terminal:
        assert "4/4" in err
    else:
        assert err == ""


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["search", "--run", str(tmp_path / "run"), *flags(epochs=2), "--tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    log = [entry for entry in RunFolder.open(tmp_path / "run").read_log() if entry["event"] == "epoch"]
    for name in ("loss", "validation_accuracy", "live"):
        written = [(event.step, event.value) for event in events.Scalars(f"epoch/{name}")]
        assert [step for step, _ in written] == [entry["step"] for entry in log] == [4, 8]
        assert [value for _, value in written] == pytest.approx([entry[name] for entry in log], rel=2**-23)


def test_tensorboard_without_the_extra_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["search", "--run", str(tmp_path / "run"), *flags(), "--tensorboard"]) == 1
    assert "--tensorboard needs the extra: pip install 'ilnas[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_expansion_that_cannot_be_ranked_is_skipped_and_logged(tmp_path, capsys, monkeypatch):
    sample, calls = Batches.sample, []

    def sample_with_a_nan_at_first(batches, *given):
        images, labels = sample(batches, *given)
        calls.append(given)
        return (images * float("nan") if len(calls) == 1 else images), labels

    monkeypatch.setattr(Batches, "sample", sample_with_a_nan_at_first)
    assert main(["search", "--run", str(tmp_path / "run"), *flags()]) == 0
    log = RunFolder.open(tmp_path / "run").read_log()
    first, *others = [entry for entry in log if entry["event"] == "expansion"]
    assert "non-finite gradients" in first["skipped"]
    assert (first["live"], first["added"], first["removed"]) == (first["live_before"], 0, 0)
    assert not any("skipped" in entry for entry in others)
    assert log[-1]["live"] == 500
    assert f"expansion at step {first['step']} skipped: non-finite" in capsys.readouterr().out


def test_the_test_part_is_looked_at_once_at_the_end(monkeypatch):
    config = make_config(TINY)
    dataset = dataset_of(config)
    looked = []

    def watched(model, part, *given):
        looked.append("test" if part is dataset.test else "validation")
        return evaluate(model, part, *given)

    monkeypatch.setattr("ilnas.trainer.evaluate", watched)
    Trainer(config, dataset).train()
    assert looked == ["validation"] * 4 + ["test", "validation"]


def test_resuming_with_other_options_is_refused(finished, capsys):
    assert main(["search", "--run", str(finished.path), "--resume", "--lr", "0.2"]) == 1
    assert "started with another --lr" in capsys.readouterr().err


def test_folders_that_cannot_be_used(finished, tmp_path, capsys):
    assert main(["search", "--run", str(finished.path), *flags()]) == 1
    assert "holds a run already" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["search", "--run", str(tmp_path / "file" / "run"), *flags()]) == 1
    assert f"cannot write the run folder {tmp_path / 'file' / 'run'}: Not a directory" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "nothing")]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert main(["search", "--resume"]) == 1
    assert "--resume needs --run" in capsys.readouterr().err


def test_a_wrong_data_folder_leaves_no_run_behind(tmp_path, capsys):
    assert main(["search", "--dataset", "mnist", "--data", str(tmp_path), "--run", str(tmp_path / "run")]) == 1
    assert "holds none of train-images-idx3-ubyte" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(finished, tmp_path, capsys, monkeypatch):
    """No file may grow beyond 4 kB from the second epoch on, which is what the kernel tells a writer on a full disk."""
    folder = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    train_step = Trainer.train_step

    def step_on_a_full_disk(trainer):
        if trainer.step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", step_on_a_full_disk)
    monkeypatch.setattr(RunFolder, "log", lambda *_, **__: None)  # what fails is to be the checkpoint
    try:
        assert main(["search", "--run", str(folder), *flags(**EVERYTHING)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert f"cannot write a checkpoint in {folder}: " in error
    assert f"the last good checkpoint is {folder / 'checkpoint.pt'}" in error
    assert RunFolder.open(folder).load()["step"] == 4
    assert main(["search", "--run", str(folder), "--resume"]) == 0
    assert_same_state(RunFolder.open(folder).load(), finished.load())


def test_a_full_disk_under_the_log(finished, tmp_path):
    run = RunFolder.create(tmp_path / "run", finished.config())
    run.save({"step": 1})
    run.log(event="whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write the log in .*: File too large; the last good checkpoint is"):
            run.log(event="cut in two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.log_size() == 30
    assert run.read_log() == [{"event": "whole"}]
    assert run.load()["step"] == 1


def test_a_lost_folder_is_named(finished, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    train_step = Trainer.train_step

    def step_and_lose_the_folder(trainer):
        train_step(trainer)
        if trainer.step == 5:
            shutil.rmtree(folder)

    monkeypatch.setattr(Trainer, "train_step", step_and_lose_the_folder)
    assert main(["search", "--run", str(folder), *flags()]) == 1
    error = capsys.readouterr().err
    assert f"in {folder}: No such file or directory; there is no checkpoint of this run" in error
    run = RunFolder.create(tmp_path / "other", finished.config())
    shutil.rmtree(run.path)
    with pytest.raises(RunError, match="cannot write a checkpoint in .*other: .*; there is no checkpoint of this run"):
        run.save({"step": 3})
    with pytest.raises(RunError, match="cannot write the log"):
        run.log(event="lost")


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    run = RunFolder.create(tmp_path / "run", finished.config())
    run.checkpoint_path.write_bytes(finished.checkpoint_path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be read"):
        run.load()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["search", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{option.name.replace('_', '-')}" in text for option in options())


def test_a_config_file_and_options_that_win_over_it(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[search]\nbudget = 450\nalr = 1\n[training]\nepochs = 1\n")
    given = flags(alr=0.5)
    for name in ("--budget", "--epochs"):
        place = given.index(name)
        del given[place : place + 2]
    assert main(["search", "--config", str(path), "--run", str(tmp_path / "run"), *given]) == 0
    config = RunFolder.open(tmp_path / "run").config()
    assert (config.budget, config.epochs, config.alr) == (450, 1, 0.5)


@pytest.mark.parametrize("method", ["random", "static", "set", "rigl", "prune", "dense"])
def test_the_baselines_run(method):
    config = make_config(TINY, {"method": method, "epochs": 3, "move": 0.2, "interval": 0.5})
    trainer = Trainer(config, dataset_of(config))
    result = trainer.train()
    exact = method != "dense"
    assert result.live == 500 if exact else 300 < result.live <= 500
    assert 0 < result.training_macs


def test_options_that_change_training(tmp_path):
    config = make_config(
        TINY, {"autocast": "bfloat16", "clip": 0.5, "label_smoothing": 0.1, "epochs": 1, "kernel_size": 5}
    )
    trainer = Trainer(config, dataset_of(config))
    computed = set()
    trainer.network.head[0].linear.register_forward_hook(
        lambda _, __, out: computed.add((out.dtype, out.requires_grad))
    )
    trainer.train()
    assert (torch.bfloat16, True) in computed
    assert all(layer.values.dtype == torch.float32 for _, layer in masked_layers(trainer.network))
    norms = torch.stack([p.grad.norm() for p in trainer.network.parameters()])
    assert norms.square().sum().sqrt() <= 0.5 * (1 + 2**-12)


def test_log_lines_are_json(finished):
    for line in finished.log_path.read_text().splitlines():
        assert json.loads(line)["event"]
