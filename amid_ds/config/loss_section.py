"""The section `loss`: the objective's values, each a number or a schedule."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from amid_ds.config.scheduled_values import (
    Piecewise,
    Schedule,
    Scheduled,
    TaidSchedule,
    bounding_values,
    within,
)
from amid_ds.config.section import Finite, NonNegative, Section


class AlphaBetaSpec(Section):
    """The two parameters of the alpha-beta divergence."""

    alpha: Finite
    beta: Finite


class DivergenceSpec(Section):
    """A divergence with parameters."""

    alpha_beta: AlphaBetaSpec


class Loss(Section):
    """The AMiD objective, or a `preset` with its own keys (see `amid_ds.losses.preset`)."""

    # For a preset's own keys. Without a preset, parse.py refuses unknown keys.
    model_config = ConfigDict(extra="allow")
    preset: str | None = None
    """One of the published special cases; None: the AMiD objective from the keys below."""
    __pydantic_extra__: dict[str, Scheduled] = Field(init=False)
    alpha: Scheduled = -1.0
    """α of the assistant's mixture: -1 arithmetic, 1 geometric, 3 harmonic."""
    lam: Annotated[Scheduled, within(0, 1)] = 0.1
    """λ, the teacher's share in the assistant."""
    divergence: str | DivergenceSpec = "kl"
    """`kl`, `total_variation`, `squared_hellinger`, or {alpha_beta: {alpha, beta}}."""
    order: str | dict[str, NonNegative] = "pr"
    """The divergence's arguments of p (teacher), q (student), r (assistant): `pr` is D(p‖r); a
    mapping from orders to weights is their weighted sum."""
    temperature: Annotated[Scheduled, within(0, math.inf, open_low=True)] = 1.0
    """Divides both models' logits."""
    temperature_scaling: Literal["none", "squared"] = "none"
    """A factor of the divergence. none: 1; squared: temperature², so that the gradient keeps its
    size at high temperatures (Hinton et al., 2015)."""
    detach_assistant: bool = False
    """Treat the assistant as a fixed target, without a gradient through it."""
    kd_weight: Annotated[Scheduled, within(0, math.inf)] = 1.0
    """The coefficient of the divergence."""
    ce_weight: Annotated[Scheduled, within(0, math.inf)] = 0.0
    """The coefficient of the cross entropy with the data's labels."""

    @property
    def scheduled(self) -> dict[str, Schedule | Piecewise | TaidSchedule]:
        """The values that change with the step, by key; a preset's own keys included."""
        return {name: value for name, value in self
                if isinstance(value, (Schedule, Piecewise, TaidSchedule))}

    @property
    def adaptive(self) -> TaidSchedule | None:
        """The schedule that follows the divergence; None: no value does."""
        return next((value for value in self.scheduled.values()
                     if isinstance(value, TaidSchedule)), None)

    @model_validator(mode="after")
    def _only_the_interpolation_adapts(self) -> Loss:
        interpolation = "t" if self.preset == "taid" else "lam"
        for name, value in self.scheduled.items():
            if isinstance(value, TaidSchedule) and name != interpolation:
                raise ValueError(f"`{name}` is adaptive: only `{interpolation}`, the teacher's "
                                 "share, can be")
        return self

    @model_validator(mode="after")
    def _some_weight(self) -> Loss:
        if not any(bounding_values(self.kd_weight) + bounding_values(self.ce_weight)):
            raise ValueError("kd_weight and ce_weight are both 0: nothing would be learnt; give "
                             "one of them a weight")
        return self
