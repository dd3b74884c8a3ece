"""What changes from step to step, as pure functions of the step: a resumed run needs no memory of them."""

from __future__ import annotations

import math

from amid_ds.config import Train


def learning_rate(train: Train, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule down to 0 at `steps`."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup_steps) / (train.steps - train.warmup_steps)
    if train.schedule == "linear":
        return train.learning_rate * (1 - progress)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the random numbers (dropout) that data-parallel rank `rank` draws in `step`; 63 bits.

    Steps and ranks are mixed by SplitMix64's finaliser, so neighbours share nothing, and a resumed run draws what the
    uninterrupted run would have drawn.
    """
    value = seed
    for part in (step, rank):
        value = (value * 0x9E3779B97F4A7C15 + part + 1) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1
