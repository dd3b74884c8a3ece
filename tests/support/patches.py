"""A test's own code in the processes that it starts as ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amid_ds.training.rollout import StepBatch
    from amid_ds.training.trainer import Trainer


def patch_train_step(around: Callable[[Trainer, StepBatch], Iterator[StepBatch | None]]) -> None:
    """Run `around(trainer, batch)`, a generator, around each of this process's training steps.

    Its code before its one `yield` runs before the step, the rest after it. It may yield another
    batch for the step to learn from. Of several patches the last one is the outermost.
    """
    from amid_ds.training.trainer import Trainer

    make_step, context = Trainer.train_step, contextlib.contextmanager(around)

    def train_step(trainer, batch, auxiliary=None):
        with context(trainer, batch) as other:
            return make_step(trainer, batch if other is None else other, auxiliary)

    Trainer.train_step = train_step


def rank_without_compiler(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that can compile nothing: neither CPU Adam, which takes g++ a minute, nor
    torch's functions."""
    import torch._dynamo

    from amid_ds.engine import cpu_adam
    from support.ranks import rank_main

    torch._dynamo.config.disable = True
    cpu_adam._load = lambda: "this test has no compiler"
    rank_main(argv, variables, log)
