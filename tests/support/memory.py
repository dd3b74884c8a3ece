"""The memory that this process takes while something runs."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WATCH_S = 0.001


@contextlib.contextmanager
def memory_rise(*keys: str) -> Iterator[list[int]]:
    """A list that after the block holds the peak rise in bytes of each of `keys`, the names of
    lines in /proc/self/status."""
    def used() -> list[int]:
        lines = dict(line.split(":", 1) for line in
                     Path("/proc/self/status").read_text().splitlines())
        return [int(lines[key].split()[0]) << 10 for key in keys]

    gc.collect()
    before, highest, done = used(), used(), threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_S):
            highest[:] = map(max, highest, used())

    watcher = threading.Thread(target=watch)
    watcher.start()
    rise: list[int] = []
    try:
        yield rise
    finally:
        done.set()
        watcher.join()
        rise += [high - low for high, low in zip(highest, before, strict=True)]


def profiled_peak(profile: Any) -> int:
    """The most bytes that lay at once in what was allocated under torch's profiler, with
    `profile_memory`."""
    given = sorted((event.start_ns(), event.nbytes())
                   for event in profile.profiler.kineto_results.events()
                   if event.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in given), initial=0))
