"""Where the time of a start goes, from the process's own beginning to the end of its first step.

The main thread marks the end of each part; every second since then belongs to exactly one, so
a rank's wait for a slower one counts in the part in which it waits. One process is one rank, so the
clock in use is the process's, as `monitor.step_timer` has it; without one `end_part` does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Iterator

from amid_ds.files.atomic import replace_text
from amid_ds.files.lease import process_start_ticks
from amid_ds.run.folder import RunFolder

_current: StartClock | None = None


def process_age() -> float:
    """Seconds since the kernel started this process, to a hundredth."""
    started = process_start_ticks(os.getpid())
    assert started is not None, "this process is alive"
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def end_part(name: str) -> None:
    """The time since the end of the part before belongs to part `name`, of which there may be more.
    """
    if _current is not None:
        _current.end_part(name)


def end_start(name: str) -> StartClock | None:
    """The clock of a start that ends now, with part `name`; None where it has ended before."""
    global _current
    clock, _current = _current, None
    if clock is not None:
        clock.end_part(name)
    return clock


class StartClock:
    """The parts of this process's start. As a context it is the one that `end_part` addresses.

    began: when the start began, by time.monotonic(). parts: seconds by name, in the order of their
    first ends.
    """

    def __init__(self, began: float) -> None:
        self.parts: dict[str, float] = {}
        self._marked = began

    def __enter__(self) -> StartClock:
        global _current
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None

    def end_part(self, name: str) -> None:
        """As the function of this name."""
        now = time.monotonic()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._marked
        self._marked = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"{sum(self.parts.values()):.1f} s to the end of the first step: {parts}"

    def record(self, run: RunFolder) -> None:
        """Write the seconds into the run's provenance.json, as `start`. Raises OSError."""
        facts = json.loads(run.provenance.read_text())
        start = {name: round(seconds, 2) for name, seconds in self.parts.items()}
        replace_text(run.provenance, json.dumps({**facts, "start": start}, indent=1) + "\n")


@contextlib.contextmanager
def imports_kept() -> Iterator[None]:
    """A context for imports alone: nothing is collected in it, nor what it has made later on.

    Modules are hundreds of thousands of objects that live as long as the process. Python's
    collector would go over all of them again and again while they become more, and now and then in
    the middle of a step.
    """
    before, collects = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
            # Libraries that count what they leave behind would complain.
            atexit.register(gc.unfreeze)
        if collects:
            gc.enable()
