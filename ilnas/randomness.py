"""Randomness without hidden state: every draw of a run follows from the seed, what it is for, and the step."""

import hashlib

import torch


def generator_for(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A fresh generator for one purpose at one step.

    A run that is resumed at a step draws what the uninterrupted run drew there, with no generator state to keep,
    and purposes do not disturb one another.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
