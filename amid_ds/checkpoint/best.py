"""The best of a run's evaluations: which it is, whether the run has ended by it, its checkpoint.

The state is in every checkpoint beside the step, so a resumed run goes on with it in any layout. It
names a checkpoint that is there: the saver keeps that one as long as a newer state names it, and a
best evaluation whose checkpoint could not be saved is taken back.
"""

from __future__ import annotations

import json
from pathlib import Path

from amid_ds.checkpoint.manifest import checkpoint_name, checkpoint_step, list_checkpoints
from amid_ds.checkpoint.state import BestState, TrainState
from amid_ds.config.checkpoint_section import SAMPLE_KEY
from amid_ds.config.recipe import Best, Recipe
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_evaluations


def subject_of(recipe: Recipe, best: Best) -> str:
    """What is compared, as text: the metric, its mode, and what it is measured on.

    Values of two subjects are not comparable.
    """
    measured = next(each for each in recipe.data.eval if each.name == best.set_name)
    facts = measured.model_dump(mode="json", exclude_defaults=True)
    sampling = facts.pop("generate", {})
    sampling.pop("batch_size", None)
    return json.dumps([best.metric, best.mode, facts,
                       *([sampling] if best.key == SAMPLE_KEY else [])])


def updated_best(best: Best, before: BestState, step: int, value: float | None) -> BestState:
    """The state after the evaluation of `step`; of two equal values the earlier one stays."""
    if best.is_better(value, before["value"]):
        return {**before, "value": value, "step": step, "since": 0}
    return {**before, "since": before["since"] + 1}


def comparable_best(recipe: Recipe, state: TrainState) -> BestState | None:
    """The best evaluation by `state`; None where the recipe selects none, or by something else."""
    best, reached = recipe.checkpoint.best, state.best
    if best is None or reached is None or reached["of"] != subject_of(recipe, best):
        return None
    return reached


def has_ended_early(recipe: Recipe, state: TrainState) -> bool:
    """True where the run's patience is over in `state`."""
    best, reached = recipe.checkpoint.best, comparable_best(recipe, state)
    return (best is not None and best.patience is not None and reached is not None
            and reached["since"] >= best.patience)


def has_finished(recipe: Recipe, state: TrainState) -> bool:
    """True where no step is left to a run in `state`."""
    return state.step == recipe.train.steps or has_ended_early(recipe, state)


def describe_best(recipe: Recipe, state: TrainState) -> str | None:
    """The best evaluation by `state` in words; None where there is none."""
    best, reached = recipe.checkpoint.best, comparable_best(recipe, state)
    if best is None or reached is None or reached["value"] is None:
        return None
    since = reached["since"]
    return (f"{best.metric} {reached['value']:.6g} at step {reached['step']}, "
            f"{since or 'no'} evaluation{'s' * (since != 1)} since")


def describe_early_end(recipe: Recipe, state: TrainState) -> str | None:
    """Why the run has ended before its last step; None where it has not."""
    best, reached = recipe.checkpoint.best, comparable_best(recipe, state)
    if (best is None or reached is None or not has_ended_early(recipe, state)
            or state.step == recipe.train.steps):
        return None
    return (f"ended early after step {state.step}: {reached['since']} evaluation"
            f"{'s' * (reached['since'] != 1)} without a better {best.metric}")


def best_candidates(run: RunFolder, best: Best, state: TrainState) -> list[Path]:
    """The checkpoint of the best evaluation, then the others that were evaluated, better first.

    [] where no evaluation had a value.
    """
    if state.best is None or state.best["step"] is None:
        return []
    first = run.checkpoints / checkpoint_name(state.best["step"])
    values = {line["step"]: line[best.key] for line in read_evaluations(run.path)
              if line["name"] == best.set_name and line.get(best.key) is not None}
    others = [path for path in list_checkpoints(run.checkpoints)
              if path != first and checkpoint_step(path) in values]
    sign = 1 if best.mode == "min" else -1
    return [first, *sorted(others, key=lambda path: sign * values[checkpoint_step(path)])]
