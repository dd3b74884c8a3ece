"""Standard streams that nobody reads: a message is dropped, a command's output ends it with one.

A closed terminal, `| head` and a full disk must not end a run of days, nor print a traceback.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from amid_ds.errors import TrainingError

# Of a stream that cannot be written; ValueError: it is closed.
_UNWRITABLE = (OSError, ValueError, TrainingError)


class _OutputStream:
    """A stream for a command's results. TrainingError where they cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except _UNWRITABLE as error:
            return self.failed(error)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except _UNWRITABLE as error:
            self.failed(error)

    def failed(self, error: Exception) -> int:
        raise TrainingError(f"the output cannot be written: {error}") from None


class _MessageStream(_OutputStream):
    """A stream for messages: those that cannot be written are dropped."""

    def failed(self, error: Exception) -> int:
        return 0


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """A command's streams: stdout for its results, stderr for messages."""
    _open_closed_streams()
    # Handlers of libraries would print a traceback for each message that they cannot write.
    logging.raiseExceptions = False
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _OutputStream(stdout), _MessageStream(stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for stream in (stdout, stderr):
            _discard_unwritten(stream)


@contextlib.contextmanager
def output_is_messages() -> Iterator[None]:
    """What is written to stdout inside are messages: a run's results are in its folder."""
    stdout = sys.stdout
    sys.stdout = _MessageStream(stdout)
    try:
        yield
    finally:
        sys.stdout = stdout
        _discard_unwritten(stdout)


def _open_closed_streams() -> None:
    """Occupy the descriptors of streams that were closed when the process began.

    A file that is opened later would get the number, and with it what libraries print. They are
    opened for reading, so that writing is an error still.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDONLY if number else os.O_WRONLY)
        if getattr(sys, name) is None and number:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _discard_unwritten(stream: TextIO) -> None:
    """Flush, and drop what cannot be: at its exit the interpreter would end with 120 for it."""
    try:
        stream.flush()
    except _UNWRITABLE:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
            stream.flush()
