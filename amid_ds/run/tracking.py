"""The process of one tracker: it follows a run's files and sends what is new.

TrackerProcess starts it. Its stdin has an order and then messages, each a line of JSON; its stdout
says what the tracker calls the run, and the first failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from amid_ds.errors import printable
from amid_ds.files.json_lines import has_step, is_number
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import curves_of_evaluation, curves_of_step, texts_of_sample
from amid_ds.run.tracker_clients import CLIENTS, Point, TrackerClient

# Seconds between two looks at the files, after a failure, and at most after the end of the run.
FOLLOW_EVERY_S = 1.0
RETRY_S = 60.0
REST_S = 120.0
# Read at once, and sent at once.
MOST_READ_BYTES = 1 << 20
MOST_NOTES = 100
MOST_FAILURE_CHARACTERS = 400
# What could end it with the run instead of after it.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SECRETS = re.compile(r"(?<=//)[^/\s@]+@|(?<=token=)[^&\s]+")


def follow_run() -> None:
    """Feed a tracker until its run has ended, then end the process."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    commands, answers = _take_streams()
    order = json.loads(commands.readline() or "null")
    if order is not None:
        _Follower(order, commands, answers).follow()
    # What the packages registered with atexit may wait for a server without a limit.
    os._exit(0)


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """This process's stdin and stdout, in whose place what it starts and prints finds nothing."""
    streams = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    return streams


class _Source:
    """A file of JSON lines, from which points are taken once they were sent.

    shown: a line's values or texts by their tags.
    """

    def __init__(self, path: Path, first: int,
                 shown: Callable[[Mapping[str, Any]], Mapping[str, Any]],
                 is_text: bool = False) -> None:
        self.path, self.first, self.shown, self.is_text = path, first, shown, is_text
        self.position = self.reached = 0

    def read(self) -> list[Point] | None:
        """The next points, of steps from `first` on; None where there is no whole line more."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.position)
                lines = file.read(MOST_READ_BYTES)
        except FileNotFoundError:
            return None
        whole = lines[:lines.rfind(b"\n") + 1]
        self.reached = self.position + len(whole)
        return [point for line in whole.splitlines() for point in self._points(line)] \
            if whole else None

    def _points(self, line: bytes) -> list[Point]:
        try:
            values = json.loads(line)
            if not has_step(values) or values["step"] < self.first:
                return []
            shown = self.shown(values)
            if self.is_text:
                return [Point(values["step"], {}, shown)]
            return [Point(values["step"], {tag: value for tag, value in shown.items()
                                           if is_number(value)}, {})]
        # A line that a crash has cut.
        except (ValueError, KeyError, TypeError, AttributeError):
            return []

    def taken(self) -> None:
        """What was read is the tracker's now."""
        self.position = self.reached


class _Follower:
    """Sends a run's files to a tracker until it is told to end, or the run's process has gone."""

    def __init__(self, order: Mapping[str, Any], commands: BinaryIO, answers: BinaryIO) -> None:
        self.order, self.answers = order, answers
        self.run = RunFolder(Path(order["run"]))
        self.sources = [
            _Source(self.run.metrics, order["start"] + 1, curves_of_step),
            _Source(self.run.evaluations, order["start"] + 1, curves_of_evaluation),
            _Source(self.run.samples, order["start"] + 1, texts_of_sample, is_text=True),
            # Scores of a checkpoint come at any later time: those of all steps, in each attempt.
            _Source(self.run.task_scores, 0, partial(curves_of_evaluation, above="tasks"))]
        self.client: TrackerClient | None = None
        self.notes: deque[tuple[str, str]] = deque(maxlen=MOST_NOTES)
        self.report: Path | None = None
        self.has_failed = False
        self.retry_at = 0.0
        self.messages: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(commands,), daemon=True).start()

    def _listen(self, commands: BinaryIO) -> None:
        for line in commands:
            self.messages.put(json.loads(line))
        self.messages.put(["end", "failed"])
        time.sleep(REST_S)
        os._exit(1)

    def follow(self) -> None:
        """Send what there is and what comes, and close the tracker at the end."""
        outcome = None
        while outcome is None:
            outcome = self._next_message()
            if outcome is not None or time.monotonic() >= self.retry_at:
                self._send()
        if self.client is not None:
            self._try(self.client.close, outcome)

    def _next_message(self) -> str | None:
        """What became of the run once it has ended; None in FOLLOW_EVERY_S seconds at most."""
        try:
            kind, *texts = self.messages.get(timeout=FOLLOW_EVERY_S)
        except queue.Empty:
            # Processes that the run's has forked may hold the other end of the pipe.
            return None if os.getppid() == self.order["parent"] else "failed"
        if kind == "note":
            self.notes.append((texts[0], texts[1]))
        elif kind == "report":
            self.report = Path(texts[0])
        return texts[0] if kind == "end" else None

    def _send(self) -> None:
        if self.client is None and not self._try(self._open):
            return
        client = self.client
        assert client is not None
        if not all(self._try(self._send_source, source) for source in self.sources):
            return
        # Once, whether it works or not.
        while self.notes:
            self._try(client.add_note, *self.notes.popleft())
        if self.report is not None:
            page, self.report = self.report, None
            self._try(client.add_report, page)

    def _open(self) -> None:
        client = CLIENTS[self.order["tracker"]](self.run, self.order["id"])
        # An id that is known opens the same run, should a later part fail.
        self.order = {**self.order, "id": client.id}
        self.client = client
        self._answer(id=client.id, place=client.place)
        self._try(client.add_config, self.order["config"])

    def _send_source(self, source: _Source) -> None:
        assert self.client is not None
        while (points := source.read()) is not None:
            self.client.add_points(points)
            source.taken()

    def _try(self, work: Callable[..., None], *arguments: object) -> bool:
        """True where `work` was done; else a failure is told, the first one alone."""
        try:
            work(*arguments)
            return True
        # A package may raise anything, and SystemExit.
        except BaseException as error:
            self.retry_at = time.monotonic() + RETRY_S
            if not self.has_failed:
                self.has_failed = True
                text = " ".join(f"{type(error).__name__}: {error}".split())
                self._answer(failed=printable(SECRETS.sub("", text)[:MOST_FAILURE_CHARACTERS]))
            return False

    def _answer(self, **message: str) -> None:
        # OSError: the run's process has gone.
        with contextlib.suppress(OSError):
            self.answers.write(json.dumps(message).encode() + b"\n")

