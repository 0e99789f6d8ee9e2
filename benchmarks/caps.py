"""``python -m benchmarks.caps``: the template at the paper's caps, with the memory and time of each step of a search.

64 conv layers of 1024 channels in four stages, each layer fed by all earlier ones of its stage. Prints how long it
takes to construct the network, to train a step and to expand it, and the peak resident memory so far (Linux).
"""

import argparse
import resource
import time
from collections.abc import Callable

from ilnas.config import make_config
from ilnas.evolve import architecture_step
from ilnas.trainer import Trainer

from .bench_expansion import noise


def trainer_at(
    *, stages: int, layers: int, width: int, live: int, batch: int, scoring_batch: int, image: int
) -> Trainer:
    """A search whose network has ``live`` parameters in ``stages`` times ``layers`` conv layers of ``width`` nodes."""
    stage = ",".join([str(width)] * layers)
    config = make_config(
        {
            "preset": "paper", "granularity": "weight", "widths": "/".join([stage] * stages), "stage_output": "last",
            "budget": 2 * live, "base": 0.5, "nodes": 0, "layers": 0, "batch_size": batch,
            "scoring_batch": scoring_batch,
        }
    )  # fmt: skip
    return Trainer(config, noise((3, image, image), 2 * max(batch, scoring_batch)))


def expand(trainer: Trainer) -> dict:
    """One expansion by A_lr; what was done."""
    target = trainer.live + round(trainer.config.alr * trainer.live)
    return architecture_step(
        trainer.network, trainer.optimizer, trainer.config, trainer.batches, trainer.step, target, moved=0,
        lr=trainer.config.lr, progress=1.0,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.caps", description=__doc__.split("\n\n")[0])
    parser.add_argument("--stages", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=16, help="conv layers a stage (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="channels a layer (default: %(default)s)")
    parser.add_argument("--live", type=int, default=5_000_000, help="live parameters (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images a step (default: %(default)s)")
    parser.add_argument("--scoring-batch", type=int, default=4, help="images for scoring (default: %(default)s)")
    parser.add_argument("--image", type=int, default=32, help="side of an image (default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    trainer = timed("construct", lambda: trainer_at(**options))
    dense = trainer.network.structure.dense_parameters()
    print(f"{dense / 1e6:.0f} million parameters dense, {trainer.live / 1e6:.2f} million live", flush=True)
    timed("training step", trainer.train_step)
    timed("training step", trainer.train_step)
    timed("expansion", lambda: expand(trainer))
    print(f"{trainer.live / 1e6:.2f} million live", flush=True)
    timed("training step", trainer.train_step)


def timed(what: str, call: Callable):
    start = time.perf_counter()
    result = call()
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:<22}{seconds:9.2f} s   peak {peak:6.2f} GiB", flush=True)
    return result


if __name__ == "__main__":
    main()
