"""JSON that came from a file, checked against the type that the code takes it for."""

from __future__ import annotations

import functools
import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

_T = TypeVar("_T")


def parse_as(kind: type[_T], text: str) -> _T:
    """The value in a JSON text. Raises ValueError, which names the first place that does not fit.

    kind: a TypedDict, for one, whose keys must all be there; further ones may be.
    """
    # Of JSON that is no JSON at all, json says more clearly what is wrong.
    value: _T = json.loads(text)
    try:
        _adapter(kind).validate_json(text, strict=True)   # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
        raise ValueError(f"`{place.lstrip('.') or 'its content'}`: {first['msg']}") from None
    return value


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """Made once a type: that takes 200 times as long as checking a shard's counts with it."""
    return TypeAdapter(kind)
