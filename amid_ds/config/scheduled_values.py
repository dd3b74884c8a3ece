"""Values of the recipe that change with the optimizer step: a number, or one of three schedules.

Their values at a step are computed in `config/schedule.py`. A value that differs from token to
token, by what the models make of it, is made of such values in turn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from amid_ds.config.section import Finite, NonNegativeInt, PositiveInt, Section, Share

# A pair of numbers is a list in YAML; the numbers in it are as strict as everywhere.
FROM_A_LIST = Field(strict=False)


class Schedule(Section):
    """A value that goes from one number to another: exactly one of `value`, `linear`, `cosine`."""

    steps: Annotated[tuple[NonNegativeInt, PositiveInt], FROM_A_LIST] | None = None
    """[first, last], counted from 0: the first value holds before, the last one after. None: all
    of the run's steps."""
    value: Finite | None = None
    """One value for all steps."""
    linear: Annotated[tuple[Finite, Finite], FROM_A_LIST] | None = None
    """[first value, last value], joined by a straight line."""
    cosine: Annotated[tuple[Finite, Finite], FROM_A_LIST] | None = None
    """[first value, last value], joined by half a cosine wave."""

    @model_validator(mode="after")
    def _one_shape(self) -> Schedule:
        if sum(shape is not None for shape in (self.value, self.linear, self.cosine)) != 1:
            raise ValueError("one of `value`, `linear` and `cosine` says how the value goes")
        if self.steps is not None and self.steps[0] >= self.steps[1]:
            raise ValueError(f"steps {list(self.steps)} do not go forward")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last value."""
        return self.linear or self.cosine or (self.value or 0.0, self.value or 0.0)


class Piecewise(Section):
    """Schedules one after the other; between two of them the earlier one's last value holds."""

    pieces: Annotated[list[Schedule], Field(min_length=1)]
    """In the order of their `steps`, which each of them names; no two overlap."""

    @model_validator(mode="after")
    def _in_order(self) -> Piecewise:
        if any(piece.steps is None for piece in self.pieces):
            raise ValueError("each piece names its `steps`")
        spans = [piece.steps for piece in self.pieces if piece.steps is not None]
        for before, after in itertools.pairwise(spans):
            if after[0] < before[1]:
                raise ValueError(f"the pieces of steps {list(before)} and {list(after)} overlap or "
                                 "are out of order")
        return self


class TaidSchedule(Section):
    """TAID's update of its interpolation (arXiv 2501.16937).

    It rises from the first value to the second, never slower than linearly over the run, and
    faster while the divergence falls.
    """

    # By it `_value_kind` knows the kind.
    model_config = ConfigDict(json_schema_extra={"required": ["adaptive"]})
    adaptive: Annotated[tuple[Share, Share], FROM_A_LIST] = (0.4, 1.0)
    """[first value, last value]."""
    rate: Share = 5e-4
    """α: the most that one step goes, as a share of the distance that is left to 1."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """β: of the divergence's relative change."""

    @model_validator(mode="after")
    def _rises(self) -> TaidSchedule:
        if self.adaptive[0] > self.adaptive[1]:
            raise ValueError(f"adaptive {list(self.adaptive)} falls, and the interpolation only "
                             "rises")
        return self


AnySchedule = Schedule | Piecewise | TaidSchedule
ScheduledValue = float | AnySchedule

# Tags of the unions below. pydantic puts them into the location of an error; parse.py drops them.
VALUE_KINDS = ("a number", "a schedule", "a piecewise schedule", "a TAID schedule",
               "a scheduled number", "a number per token", "a number per side", "a name",
               "a mapping")
(NUMBER, SCHEDULE, PIECEWISE, TAID, SCHEDULED, PER_TOKEN, PER_SIDE, NAME, MAPPING) = VALUE_KINDS


# Their keys, for parse.py.
VALUE_SECTIONS: dict[str, type[Section]] = {
    SCHEDULE: Schedule, PIECEWISE: Piecewise, TAID: TaidSchedule}


def _value_kind(value: object) -> str:
    """The tag of the one type that `value` is checked against, so that one error is reported."""
    if isinstance(value, Mapping):
        if "pieces" in value:
            return PIECEWISE
        return TAID if "adaptive" in value else SCHEDULE
    return next((tag for tag, kind in VALUE_SECTIONS.items() if isinstance(value, kind)), NUMBER)


Scheduled = Annotated[
    Annotated[Finite, Tag(NUMBER)] | Annotated[Schedule, Tag(SCHEDULE)]
    | Annotated[Piecewise, Tag(PIECEWISE)] | Annotated[TaidSchedule, Tag(TAID)],
    Discriminator(_value_kind)]

