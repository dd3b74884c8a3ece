"""Records appended to a file, each whole or not at all, also on a disk that is full for a while."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
from pathlib import Path

logger = logging.getLogger(__name__)


def append_line(path: Path, line: str) -> None:
    """Append a line in a single write. Raises OSError, with nothing written.

    Never onto a line that a crash has cut: that is ended first.
    """
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        cut = file.read(1) not in (b"", b"\n")
        _append(file, b"\n" * cut + line.encode() + b"\n")


class EnduringFile:
    """A file that is appended to while a run goes on, and that never ends it.

    A record that a full disk refuses waits in memory, and is tried again with the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path, "ab", buffering=0)   # noqa: SIM115 - closed by `close`
        self.waiting = b""
        self.failing = False
        # A warning of another thread may be a record; one about this file is made inside `append`.
        self.lock = threading.RLock()

    def append(self, record: bytes) -> None:
        """Append the record, behind those that wait in memory. Any thread may call it."""
        with self.lock:
            self._append(record)

    def _append(self, record: bytes) -> None:
        self.waiting += record
        try:
            _append(self.file, self.waiting)
        except OSError as error:
            # Said once: a warning may lead to the next record.
            if not self.failing:
                self.failing = True
                logger.warning(f"{self.path.name} cannot be written, what is to be added waits in "
                               f"memory: {error}")
            return
        self.waiting = b""
        if self.failing:
            self.failing = False
            logger.info(f"{self.path.name} is written again, nothing is missing")

    def close(self) -> None:
        """Close the file, after a last try to write what waits in memory."""
        if self.waiting:
            self.append(b"")
        if self.waiting:
            logger.warning(f"{self.path.name} lacks its last {len(self.waiting):,} bytes, which "
                           "could not be written")
        with contextlib.suppress(OSError):
            self.file.close()


def _append(file: io.FileIO, record: bytes) -> None:
    """Append the record whole, or raise OSError with nothing appended."""
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(record) != len(record):
            raise OSError("only a part was written")
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise
