"""The section `loss`: the objective's values, each a number, a schedule, or a number per token.

And what may stand in its place for a source of rows, or for the student's own words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from amid_ds.config.scheduled_values import (
    MAPPING,
    NAME,
    PER_SIDE,
    PER_TOKEN,
    SCHEDULED,
    VALUE_SECTIONS,
    AnySchedule,
    PerTokenOrScheduled,
    PerTokenSpec,
    Scheduled,
    TaidSchedule,
    bounding_values,
    by_name,
    per_token_parts,
    scheduled_parts,
    within,
)
from amid_ds.config.section import Section

# Of a divergence, and of a preset: a number, or a choice by its name.
Parameter = Annotated[
    Annotated[str, Tag(NAME)] | Annotated[Scheduled, Tag(SCHEDULED)],
    Discriminator(lambda value: NAME if isinstance(value, str) else SCHEDULED)]
PresetKey = Annotated[
    Annotated[str, Tag(NAME)] | Annotated[PerTokenOrScheduled, Tag(PER_TOKEN)],
    Discriminator(lambda value: NAME if isinstance(value, str) else PER_TOKEN)]
Weight = Annotated[Scheduled, within(0, math.inf)]
PositiveSchedule = Annotated[Scheduled, within(0, math.inf, open_low=True)]
# The names that `amid_ds.losses` knows, for editors and shells: to ask it would import torch.
PRESET_NAMES = ("fkl", "rkl", "skl", "srkl", "gkd", "taid", "abkd", "csd", "sampled_rkl", "veto",
                "amid")
DIVERGENCE_NAMES = ("kl", "alpha_beta", "total_variation", "squared_hellinger", "concrete_score",
                    "sampled_reverse_kl")
ORDER_NAMES = ("pr", "qr", "rp", "rq")
# What `loss` has beside the divergence: another `preset` for a source leaves them.
BESIDE_THE_DIVERGENCE = ("kd_weight", "ce_weight", "token_weight", "temperature",
                         "temperature_scaling", "normalise")


class TokenWeight(PerTokenSpec):
    """A factor of each token's weight: linear in a measure, or `top`."""

    top: Annotated[Scheduled, within(0, 1, open_low=True)] | None = None
    """Only this share of each sequence's tokens counts, those with the greatest measure; instead of
    `linear` and `at`."""

    @model_validator(mode="after")
    def _one_kind(self) -> TokenWeight:
        if self.top is not None and (self.linear, self.at) != (None, None):
            raise ValueError("`top` chooses tokens, and `linear` with `at` weighs them: name one "
                             "of the two")
        if min(bounding_values(self)) < 0:
            raise ValueError("a weight is 0 or more")
        return self


class Temperatures(Section):
    """A temperature for each side."""

    student: PositiveSchedule = 1.0
    """Divides the student's logits."""
    teacher: PositiveSchedule = 1.0
    """Divides the teacher's logits."""


VALUE_SECTIONS[PER_SIDE] = Temperatures


def _temperature_kind(value: object) -> str:
    """The tag of one temperature, or of two."""
    two = (bool(value.keys() & {"student", "teacher"}) if isinstance(value, Mapping)
           else isinstance(value, Temperatures))
    return PER_SIDE if two else SCHEDULED


class LossKeys(Section):
    """The keys of an objective."""

    # For a preset's own keys. Without a preset, parse.py refuses unknown keys.
    model_config = ConfigDict(extra="allow")
    preset: str | None = Field(default=None, examples=[*PRESET_NAMES])
    """One of the published special cases; None: the AMiD objective from the keys below."""
    __pydantic_extra__: dict[str, PresetKey] = Field(init=False)
    alpha: PerTokenOrScheduled = -1.0
    """α of the assistant's mixture: -1 arithmetic, 1 geometric, 3 harmonic."""
    lam: Annotated[PerTokenOrScheduled, within(0, 1)] = 0.1
    """λ, the teacher's share in the assistant."""
    divergence: Annotated[
        Annotated[str, Tag(NAME)]
        | Annotated[dict[str, dict[str, Parameter]], Tag(MAPPING)],
        Discriminator(by_name)] = Field(default="kl", examples=[*DIVERGENCE_NAMES])
    """A name registered in `amid_ds.losses.divergences`, or {name: {parameter: value}}."""
    order: Annotated[
        Annotated[str, Tag(NAME)]
        | Annotated[dict[str, Annotated[PerTokenOrScheduled, within(0, math.inf)]], Tag(MAPPING)],
        Discriminator(by_name)] = Field(default="pr", examples=[*ORDER_NAMES])
    """The divergence's arguments of p (teacher), q (student), r (assistant): `pr` is D(p‖r); a
    mapping from orders to weights is their weighted sum."""
    power: PositiveSchedule = 1.0
    """An exponent of the assistant before it is normalised."""
    temperature: Annotated[
        Annotated[PositiveSchedule, Tag(SCHEDULED)] | Annotated[Temperatures, Tag(PER_SIDE)],
        Discriminator(_temperature_kind)] = 1.0
    """Divides both models' logits, or {student, teacher}."""
    temperature_scaling: Literal["none", "squared"] = "none"
    """A factor of the divergence. none: 1; squared: temperature², so that the gradient keeps its
    size at high temperatures (Hinton et al., 2015)."""
    detach_assistant: bool = False
    """Treat the assistant as a fixed target, without a gradient through it."""
    kd_weight: Weight = 1.0
    """The coefficient of the divergence."""
    ce_weight: Weight = 0.0
    """The coefficient of the cross entropy with the data's labels."""
    token_weight: TokenWeight | None = None
    """A factor of each token's weight in both; the divisor stays. None: 1."""

    @property
    def scheduled(self) -> dict[str, AnySchedule]:
        """The values that change with the step, by dotted key; a preset's own keys included."""
        return dict(scheduled_parts(self))

    @property
    def makes_logits_twice(self) -> bool:
        """True where a token's value needs its whole sequence measured first."""
        return any(value.over == "sequence" or getattr(value, "top", None) is not None
                   for value in per_token_parts(self))


