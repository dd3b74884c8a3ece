"""From the recipe's loss to what one optimizer step minimises."""

from __future__ import annotations

from amid_ds.config.recipe import Loss, Recipe
from amid_ds.config.schedule import TaidState, loss_at
from amid_ds.errors import InputError
from amid_ds.losses import AMiD, preset
from amid_ds.models.distiller import StepObjective, StepObjectives


def objective_at(loss: Loss, step: int, total: int, taid: TaidState | None = None) -> StepObjective:
    """The objective of optimizer step `step` (from 0) of `total`, with values for schedules.

    taid: the state of TAID's interpolation; None: not started yet. Raises InputError for a preset,
    divergence, order or value that does not exist.
    """
    now = loss_at(loss, step, total, taid)
    scheduled = {name: getattr(now, name) for name in loss.scheduled}
    amid = _amid(now)
    factor = amid.temperature**2 if loss.temperature_scaling == "squared" else 1.0
    # loss_at leaves numbers where the recipe has schedules.
    return StepObjective(amid, now.kd_weight * factor, now.ce_weight, scheduled)   # type: ignore[arg-type, operator]


def objectives_at(recipe: Recipe, step: int, taid: TaidState | None = None) -> StepObjectives:
    """What optimizer step `step` (from 0) of the recipe learns from tokens of each origin.

    taid, errors: as `objective_at` has them.
    """
    def at(loss: Loss) -> StepObjective:
        return objective_at(loss, step, recipe.train.total_steps, taid)

    base, own = at(recipe.loss), recipe.source_losses
    every_source = range(len(recipe.data.train) if own else 0)
    return StepObjectives(base, at(recipe.sampled_loss), {
        number: at(own[number]) if number in own else base for number in every_source})


def _amid(loss: Loss) -> AMiD:
    """The AMiD objective of a loss without schedules."""
    not_amids = {"preset", "kd_weight", "ce_weight", "temperature_scaling", "normalise", "power",
                 "token_weight"}
    values = {key: value for key, value in loss if key not in not_amids}
    try:
        if loss.preset is None:
            return AMiD(**values)
        return preset(loss.preset,
                      **{key: values[key] for key in loss.model_fields_set - not_amids})
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the recipe's loss: {error}",
                         "an objective as in amid_ds/losses/README.md",
                         "fix the `loss:` section") from None
