"""The published rows of ROUGE-L in the package, each with its source and our nearest run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from amid_ds.config.section import Finite, NonNegativeInt, PositiveInt, Section
from amid_ds.config.strict import load_yaml
from amid_ds.errors import InputError, suggest


class PublishedSet(Section):
    """A set that is evaluated on."""

    path: str
    """Its file, in the folder of the published data."""
    rows: PositiveInt | None = None
    """So many of its first rows count; None: all."""


class PublishedRow(Section):
    """A row of a published table."""

    method: str
    """What the table calls it."""
    source: str
    """The table, and who read it."""
    rouge_l: Annotated[dict[str, Finite], Field(min_length=1)]
    """By set, in per cent."""
    average: Finite | None = None
    """The mean over the sets, where it is printed."""
    recipe: str
    """The packaged recipe that is our nearest run, with the overrides."""
    overrides: list[str] = Field(default=[])
    """In the form a.b=c."""
    differs: str
    """What is or may be otherwise in theirs, apart from what the recipe's header says."""


class Published(Section):
    """The rows by name, the sets in the order of the tables, and the seeds of the sampling."""

    sets: dict[str, PublishedSet]
    seeds: list[NonNegativeInt]
    rows: dict[str, PublishedRow]

    @model_validator(mode="after")
    def _of_all_sets(self) -> Published:
        for name, row in self.rows.items():
            if set(row.rouge_l) != set(self.sets):
                raise ValueError(f"the row {name} has other sets than {', '.join(self.sets)}")
        return self


@cache
def published() -> Published:
    """The rows that come with the package."""
    path = Path(__file__).with_suffix(".yaml")
    return Published.model_validate(load_yaml(path.read_text(encoding="utf-8")))


def published_row(name: str) -> PublishedRow:
    """The published row of that name. Raises InputError if there is none."""
    rows = published().rows
    if name not in rows:
        raise InputError(f"no published row {name!r} comes with the package",
                         f"one of {', '.join(rows)}", suggest(name, rows))
    return rows[name]
