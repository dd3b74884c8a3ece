"""Where a step's time and memory go, measured in every step of every run.

The main thread marks the ends of a step's phases: by the clock on a CPU, by events in the device's
own stream on a GPU, so that nothing waits for the measurement. Every second between two marks
belongs to exactly one phase. One process is one rank, so the timer in use is the process's, as
torch's profiler is; without one `phase` does nothing. Its cost is in this folder's README.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch

from amid_ds.distributed.world import Peak
from amid_ds.monitor.rank_stats import LocalStats, PeerStats, RecentWork

PHASES = ("data", "rollout", "teacher", "forward", "loss", "backward", "optimizer", "checkpoint",
          "evaluation", "other")
# Phases that are no part of a step's time.
OUTSIDE_STEPS = ("checkpoint", "evaluation")

_current: StepTimer | None = None


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A context whose time belongs to phase `name`, except for the phases inside it.

    It is also a span of the profile, in profiled steps.
    """
    timer = _current
    if timer is None:
        yield
        return
    timer.begin(name)
    try:
        with torch.profiler.record_function(name) if timer.profiled else contextlib.nullcontext():
            yield
    finally:
        timer.end()


def local_stats() -> LocalStats:
    """What this rank tells the others of the time since the last call and of its memory."""
    if _current is None:
        return RecentWork(0).local(0.0)
    _current.recent.add(*_current.own_and_step_seconds())
    return _current.recent.local(_current.memory()["peak"])


def set_peer_stats(loss: float, sums: Sequence[float], peaks: Sequence[Peak]) -> None:
    """Keep what the ranks' `local_stats` amount to (see RecentWork.combine)."""
    if _current is not None:
        _current.peers = _current.recent.combine(loss, sums, peaks)


class StepTimer:
    """This rank's timeline and memory. As a context it is the one that `phase` addresses.

    flops: planned, of this rank's `student` and `teacher` in a step. peak_flops: the device's peak
    in FLOP/s, None where it is not known. peers: None before the first step's reductions.
    """

    def __init__(self, device: torch.device, flops: Mapping[str, float],
                 peak_flops: float | None, rank: int = 0) -> None:
        self.device, self.flops, self.peak_flops = device, flops, peak_flops
        self.profiled = False
        self.seconds: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self.recent = RecentWork(rank)
        self.peers: PeerStats | None = None
        self._open = ["other"]
        self._marks: deque[tuple[str, Any]] = deque()
        self._process = psutil.Process()
        # The seconds at the last logged line.
        self._logged: Counter[str] = Counter()
        self._mark()

    def __enter__(self) -> StepTimer:
        global _current
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None

    def begin(self, name: str) -> None:
        """Open phase `name`."""
        self._open.append(name)
        self._mark()

    def end(self) -> None:
        """Close the innermost open phase."""
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        mark = torch.cuda.Event(enable_timing=True) if self.device.type == "cuda" else _HostMark()
        mark.record()
        self._marks.append((self._open[-1], mark))

    def _drain(self) -> None:
        """Add up the time between marks that the device has reached."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            name, mark = self._marks.popleft()
            self.seconds[name] += mark.elapsed_time(self._marks[0][1]) / 1e3

    def own_and_step_seconds(self) -> tuple[float, float]:
        """Seconds since the last call: in data and loss, where this rank waits for no other one,
        and in steps altogether.

        In every other phase ranks wait for the slowest, and all take as long as it does. Under
        tensor parallelism they do so in the loss too, within their group: there a slow rank's whole
        group looks slow.
        """
        self._drain()
        spent = {name: self.seconds[name] - self.counted[name] for name in PHASES}
        self.counted = Counter(self.seconds)
        return (spent["data"] + spent["loss"],
                sum(seconds for name, seconds in spent.items() if name not in OUTSIDE_STEPS))

    def memory(self) -> dict[str, int]:
        """Bytes: `reserved` by torch now, and the `peak`, on a GPU; resident memory on a CPU."""
        if self.device.type == "cuda":
            return {"reserved": torch.cuda.memory_reserved(self.device),
                    "peak": torch.cuda.max_memory_reserved(self.device)}
        resident = self._process.memory_info().rss
        # In KiB; the kernel updates it only now and then.
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"reserved": resident, "peak": max(resident, peak_kib * 1024)}

    def line(self, steps: int, uses_teacher: bool) -> dict[str, float | None]:
        """Metrics of the `steps` steps since the last line.

        Seconds per step by phase, FLOPs per step, MFU, memory in bytes. `time/step` leaves out
        OUTSIDE_STEPS; `memory/peak` is the highest of all ranks; the teacher's FLOPs are 0 unless a
        step `uses_teacher`. On a GPU the end of the last step, which it may not have reached yet,
        counts in the next line: to wait for it would leave the GPU without work.
        """
        self._mark()
        self._drain()
        spent = {name: (self.seconds[name] - self._logged[name]) / steps for name in PHASES}
        self._logged = Counter(self.seconds)
        step_s = sum(seconds for name, seconds in spent.items() if name not in OUTSIDE_STEPS)
        flops = {name: count if uses_teacher or name == "student" else 0.0
                 for name, count in self.flops.items()}
        memory = self.memory()
        if self.peers is not None:
            memory["peak"] = max(memory["peak"], int(self.peers.peak_bytes.value))
        mfu = None
        if flops and self.peak_flops:
            mfu = sum(flops.values()) / (step_s * self.peak_flops)
        return {"time/step": step_s,
                **{f"time/{name}": seconds for name, seconds in spent.items()},
                **{f"perf/{name}_flops": count for name, count in flops.items()},
                "perf/mfu": mfu,
                **{f"memory/{name}": size for name, size in memory.items()}}


class _HostMark:
    """A point on the host's clock, with the methods of torch.cuda.Event."""

    __slots__ = ("time",)

    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _HostMark) -> float:
        return (later.time - self.time) * 1e3
