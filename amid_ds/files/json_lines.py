"""JSON lines that survive a crash, a power loss and a full disk.

The one reader of them in a run's folder: it takes what is whole, and says once what is not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from amid_ds.files.atomic import replace_bytes

logger = logging.getLogger(__name__)

# Whether an object that has the key has all that its file's lines have.
IsWhole: TypeAlias = Callable[[Mapping[str, Any]], bool]


def read_jsonl(path: Path, key: str, is_whole: IsWhole = lambda line: True
               ) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines that have a `key` and are whole; [] without a file.

    What a crash or a power loss has left (a cut line, a cut line with the next one behind it, NULs,
    invalid UTF-8) is left out, and said once. A last line without its end is silently left out
    unless it is whole: it is being written.
    """
    whole, damaged = _read_lines(path, key, is_whole)
    if damaged:
        _warn_of_damage(path, damaged)
    return [line.values for line in whole]


def truncate_jsonl(path: Path, step: int, is_whole: IsWhole) -> None:
    """Keep the whole lines of `path` with a `step` of at most `step`, byte for byte."""
    if path.exists():
        whole, damaged = _read_lines(path, "step", is_whole)
        if damaged:
            _warn_of_damage(path, damaged)
        kept = [line.text for line in whole if line.values["step"] <= step]
        replace_bytes(path, b"".join(text + b"\n" for text in kept))


def has_step(line: Mapping[str, Any]) -> bool:
    """True for a line whose `step` is a number of steps."""
    return type(line["step"]) is int and 0 <= line["step"] < 2**63


def is_number(value: object) -> bool:
    """True for a finite number that a float can hold."""
    with contextlib.suppress(OverflowError):
        return type(value) in (int, float) and math.isfinite(value)   # type: ignore[arg-type]
    return False


class _Line(NamedTuple):
    text: bytes
    values: dict[str, Any]


def _read_lines(path: Path, key: str, is_whole: IsWhole) -> tuple[list[_Line], int]:
    """(the whole lines, the number of damaged ones)."""
    if not path.is_file():
        return [], 0
    *ended, last = path.read_bytes().split(b"\n")
    whole = []
    damaged = 0
    for text in ended:
        lines = [line for line in _objects(text, key) if is_whole(line.values)]
        whole += lines
        damaged += b"".join(line.text for line in lines) != text.strip()
    return whole + [line for line in _objects(last, key) if is_whole(line.values)], damaged


def _objects(text: bytes, key: str) -> Iterator[_Line]:
    """The objects of one line that have the key: the one that it is, or one behind a cut one."""
    # A line that was cut has lost its end to the next one, which begins with the key as it did.
    behind = text.rfind(b'{"' + key.encode() + b'"')
    for part in dict.fromkeys((text, text[behind:] if behind > 0 else text)):
        # After a power loss some file systems leave NULs where the line was to be.
        part = part.strip(b"\0 \t\r")
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(part)
            if isinstance(values, dict) and key in values:
                yield _Line(part, values)
                return


@functools.cache
def _warn_of_damage(path: Path, damaged: int) -> None:
    logger.warning(f"{path}: {damaged} damaged line(s), as a crash may leave them; what is not "
                   "whole is left out")