def _closed_without_a_preset(schema: dict[str, Any]) -> None:
    """In the JSON schema, refuse what parse.py refuses: other keys than these without a preset."""
    schema |= {"if": {"required": ["preset"], "properties": {"preset": {"type": "string"}}},
               "else": {"propertyNames": {"enum": list(schema["properties"])}}}


class Loss(LossKeys):
    """The AMiD objective, or a `preset` with its own keys (see `amid_ds.losses.preset`)."""

    model_config = ConfigDict(json_schema_extra=_closed_without_a_preset)
    normalise: Literal["tokens", "sequence"] = "tokens"
    """tokens: the mean over the global batch's tokens; sequence: over each sequence's tokens, then
    over the sequences."""

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

    @model_validator(mode="after")
    def _one_temperature_is_squared(self) -> Loss:
        sides = self.temperature
        if (self.temperature_scaling == "squared" and isinstance(sides, Temperatures)
                and sides.student != sides.teacher):
            raise ValueError("`temperature_scaling: squared` with two temperatures that differ: "
                             "there is no one to square; leave it out, and set `kd_weight` to the "
                             "factor that you want")
        return self


class OwnLoss(LossKeys):
    """Keys in place of those of `loss`; what is not named here is as `loss` has it."""

    @model_validator(mode="before")
    @classmethod
    def _normalised_as_a_whole(cls, raw: object) -> object:
        if isinstance(raw, dict) and "normalise" in raw:
            raise ValueError("`normalise` is of the whole batch: name it in `loss`")
        return raw

    @model_validator(mode="after")
    def _nothing_adapts(self) -> OwnLoss:
        for name, value in self.scheduled.items():
            if isinstance(value, TaidSchedule):
                raise ValueError(f"`{name}` is adaptive: only a value of `loss` can be, which "
                                 "follows the whole step's divergence")
        return self

    @model_serializer(mode="wrap")
    def _what_is_named(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {key: value for key, value in serialize(self).items()
                if key in self.model_fields_set}


def overridden(loss: Loss, own: OwnLoss) -> Loss:
    """`loss` with the keys that `own` names in place of its own.

    One that names a `preset`, or null for none, replaces all but BESIDE_THE_DIVERGENCE. Raises
    ValueError where the two do not make a loss.
    """
    named = {key: value for key, value in own if key in own.model_fields_set}
    kept = {key: value for key, value in loss if key in loss.model_fields_set
            and ("preset" not in named or key in BESIDE_THE_DIVERGENCE)}
    return Loss.model_validate({**kept, **named})


_WEIGHT: TypeAdapter[object] = TypeAdapter(Weight)


def without_divergence(loss: dict[str, object], ce_weight: float | None) -> dict[str, object]:
    """A loss before its check, of cross entropy alone: of this weight if it names none but 0.

    ce_weight: None: of the weight that it gets elsewhere. A `kd_weight` that is none stays, to be
    reported.
    """
    try:
        _WEIGHT.validate_python(loss.get("kd_weight", 0.0))
    except ValidationError:
        return loss
    kept = {key: value for key, value in loss.items()
            if key != "ce_weight" or type(value) not in (int, float) or value}
    return {**({} if ce_weight is None else {"ce_weight": ce_weight}), **kept, "kd_weight": 0.0}
