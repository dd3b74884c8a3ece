"""The ways to ask a run to stop in good order, as one question asked before every step.

SIGTERM, SIGUSR1, Ctrl-C and a terminal that closes (SIGHUP) reach single ranks; the file STOP in
the run's folder and the time limit are seen by rank 0 alone. So each rank answers for itself, and
the answers are added up in the small collective that every step makes anyway: all ranks stop before
the same step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from types import FrameType

from amid_ds.distributed.world import World
from amid_ds.errors import Stopped
from amid_ds.run.folder import RunFolder

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A context in which the signals are noted instead of ending the process.

    A second Ctrl-C still ends it at once. run: the folder that a STOP file is looked for in, None
    for none. max_hours: the attempt's time limit, None without one.
    """

    def __init__(self, run: RunFolder | None, max_hours: float | None, is_main: bool) -> None:
        self.stop_file = run.stop_file if run is not None and is_main else None
        self.deadline = None
        if max_hours is not None and is_main:
            self.deadline = time.monotonic() + max_hours * 3600
        self.received: list[int] = []

    def __enter__(self) -> StopRequest:
        # Under nohup a run is to outlive its terminal. Signals reach the main thread alone: in
        # another one they are whoever's started it.
        heard = [number for number in SIGNALS
                 if threading.current_thread() is threading.main_thread()
                 and (number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN)]
        self.previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)

    def reason(self) -> str | None:
        """The reason for which this rank would stop now; None where nobody has asked it to."""
        if self.received:
            return signal.Signals(self.received[0]).name
        # Not Path.exists, which raises where the folder cannot be read for a moment.
        if self.stop_file is not None and os.path.exists(self.stop_file):
            return f"the file {self.stop_file}"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "train.max_hours"
        return None

    def obey(self, world: World) -> None:
        """Raise Stopped on every rank where one was asked to stop. Collective."""
        reason = world.first(self.reason())
        if reason is not None:
            logger.info(f"stopped in order ({reason}); the same command goes on from there")
            raise Stopped

    def honoured(self) -> None:
        """Remove the STOP file: the run has stopped, and it must not stop the next attempt too."""
        if self.stop_file is not None:
            with contextlib.suppress(OSError):
                self.stop_file.unlink(missing_ok=True)
