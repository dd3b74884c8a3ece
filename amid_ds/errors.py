"""What a user did wrong, said so that it can be mended at 3 a.m.: what was found, what was expected, and the remedy."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class InputError(ValueError):
    """The input is wrong: exit status 2, one message, no traceback. Every message has its three parts."""

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{found}\n  expected: {expected}\n  remedy:   {remedy}")
        self.found, self.expected, self.remedy = found, expected, remedy

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:   # ranks send it to one another
        return (InputError, (self.found, self.expected, self.remedy))


class TrainingError(RuntimeError):
    """The run cannot go on (a NaN, a damaged checkpoint): exit status 1, one message, no traceback."""


class Stopped(Exception):
    """The run was asked to stop and did so in good order: exit status 75, start it again to go on."""


def tell(error: Exception) -> None:
    """The one message on stderr; an error that has been told is not told again on its way out."""
    if str(error) and not getattr(error, "told", False):
        error.told = True   # type: ignore[attr-defined]
        print(f"amid-ds: {error}", file=sys.stderr, flush=True)


def suggest(key: str, known: Iterable[str]) -> str:
    """What was perhaps meant by `key`, for a message."""
    known = list(known)
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean `{match[0]}`?" if match else f"known: {', '.join(known)}"
