"""Values that change from step to step, as pure functions of the step: a resume needs no memory.

The exception is TAID's interpolation, which follows past losses: checkpoints keep its TaidState.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypedDict, overload

from amid_ds.config.recipe import Loss, Train
from amid_ds.config.scheduled_values import (
    Piecewise,
    Schedule,
    ScheduledValue,
    TaidSchedule,
    with_schedules,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WORD_MASK = 0xFFFFFFFFFFFFFFFF
SPLITMIX64_GAMMA = 0x9E3779B97F4A7C15


class TaidState(TypedDict):
    """The state of TAID's update between two steps.

    value: the interpolation in the next step; momentum: of the divergence's relative change;
    divergence: of the step before, None before the first.
    """

    value: float
    momentum: float
    divergence: float | None


def learning_rate(train: Train, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule.

    With peak P, warm-up W and m = min_lr_ratio it is P (step + 1) / W while step < W, then
    P (m + (1 - m) f). f is 1 at the end of the warm-up (wsd: until `decay_steps` before the end)
    and 0 at step `steps`, the one after the last; f = 1 of a constant rate.
    """
    peak, warmup_steps = train.learning_rate, train.warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    low = train.min_lr_ratio
    return peak * (low + (1 - low) * _share_left(train, step))


def _share_left(train: Train, step: int) -> float:
    """The share f of the schedule's way down that is still ahead at `step`, after the warm-up."""
    if train.schedule == "constant":
        return 1.0
    shape: str = train.schedule
    begin = train.warmup_steps
    if train.schedule == "wsd":
        assert train.decay_steps is not None
        shape, begin = train.decay_shape, train.total_steps - train.decay_steps
    progress = max(0.0, (step - begin) / (train.total_steps - begin))
    if shape == "linear":
        return 1 - progress
    if shape == "sqrt":
        return 1 - math.sqrt(progress)
    return 0.5 * (1 + math.cos(math.pi * progress))


def value_at(scheduled: ScheduledValue, step: int, total: int,
             taid_state: TaidState | None = None) -> float:
    """The value of optimizer step `step` (from 0) of `total`; the last step has the last value.

    A TaidSchedule's value is read from `taid_state`; None: its first value.
    """
    if isinstance(scheduled, TaidSchedule):
        return scheduled.adaptive[0] if taid_state is None else taid_state["value"]
    if isinstance(scheduled, Piecewise):
        begun = [piece for piece in scheduled.pieces
                 if piece.steps is not None and piece.steps[0] <= step]
        return value_at(begun[-1] if begun else scheduled.pieces[0], step, total)
    if not isinstance(scheduled, Schedule):
        return scheduled
    first, last = scheduled.steps or (0, max(1, total - 1))
    progress = min(1.0, max(0.0, (step - first) / (last - first)))
    if scheduled.cosine is not None:
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    start, end = scheduled.ends
    return start + (end - start) * progress


def loss_at(loss: Loss, step: int, total: int, taid_state: TaidState | None = None) -> Loss:
    """The loss of optimizer step `step` (from 0) of `total`, its schedules replaced by values."""
    at: Loss = with_schedules(loss, lambda value: value_at(value, step, total, taid_state))
    return at


def taid_update(adaptive: TaidSchedule, taid_state: TaidState | None, divergence: float, step: int,
                total: int) -> TaidState:
    """The state after optimizer step `step` (from 0) of `total` and its `divergence`.

    TAID's update (arXiv 2501.16937, section 3.2), J being the divergence:

        change = (J before - J) / J before;   m = β m + (1 - β) change
        t = min(t_end, max(t_linear, t + rate · sigmoid(m) · (1 - t)))

    The authors' code has the cross entropy for J, with the same gradient and a smaller relative
    change. As there, the first step only sets the divergence.
    """
    start, end = adaptive.adaptive
    if taid_state is None or taid_state["divergence"] is None:
        return {"value": start, "momentum": 0.0, "divergence": divergence}
    before, t = taid_state["divergence"], taid_state["value"]
    momentum = (adaptive.momentum * taid_state["momentum"]
                + (1 - adaptive.momentum) * (before - divergence) / (before + 1e-15))
    along = start + (end - start) * step / total
    # By tanh: a sigmoid that cannot overflow.
    faster = t + adaptive.rate * (1 - t) * 0.5 * (1 + math.tanh(momentum / 2))
    return {"value": min(end, max(along, faster)), "momentum": momentum, "divergence": divergence}


def turning_points(losses: Iterable[Loss], total: int) -> list[int]:
    """Steps at which a schedule of `losses` starts or ends, and the first and last step, in order.

    Between two of them each value lies between its values there, so checking these checks all.
    """
    points = {0, total - 1}
    for scheduled in (each for loss in losses for each in loss.scheduled.values()):
        for part in scheduled.pieces if isinstance(scheduled, Piecewise) else [scheduled]:
            if isinstance(part, Schedule):
                points |= {min(step, total - 1) for step in part.steps or ()}
    return sorted(points)


@overload
def splitmix64(value: int) -> int: ...
@overload
def splitmix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def splitmix64(value: Any) -> Any:
    """SplitMix64's output function: a fixed bijection of 64-bit words that looks random.

    value: an int, reduced modulo 2^64, or an array of uint64. Maps 0 to 0: add a constant first.
    """
    value = value & WORD_MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD_MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD_MASK
    return value ^ (value >> 31)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the random numbers (dropout) of data-parallel rank `rank` in `step`; 63 bits.

    Steps and ranks are mixed by SplitMix64's finaliser, so neighbours share nothing, and a resumed
    run draws the same numbers as an uninterrupted one.
    """
    value = seed
    for part in (step, rank):
        value = splitmix64(value * SPLITMIX64_GAMMA + part + 1)
    return value >> 1
