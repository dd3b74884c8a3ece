"""The keys of the recipe's `train` section that name the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from amid_ds.config.section import BelowOne, NonNegative, Positive, Section


class Muon(Section):
    """Under `optimizer: muon`, of the body's matrices."""

    learning_rate: Positive = 0.02
    """Their peak; it follows the schedule of `train.learning_rate`."""
    momentum: BelowOne = 0.95
    """Of the gradient's running mean."""


class OptimizerKeys(Section):
    """The optimizer, and the parameters that it decays."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the body, AdamW for all else."""
    muon: Muon | None = None
    """Muon's own keys; None: AdamW alone."""
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)] = Field(default=[0.9, 0.95])
    """AdamW's, of the first and the second moment."""
    eps: Positive = 1.0e-8
    """AdamW's, added to the square root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled, of the matrices that are no embedding."""
    decay_all: bool = False
    """Decay every parameter, norms, biases and embeddings too."""

    @model_validator(mode="before")
    @classmethod
    def _muons_defaults(cls, raw: object) -> object:
        """Under `optimizer: muon` its keys are there, by default with their defaults."""
        if not isinstance(raw, dict) or raw.get("optimizer") != "muon":
            return raw
        return {**raw, "muon": {} if raw.get("muon") is None else raw["muon"]}

    # Of the one key, not of the section: so it is said beside the other keys' problems.
    @field_validator("muon")
    @classmethod
    def _muon_has_its_optimizer(cls, value: Muon | None, info: ValidationInfo) -> Muon | None:
        if value is not None and info.data.get("optimizer") == "adamw":
            raise ValueError("`train.optimizer` is adamw; set it to muon, or take `train.muon` out")
        return value
