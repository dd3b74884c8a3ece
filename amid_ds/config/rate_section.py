"""The keys of the recipe's `train` section that say how long a run is, and its learning rate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from amid_ds.config.section import NonNegativeInt, Positive, PositiveInt, Section, Share


class RateKeys(Section):
    """The number of optimizer steps, and the learning rate over them.

    Checks of several keys are made with the last of them, not with the section as a whole: so they
    are reported beside those of other keys.
    """

    steps: PositiveInt | None = None
    """Optimizer steps of the whole run; or else `epochs`."""
    epochs: PositiveInt | None = Field(default=None, validate_default=True)
    """Passes over the prepared rows, each as many steps as it has whole batches; or else `steps`.
    """
    learning_rate: Positive = 1.0e-4
    """The peak, after the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """The learning rate's way from the peak down to `min_lr_ratio` where the run ends. constant: no
    way down; wsd: constant, and down over the last `decay_steps`."""
    warmup_steps: NonNegativeInt = 0
    """Steps of the linear warm-up."""
    min_lr_ratio: Share = 0.0
    """The share of the peak at which cosine, linear and wsd end."""
    decay_steps: PositiveInt | None = Field(default=None, validate_default=True)
    """The number of the last steps, in which the rate of wsd goes down."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Of the way down of wsd. sqrt: 1 - √progress, steep first."""

    @property
    def total_steps(self) -> int:
        """The optimizer steps of the whole run, of a recipe in which `epochs` are steps by now."""
        assert self.steps is not None, "`epochs` are counted once the data are prepared"
        return self.steps

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, epochs: int | None, info: ValidationInfo) -> int | None:
        steps = info.data.get("steps")
        # Without its name there, `steps` has an error of its own.
        if "steps" in info.data and (steps is None) == (epochs is None):
            beside = "neither is named" if steps is None else f"beside `steps` {steps}"
            raise ValueError(f"{beside}: one of `train.steps` and `train.epochs` says how long the "
                             "run is (the other is left out, or null)")
        return epochs

    @field_validator("min_lr_ratio")
    @classmethod
    def _lowers_something(cls, ratio: float, info: ValidationInfo) -> float:
        if ratio and info.data.get("schedule") == "constant":
            raise ValueError("`schedule: constant` has no way down: leave it out, or take another "
                             "schedule")
        return ratio

    @field_validator("decay_steps")
    @classmethod
    def _belongs_to_wsd(cls, decay_steps: int | None, info: ValidationInfo) -> int | None:
        schedule = info.data.get("schedule")
        if schedule == "wsd" and decay_steps is None:
            raise ValueError("`schedule: wsd` needs the number of the last steps, in which the "
                             "learning rate goes down")
        if schedule not in ("wsd", None) and decay_steps is not None:
            raise ValueError(f"`schedule: {schedule}` has none: leave it out, or take "
                             "`schedule: wsd`")
        steps = info.data.get("steps")
        if decay_steps is not None and steps is not None:
            require_room(steps, info.data.get("warmup_steps", 0), decay_steps)
        return decay_steps

    @field_validator("decay_shape")
    @classmethod
    def _shapes_something(cls, shape: str, info: ValidationInfo) -> str:
        schedule = info.data.get("schedule")
        if shape != "linear" and schedule not in ("wsd", None):
            raise ValueError(f"`schedule: {schedule}` has a shape of its own: leave it out, or "
                             "take `schedule: wsd`")
        return shape


def require_room(steps: int, warmup_steps: int, decay_steps: int) -> None:
    """Raise ValueError where the warm-up and the way down of wsd have no room in `steps`."""
    if warmup_steps + decay_steps > steps:
        raise ValueError("there is no room for them between the warm-up's "
                         f"{warmup_steps} steps and the run's end at {steps}: lower `decay_steps` "
                         "or `warmup_steps`, or make the run longer")
