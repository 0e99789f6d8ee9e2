"""A large sparse network takes the memory of what is live, of its activations and of no dense weight."""

import sys

import pytest

pytest.importorskip("matplotlib")
from benchmarks.caps import expand, trainer_at
from benchmarks.memory import peak_of

SIZES = {"stages": 1, "batch": 4, "scoring_batch": 4, "image": 4}


def search(layers: int, width: int, live: int) -> None:
    """Construct, train, expand, train."""
    trainer = trainer_at(layers=layers, width=width, live=live, **SIZES)
    assert trainer.live == live
    trainer.train_step()
    done = expand(trainer)
    assert done["added"] == round(trainer.config.alr * live)
    trainer.train_step()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_nothing_of_dense_size_is_allocated():
    search(2, 8, 1000)  # libraries and thread pools are loaded before the count begins
    width, layers = 384, 6
    largest = layers * width * width * 9 * 4  # bytes of the last layer's weight, 32 MB; all of them take 112
    assert peak_of(lambda: search(layers, width, 60_000)) < largest