# What the loss can measure of each token: the names that `amid_ds.losses.PerToken` takes.
Measure = Literal["teacher_entropy", "student_entropy", "divergence", "label_probability",
                  "overlap"]


class PerTokenSpec(Section):
    """A value of each token: linear in a measure of the token between two values of it.

    See `amid_ds.losses.PerToken`, which has the defaults too.
    """

    by: Measure
    """The measure."""
    linear: Annotated[tuple[Scheduled, Scheduled], FROM_A_LIST] | None = None
    """[value where the measure is at the first of `at`, value at the second]; constant outside.
    None: [0, 1]."""
    at: Annotated[tuple[Scheduled, Scheduled], FROM_A_LIST] | None = None
    """Two values of the measure, the lower first. None: [0, 1]."""
    over: Literal["token", "sequence"] = "token"
    """sequence: the measure's mean over the token's sequence counts."""

    @model_validator(mode="after")
    def _at_goes_forward(self) -> PerTokenSpec:
        if self.at is not None:
            low, high = map(bounding_values, self.at)
            if max(low) >= min(high):
                raise ValueError(f"`at` goes from {max(low):g} to {min(high):g}: the first value "
                                 "is below the second, in every step")
        return self


VALUE_SECTIONS[PER_TOKEN] = PerTokenSpec


def _per_token_kind(value: object) -> str:
    """As `_value_kind`. A schedule has `linear` too, and none of a token's other keys."""
    is_per_token = (bool(value.keys() & {"by", "at", "over", "top"}) if isinstance(value, Mapping)
                    else isinstance(value, PerTokenSpec))
    return PER_TOKEN if is_per_token else SCHEDULED


PerTokenOrScheduled = Annotated[
    Annotated[PerTokenSpec, Tag(PER_TOKEN)] | Annotated[Scheduled, Tag(SCHEDULED)],
    Discriminator(_per_token_kind)]


def by_name(value: object) -> str:
    """The tag of a union of a NAME and a MAPPING."""
    return MAPPING if isinstance(value, Mapping) else NAME


def scheduled_parts(value: object, name: str = "") -> Iterator[tuple[str, AnySchedule]]:
    """(dotted name, schedule) of every schedule in `value`: a section, mapping or sequence of the
    recipe, or a schedule itself, which is called `name`."""
    if isinstance(value, AnySchedule):
        yield name, value
        return
    for key, part in _parts(value):
        yield from scheduled_parts(part, f"{name}.{key}" if name else str(key))


def with_schedules(value: object, replaced: Callable[[AnySchedule], float]) -> Any:
    """`value` with what `replaced` makes of every schedule in it."""
    if isinstance(value, AnySchedule):
        return replaced(value)
    changed = {key: with_schedules(part, replaced) for key, part in _parts(value)
               if any(scheduled_parts(part))}
    if not changed:
        return value
    if isinstance(value, Section):
        return value.model_copy(update=changed)
    parts = {**dict(_parts(value)), **changed}
    return parts if isinstance(value, Mapping) else tuple(parts.values())


def per_token_parts(value: object) -> Iterator[PerTokenSpec]:
    """Every value of each token in `value`, a section, mapping or sequence of the recipe."""
    if isinstance(value, PerTokenSpec):
        yield value
        return
    for _, part in _parts(value):
        yield from per_token_parts(part)


def _parts(value: object) -> Iterator[tuple[Any, object]]:
    """(key or index, part) of a section, mapping or sequence; nothing of anything else."""
    if isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif isinstance(value, (Section, Mapping)):
        yield from value if isinstance(value, Section) else value.items()


def bounding_values(scheduled: ScheduledValue | PerTokenSpec) -> list[float]:
    """The values between which `scheduled` stays in every step; it reaches the extreme ones."""
    if isinstance(scheduled, PerTokenSpec):
        return [bound for end in scheduled.linear or (0.0, 1.0) for bound in bounding_values(end)]
    if isinstance(scheduled, Piecewise):
        return [end for piece in scheduled.pieces for end in piece.ends]
    if isinstance(scheduled, TaidSchedule):
        return list(scheduled.adaptive)
    return list(scheduled.ends) if isinstance(scheduled, Schedule) else [scheduled]


def within(low: float, high: float, open_low: bool = False) -> AfterValidator:
    """A validator of all values: in [low, high], or in (low, high] with `open_low`."""
    def check(scheduled: Any) -> Any:
        for value in bounding_values(scheduled):
            if value < low or value > high or (open_low and value == low):
                raise ValueError(f"values {'above' if open_low else 'from'} {low:g}"
                                 + ("" if high == math.inf else f" to {high:g}"))
        return scheduled
    return AfterValidator(check)
