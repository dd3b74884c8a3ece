"""What a run tells its callbacks: steps, evaluations, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class StepEvent:
    """Optimizer step `step` (from 1) of the run in the folder `run` is done.

    metrics: by the names of metrics.jsonl, None for what the run lacks; those of times and memory
    are there in logged steps alone.
    """

    run: Path
    step: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class EvaluationEvent:
    """The run was evaluated after `step`: the metrics of eval.jsonl, by the set's name."""

    run: Path
    step: int
    sets: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class CheckpointEvent:
    """The checkpoint of `step` is complete in the folder `checkpoint`, on all ranks."""

    run: Path
    step: int
    checkpoint: Path


class Callback(Protocol):
    """What is told of a run's events, on rank 0, which waits until each call returns.

    What a call raises ends the run on all ranks, in good order. To end it without an error, create
    the file STOP in the run's folder.
    """

    def step(self, event: StepEvent) -> None:
        """After every optimizer step, once its line is in metrics.jsonl."""

    def evaluation(self, event: EvaluationEvent) -> None:
        """After every evaluation, once its lines are in eval.jsonl."""

    def checkpoint(self, event: CheckpointEvent) -> None:
        """After every checkpoint, once it is complete."""
