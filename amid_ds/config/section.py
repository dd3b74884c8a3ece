"""The base class of the recipe's sections, and the types of number that their keys share.

The string under a key is its meaning; pydantic puts it into the JSON schema as a description.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# The largest integer of 64 bits: no step, seed or size is more, and numpy and torch take no more.
MAX_INT = 2**63 - 1
# Bytes, on Linux.
MAX_NAME, MAX_PATH = 255, 4095

PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _can_be_a_path(text: str) -> str:
    """`text`. Raises ValueError for what no file system has, whatever is there."""
    if "\0" in text:
        raise ValueError("no path has a NUL in it")
    if max(map(len, text.encode().split(b"/"))) > MAX_NAME or len(text) > MAX_PATH:
        raise ValueError(f"a path has at most {MAX_NAME} bytes in a name, and {MAX_PATH} in all")
    return text


PathText = Annotated[str, AfterValidator(_can_be_a_path)]


class Section(BaseModel):
    """A part of the recipe: frozen, closed to unknown keys, and its values of their own types.

    An integer may stand for a float, but not a boolean or a text for a number, nor a number for
    another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True,
                              use_attribute_docstrings=True)
