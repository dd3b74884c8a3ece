"""From the recipe's losses to what one optimizer step minimises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from amid_ds.config.loss_section import BESIDE_THE_DIVERGENCE
from amid_ds.config.recipe import Loss, PerTokenSpec, Recipe, Temperatures
from amid_ds.config.schedule import TaidState, loss_at, turning_points, value_at
from amid_ds.errors import InputError
from amid_ds.losses import AMiD, PerToken, preset
from amid_ds.losses.grown import require_foldable
from amid_ds.models.distiller import StepObjective, StepObjectives

# Keys of `loss` that are none of a preset's; `token_weight` goes with every objective.
BESIDE = {"preset", *BESIDE_THE_DIVERGENCE} - {"temperature"}


def objective_at(loss: Loss, step: int, total: int, taid: TaidState | None = None) -> StepObjective:
    """The objective of optimizer step `step` (from 0) of `total`, with values for schedules.

    taid: the state of TAID's interpolation; None: not started yet. Raises InputError for a preset,
    divergence, order or value that does not exist.
    """
    now = loss_at(loss, step, total, taid)
    amid = _amid(now)
    factor = amid.student_temperature**2 if loss.temperature_scaling == "squared" else 1.0
    # loss_at leaves numbers where the recipe has schedules.
    return StepObjective(amid, now.kd_weight * factor, now.ce_weight)   # type: ignore[arg-type, operator]


def objectives_at(recipe: Recipe, step: int, taid: TaidState | None = None) -> StepObjectives:
    """What optimizer step `step` (from 0) of the recipe learns from tokens of each origin.

    taid, errors: as `objective_at` has them; an error names the loss by its place.
    """
    def at(loss: Loss, place: str) -> StepObjective:
        try:
            objective = objective_at(loss, step, recipe.train.total_steps, taid)
        except InputError as error:
            raise InputError(f"`{place}`: {error.found}", error.expected, error.remedy) from None
        return replace(objective, statistics=tuple(recipe.train.statistics))

    base, own = at(recipe.loss, "loss"), recipe.source_losses
    every_source = range(len(recipe.data.train) if own else 0)
    return StepObjectives(base, at(recipe.sampled_loss, "rollout.loss"), {
        number: at(own[number], f"data.train.{number}.loss") if number in own else base
        for number in every_source})


def check_objectives(recipe: Recipe) -> None:
    """Raise InputError for a step whose objective cannot be."""
    for _ in every_objective(recipe):
        pass


def every_objective(recipe: Recipe) -> Iterator[StepObjectives]:
    """The objectives of those steps between which all others' lie. Errors: as `objectives_at`.

    The steps of epochs are not counted yet: it is as if there were two.
    """
    if recipe.train.steps is None:
        recipe = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"steps": 2, "epochs": None})})
    for step in turning_points(recipe.losses, recipe.train.total_steps):
        yield objectives_at(recipe, step)


def require_all_foldable(recipe: Recipe) -> None:
    """Raise InputError for a loss that cannot be learnt over a grown vocabulary."""
    for loss in [recipe.loss, *recipe.source_losses.values()]:
        require_foldable(objective_at(loss, 0, 2).amid)


def scheduled_at(recipe: Recipe, step: int, taid: TaidState | None = None) -> dict[str, float]:
    """The numbers of the recipe's losses that change with the step, at `step` (from 0), by key.

    A key of `loss` has its name in there, such as `order.pr`; one of another loss its whole name.
    """
    schedules = dict(recipe.loss.scheduled)
    for place, own in recipe.own_losses.items():
        schedules |= {f"{place}.{name}": value for name, value in own.scheduled.items()}
    return {name: value_at(value, step, recipe.train.total_steps, taid)
            for name, value in schedules.items()}


def _amid(loss: Loss) -> AMiD:
    """The AMiD objective of a loss without schedules."""
    try:
        values = {key: _as_losses_have_it(value) for key, value in loss if key not in BESIDE}
        if loss.preset is None:
            amid = AMiD(**values)   # type: ignore[arg-type]
        else:
            amid = preset(loss.preset,
                          **{key: values[key] for key in loss.model_fields_set - BESIDE})
        weight = loss.token_weight
        return amid if weight is None else replace(amid, token_weight=_per_token(weight))
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the recipe's loss: {error}",
                         "an objective as in amid_ds/losses/README.md",
                         "fix the `loss:` section") from None


def _as_losses_have_it(value: object) -> object:
    """A value of the recipe without schedules, as `amid_ds.losses` has it."""
    if isinstance(value, PerTokenSpec):
        return _per_token(value)
    if isinstance(value, Temperatures):
        return {"student": value.student, "teacher": value.teacher}
    if isinstance(value, dict):
        return {key: _as_losses_have_it(part) for key, part in value.items()}
    return value


def _per_token(spec: PerTokenSpec) -> PerToken:
    return PerToken(**spec.model_dump(exclude_none=True))
