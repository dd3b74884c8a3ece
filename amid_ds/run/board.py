"""TensorBoard's event files.

Written here and not by its SummaryWriter: that writes in a thread, which a disk that is full for a
moment ends for good, and every later call raises.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from amid_ds.files.append import EnduringFile

FILE_VERSION = "brain.Event:2"


class Board:
    """The curves and notes of one attempt.

    Those that earlier attempts wrote from `first_step` on are hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self.file = EnduringFile(folder / f"events.out.tfevents.{time.time():010.0f}."
                                          f"{socket.gethostname()}.{os.getpid()}.0")
        self._add(file_version=FILE_VERSION)
        self._add(step=first_step, file_version=FILE_VERSION)
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve, by its tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step=step, summary=Summary(value=[
            Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def add_note(self, tag: str, text: str, step: int = 0) -> None:
        """Add a text, in Markdown."""
        from torch.utils.tensorboard.summary import text as text_summary

        self._add(step=step, summary=text_summary(tag, text))

    def _add(self, **event: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
        self.file.append(record.getvalue())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class HasNotes(Protocol):
    """What takes texts: a Board, a TrackerProcess."""

    def add_note(self, tag: str, text: str) -> None:
        """Add a text."""


class NoteHandler(logging.Handler):
    """Adds each warning of this process to a run's boards and trackers as a note."""

    def __init__(self, takers: Sequence[HasNotes]) -> None:
        super().__init__(logging.WARNING)
        self.takers, self.process = takers, os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        # Not in the data's workers, which are forked with this handler.
        if os.getpid() == self.process:
            for taker in self.takers:
                taker.add_note("alarm", record.getMessage())
