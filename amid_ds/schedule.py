"""What changes from step to step, as pure functions of the step: a resumed run needs no memory of them."""

from __future__ import annotations

import math

from amid_ds.config import Course, Loss, Pieces, Train


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


def value_at(scheduled: float | Course | Pieces, step: int, total: int) -> float:
    """What a scheduled value is in optimizer step `step` (from 0) of `total`; at the last one it has arrived."""
    if isinstance(scheduled, Pieces):
        begun = [piece for piece in scheduled.pieces if piece.steps is not None and piece.steps[0] <= step]
        return value_at(begun[-1] if begun else scheduled.pieces[0], step, total)
    if not isinstance(scheduled, Course):
        return scheduled
    first, last = scheduled.steps or (0, max(1, total - 1))
    progress = min(1.0, max(0.0, (step - first) / (last - first)))
    if scheduled.cosine is not None:
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    start, end = scheduled.ends
    return start + (end - start) * progress


def loss_at(loss: Loss, step: int, total: int) -> Loss:
    """The loss of one step, its schedules replaced by their values."""
    return loss.model_copy(update={name: value_at(value, step, total) for name, value in loss.scheduled.items()})


def turning_points(loss: Loss, total: int) -> list[int]:
    """The steps between which no schedule of `loss` leaves the values that it has at them; the first and last too."""
    found = {0, total - 1}
    for scheduled in loss.scheduled.values():
        for course in scheduled.pieces if isinstance(scheduled, Pieces) else [scheduled]:
            found |= {min(step, total - 1) for step in course.steps or ()}
    return sorted(found)


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
