"""Errors that end a command, and the exit statuses that they become.

A message must be enough to fix the problem at 3 a.m.: it names what was found, what was expected
and the remedy.
"""

from __future__ import annotations

import difflib
import enum
import sys
import unicodedata
from collections.abc import Iterable


class ExitStatus(enum.IntEnum):
    """The exit status of a rank and of every command; a launcher may turn it into its own."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    # EX_TEMPFAIL: stopped in good order; a batch system may start the command again.
    RESTART = 75


class InputError(ValueError):
    """The input is wrong: exit status 2, one message in three parts, no traceback."""

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{found}\n  expected: {expected}\n  remedy:   {remedy}")
        self.found, self.expected, self.remedy = found, expected, remedy

    # Ranks send the error to one another, so it must survive pickling.
    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        return (InputError, (self.found, self.expected, self.remedy))


class TrainingError(RuntimeError):
    """The run cannot go on (a NaN, a damaged checkpoint): exit status 1, no traceback."""


class Stopped(Exception):
    """The run stopped in good order when asked to: exit status 75; started again, it goes on."""


def exit_status(error: BaseException | None) -> ExitStatus:
    """The exit status that an error, or the end without one, becomes."""
    if error is None:
        return ExitStatus.DONE
    if isinstance(error, InputError):
        return ExitStatus.BAD_INPUT
    return ExitStatus.RESTART if isinstance(error, Stopped) else ExitStatus.FAILED


# Unicode's categories of what a terminal obeys, what changes the order of what it shows, and halves
# of characters, which no file or stream takes.
UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: str, keep: str = "\n\t") -> str:
    """`text` with an escape such as \\x1b for each unprintable character that is not in `keep`.

    For whatever a terminal or a page shows and somebody else may have named: a run, a file, a set.
    """
    return "".join(character if character in keep
                   or unicodedata.category(character) not in UNPRINTABLE
                   else character.encode("unicode_escape").decode() for character in text)


def print_error(message: str) -> None:
    """Print on stderr without logging, whose lock a thread that never goes on may hold."""
    print(f"amid-ds: {printable(message)}", file=sys.stderr, flush=True)


def report_error(error: Exception) -> None:
    """Print the error's message on stderr, once however often it is reported on its way out."""
    if str(error) and not getattr(error, "reported", False):
        error.reported = True   # type: ignore[attr-defined]
        print_error(str(error))


def suggest(key: str, known: Iterable[str]) -> str:
    """A sentence for a message about an unknown `key`: the nearest known one, or all of them."""
    known = list(known)
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean `{match[0]}`?" if match else f"known: {', '.join(known)}"
