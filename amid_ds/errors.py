"""Errors that end a command, and the exit statuses that they become.

A message must be enough to fix the problem at 3 a.m.: it names what was found, what was expected
and the remedy.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import errno
import re
import sys
import traceback
import unicodedata
from collections.abc import Iterable
from pathlib import Path

# Packages that read what a user brings: their own errors are about its content.
_READERS = frozenset({"pyarrow", "safetensors", "safetensors_rust", "huggingface_hub", "datasets",
                      "yaml", "json", "zlib", "_lzma", "zipfile", "_pickle", "zstandard"})
# What a path, its permissions or a full disk cause; any other OSError is the machine's.
_USERS_ERRNOS = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
                           errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP,
                           errno.EXDEV, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# How libraries in Rust report an OSError, as an error of any class.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class ExitStatus(enum.IntEnum):
    """The exit status of a rank and of every command; a launcher may turn it into its own."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    # EX_TEMPFAIL: stopped in good order; a batch system may start the command again.
    RESTART = 75


class InputError(ValueError):
    """The input is wrong: exit status 2, one message in three parts, no traceback.

    agreed: every rank has it.
    """

    agreed = False

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{found}\n  expected: {expected}\n  remedy:   {remedy}")
        self.found, self.expected, self.remedy = found, expected, remedy

    # Ranks send the error to one another, so it must survive pickling.
    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        return (InputError, (self.found, self.expected, self.remedy))


class TrainingError(RuntimeError):
    """The run cannot go on (a NaN, a damaged checkpoint): exit status 1, no traceback.

    agreed: every rank has it.
    """

    agreed = False


class RankError(TrainingError):
    """A failure of one rank that has no peers to agree with: it reports it by itself."""


class RankInputError(InputError):
    """Wrong input of one rank that has no peers to agree with: it reports it by itself."""


class Stopped(Exception):
    """The run stopped in good order when asked to: exit status 75; started again, it goes on."""


def expected_error(error: BaseException) -> InputError | TrainingError | None:
    """What an error is to the user: a message. None for one that only a bug explains.

    The one place where the errors of the operating system and of libraries that read what a user
    brings become ours, where no reader closer to the file has named it.
    """
    if isinstance(error, (InputError, TrainingError)):
        return error
    where = _raised_at(error)
    if isinstance(error, MemoryError):
        detail = f": {error}" if str(error) else ""
        return TrainingError(f"the memory is exhausted{detail}{where}")
    if isinstance(error, RecursionError):
        return InputError(f"the input is nested too deeply{where}", "a nesting of a few levels",
                          "look at the file or value that was read last")
    rust = _RUST_OS_ERROR.search(str(error))
    number = int(rust[1]) if rust else error.errno if isinstance(error, OSError) else None
    # Without a number: a library's own, such as transformers' of a name that is no model.
    if (isinstance(error, OSError) and number is None
            and not isinstance(error, (ConnectionError, TimeoutError))):
        return InputError(f"{error}{where}", "a file, folder or model that can be read",
                          "check the name and its content")
    if number in _FULL:
        return InputError(f"the disk is full: {error}{where}", "room for what is written",
                          "make room there, or write elsewhere")
    if number in _USERS_ERRNOS:
        return InputError(f"{error}{where}", "a path that exists, with the permission to use it",
                          "check the path, its permissions and its file system")
    if isinstance(error, OSError):
        return TrainingError(f"{type(error).__name__}: {error}{where}")
    if (type(error).__module__.partition(".")[0] in _READERS
            or isinstance(error, (UnicodeError, EOFError))):
        return InputError(f"{type(error).__name__}: {error}{where}",
                          "a file that is whole and of the kind that it is read as",
                          "check the file that was read last")
    return None


def _raised_at(error: BaseException) -> str:
    """The last line of this package that an error came through, for whoever looks for its cause."""
    package = Path(__file__).parent
    lines = [f"{Path(frame.filename).relative_to(package)}:{frame.lineno}"
             for frame in traceback.extract_tb(error.__traceback__)
             if package in Path(frame.filename).parents]
    return f" ({lines[-1]})" if lines else ""


def exit_status(error: BaseException | None) -> ExitStatus:
    """The exit status that an error, or the end without one, becomes."""
    if error is None:
        return ExitStatus.DONE
    error = expected_error(error) or error
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
    """Print on stderr without logging, whose lock a thread that never goes on may hold.

    A message that cannot be written is dropped.
    """
    with contextlib.suppress(OSError, ValueError):
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
