"""The recipe's loss as an AMiD objective."""

from __future__ import annotations

from typing import Any

from amid_ds.config.recipe import DivergenceSpec, Loss
from amid_ds.errors import InputError
from amid_ds.losses import AlphaBeta, AMiD, preset


def build_objective(loss: Loss) -> AMiD:
    """The recipe's objective. Raises InputError for a preset, divergence or order that does not exist."""
    own = {"preset", "kd_weight", "ce_weight"}
    values: dict[str, Any] = {key: value for key, value in loss if key not in own}
    if isinstance(loss.divergence, DivergenceSpec):
        values["divergence"] = AlphaBeta(loss.divergence.alpha_beta.alpha, loss.divergence.alpha_beta.beta)
    try:
        if loss.preset is None:
            return AMiD(**values)
        return preset(loss.preset, **{key: values[key] for key in loss.model_fields_set - own})
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the recipe's loss: {error}", "an objective as in the README",
                         "mend the `loss:` section") from None
