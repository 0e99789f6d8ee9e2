"""Intra-layer neural architecture search: networks that grow weight by weight."""

from ilnas.config import Config, make_config
from ilnas.data import Dataset, load_dataset
from ilnas.grow import grow
from ilnas.template import Network, live_parameters
from ilnas.trainer import Result, Trainer

__all__ = [
    "Config",
    "Dataset",
    "Network",
    "Result",
    "Trainer",
    "grow",
    "live_parameters",
    "load_dataset",
    "make_config",
]
