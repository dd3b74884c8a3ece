"""What changes from step to step, as pure functions of the step: a resumed run needs no memory of them.

TAID's interpolation alone follows the losses that were: its `Interpolation` is kept in the checkpoints.
"""

from __future__ import annotations

import math
from typing import TypedDict

from amid_ds.config.recipe import Loss, Piecewise, Schedule, TaidSchedule, Train


class TaidState(TypedDict):
    """Where TAID's update stands: the value of the next step, the momentum, and the divergence of the step before."""

    value: float
    momentum: float
    divergence: float | None


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


def value_at(scheduled: float | Schedule | Piecewise | TaidSchedule, step: int, total: int,
             stands: TaidState | None = None) -> float:
    """What a scheduled value is in optimizer step `step` (from 0) of `total`; at the last one it has arrived. An
    adaptive one is where it `stands`; None: at its beginning."""
    if isinstance(scheduled, TaidSchedule):
        return scheduled.adaptive[0] if stands is None else stands["value"]
    if isinstance(scheduled, Piecewise):
        begun = [piece for piece in scheduled.pieces if piece.steps is not None and piece.steps[0] <= step]
        return value_at(begun[-1] if begun else scheduled.pieces[0], step, total)
    if not isinstance(scheduled, Schedule):
        return scheduled
    first, last = scheduled.steps or (0, max(1, total - 1))
    progress = min(1.0, max(0.0, (step - first) / (last - first)))
    if scheduled.cosine is not None:
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    start, end = scheduled.ends
    return start + (end - start) * progress


def loss_at(loss: Loss, step: int, total: int, stands: TaidState | None = None) -> Loss:
    """The loss of one step, its schedules replaced by their values."""
    return loss.model_copy(update={name: value_at(value, step, total, stands)
                                   for name, value in loss.scheduled.items()})


def taid_update(adaptive: TaidSchedule, stands: TaidState | None, divergence: float, step: int, total: int
             ) -> TaidState:
    """TAID's update (arXiv 2501.16937, section 3.2) after optimizer step `step` (from 0) of `total` and its divergence.

        change = (J before - J) / J before;   m = β m + (1 - β) change
        t = min(t_end, max(t_linear, t + rate · sigmoid(m) · (1 - t)))

    J is the divergence itself; the authors' code has the cross entropy with the same gradient, whose relative change
    is smaller. As there, the first step only leaves its divergence.
    """
    start, end = adaptive.adaptive
    if stands is None or stands["divergence"] is None:
        return {"value": start, "momentum": 0.0, "divergence": divergence}
    before, t = stands["divergence"], stands["value"]
    momentum = (adaptive.momentum * stands["momentum"]
                + (1 - adaptive.momentum) * (before - divergence) / (before + 1e-15))
    along = start + (end - start) * step / total
    faster = t + adaptive.rate * (1 - t) * 0.5 * (1 + math.tanh(momentum / 2))      # a sigmoid that cannot overflow
    return {"value": min(end, max(along, faster)), "momentum": momentum, "divergence": divergence}


def turning_points(loss: Loss, total: int) -> list[int]:
    """The steps between which no schedule of `loss` leaves the values that it has at them; the first and last too."""
    found = {0, total - 1}
    for scheduled in loss.scheduled.values():
        for course in scheduled.pieces if isinstance(scheduled, Piecewise) else [scheduled]:
            found |= {min(step, total - 1) for step in getattr(course, "steps", None) or ()}
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
