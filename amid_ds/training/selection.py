"""`checkpoint.best`: the best evaluation so far, the early end of a run, and RUN/best."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from amid_ds.checkpoint.best import (
    best_candidates,
    comparable_best,
    describe_best,
    has_ended_early,
    subject_of,
    updated_best,
)
from amid_ds.checkpoint.card import exported_step
from amid_ds.checkpoint.manifest import verify_together
from amid_ds.checkpoint.state import BestState, TrainState
from amid_ds.config.recipe import Recipe
from amid_ds.distributed.world import World
from amid_ds.files.lease import Fence
from amid_ds.training.job import Job, export_final_model, export_model
from amid_ds.training.validation import EvalMetrics

logger = logging.getLogger(__name__)


class Selection:
    """The best evaluation of an attempt, kept in the run's state; the same on every rank.

    Without `checkpoint.best` there is none.
    """

    def __init__(self, recipe: Recipe, state: TrainState) -> None:
        self.recipe, self.best, self.state = recipe, recipe.checkpoint.best, state
        # The state before the best evaluation, as long as its checkpoint may fail.
        self.before: BestState | None = None
        if self.best is None:
            state.best = None
            return
        subject = subject_of(recipe, self.best)
        if state.best is not None and state.best["of"] != subject:
            logger.info("checkpoint.best compares something else than before, and begins anew")
            state.best = None
        if state.best is None:
            state.best = BestState(of=subject, value=None, step=None, since=0)

    @property
    def has_ended(self) -> bool:
        """True once there were as many evaluations without a better one as `patience` says."""
        return has_ended_early(self.recipe, self.state)

    def is_best(self, step: int) -> bool:
        """True where the evaluation of `step` is the best so far: it is to be saved."""
        return self.state.best is not None and self.state.best["step"] == step

    def improves(self, metrics: Mapping[str, EvalMetrics]) -> bool:
        """True where these metrics, by set, are better than the best so far."""
        return (self.best is not None and self.state.best is not None
                and self.best.is_better(self._value(metrics), self.state.best["value"]))

    def note(self, step: int, metrics: Mapping[str, EvalMetrics]) -> None:
        """Take an evaluation into account. No best one's checkpoint is being written meanwhile."""
        if self.best is not None and self.state.best is not None:
            if self.improves(metrics):
                self.before = self.state.best
            self.state.best = updated_best(self.best, self.state.best, step, self._value(metrics))

    def lost(self, step: int) -> None:
        """Take the evaluation of `step` back if it was the best: its checkpoint was not saved."""
        if self.is_best(step) and self.state.best is not None and self.before is not None:
            since = self.before["since"] + 1 + self.state.best["since"]
            self.state.best = {**self.before, "since": since}

    def _value(self, metrics: Mapping[str, EvalMetrics]) -> float | None:
        return None if self.best is None else metrics[self.best.set_name][self.best.key]


def export_missing_models(job: Job, state: TrainState, world: World, fence: Fence) -> None:
    """Export what a finished run lacks: it was killed between its last save and the end of its
    exports. Collective."""
    best = comparable_best(job.recipe, state)
    if _lacks(job.run.model, state.step, world):
        export_final_model(job, state.step, world, fence)
    if best is not None and _lacks(job.run.best_model, best["step"], world):
        export_best_model(job, state, world, fence)


def _lacks(model: Path, step: int | None, world: World) -> bool:
    """True where the model is not there, or is by its card that of a step before. Collective."""
    return world.run_on_main(lambda: exported_step(model) not in (None, step)
                             or not model.is_dir())


def export_best_model(job: Job, state: TrainState, world: World, fence: Fence) -> None:
    """Export the student of the best evaluation by `state` to RUN/best. Collective.

    From its checkpoint, or where that is damaged from the next best one's, with a warning.
    """
    if job.recipe.checkpoint.best is None:
        return
    checkpoint = _best_checkpoint(job, state, world)
    if checkpoint is None:
        logger.warning("there is no %s: %s had no finite value, or no good checkpoint",
                       job.run.best_model, job.recipe.checkpoint.best.metric)
        return

    export_model(job, checkpoint, job.run.best_model, world, fence)
    logger.info("the best: %s; its model, of %s, is in %s", describe_best(job.recipe, state),
                checkpoint.name, job.run.best_model)


def _best_checkpoint(job: Job, state: TrainState, world: World) -> Path | None:
    """The first good one of `best_candidates`, each damaged one named in a warning. Collective."""
    best = job.recipe.checkpoint.best
    assert best is not None
    for checkpoint in world.run_on_main(lambda: best_candidates(job.run, best, state)):
        damage = verify_together(checkpoint, world)
        if damage is None:
            return checkpoint
        logger.warning("the checkpoint %s of the best %s is damaged, and the next best one is "
                       "taken: %s", checkpoint, best.metric, damage)
    return None
