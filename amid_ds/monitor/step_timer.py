"""Where a step's time and memory go, measured in every step of every run.

The main thread marks when one phase of a step ends and the next begins: by the clock on a CPU, by events in the
device's own stream on a GPU, so that nothing waits for the measurement. Every second between two marks belongs to
exactly one phase. One process is one rank, so the meter in use is the process's, as torch's profiler is; where none is,
`phase` does nothing. What it costs is in the README.
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

PHASES = ("data", "rollout", "teacher", "forward", "loss", "backward", "optimizer", "checkpoint", "evaluation", "other")
OUTSIDE_STEPS = ("checkpoint", "evaluation")      # time that no step takes

_current: StepTimer | None = None


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What runs within belongs to phase `name`, but for phases inside it; also a span of a profile that is taken."""
    meter = _current
    if meter is None:
        yield
        return
    meter.begin(name)
    try:
        with torch.profiler.record_function(name) if meter.profiled else contextlib.nullcontext():
            yield
    finally:
        meter.end()


def local_stats() -> list[float]:
    """What the other ranks should know of this one: its seconds of its own since the last call, its peak of memory."""
    return [0.0, 0.0] if _current is None else [_current.own_seconds(), _current.memory()["peak"]]


def set_peer_stats(peers: Sequence[Sequence[float]]) -> None:
    """Every rank's part of the step's loss and its `own_figures`, by rank."""
    if _current is not None:
        _current.peers = peers


class StepTimer:
    """This rank's timeline and memory. As a context it is the one that `phase` speaks to."""

    def __init__(self, device: torch.device, flops: Mapping[str, float], peak_flops: float | None) -> None:
        """`flops` of this rank's `student` and `teacher` in a step, as planned; `peak_flops`: what the device could do
        in a second, None where it is not known."""
        self.device, self.flops, self.peak_flops = device, flops, peak_flops
        self.profiled = False
        self.seconds: Counter[str] = Counter()
        self.own_s = 0.0
        self.peers: Sequence[Sequence[float]] = []
        self._open = ["other"]
        self._marks: deque[tuple[str, Any]] = deque()
        self._process = psutil.Process()
        self._read: Counter[str] = Counter()      # at the line before
        self._mark()

    def __enter__(self) -> StepTimer:
        global _current
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None

    def begin(self, name: str) -> None:
        self._open.append(name)
        self._mark()

    def end(self) -> None:
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        mark = torch.cuda.Event(enable_timing=True) if self.device.type == "cuda" else _HostMark()
        mark.record()
        self._marks.append((self._open[-1], mark))

    def _drain(self) -> None:
        """Add up what lies between marks that the device has reached."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            name, mark = self._marks.popleft()
            self.seconds[name] += mark.elapsed_time(self._marks[0][1]) / 1e3

    def own_seconds(self) -> float:
        """Seconds since the last call that this rank took where it waits for no other one: for its data and in the
        loss. In every other phase ranks wait for the slowest, and all take as long as it does. Under tensor parallelism
        they do so in the loss too, within their group: there a slow rank's whole group looks slow."""
        self._drain()
        before, self.own_s = self.own_s, self.seconds["data"] + self.seconds["loss"]
        return self.own_s - before

    def memory(self) -> dict[str, int]:
        """Bytes: `reserved` by torch now and its `peak` on a GPU; resident now and at most on a CPU."""
        if self.device.type == "cuda":
            return {"reserved": torch.cuda.memory_reserved(self.device),
                    "peak": torch.cuda.max_memory_reserved(self.device)}
        resident = self._process.memory_info().rss
        return {"reserved": resident,      # the kernel counts its peak now and then alone
                "peak": max(resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}

    def line(self, steps: int, taught: bool) -> dict[str, float | None]:
        """What a line of metrics.jsonl says of the `steps` steps since the line before: seconds per step by phase,
        FLOPs per step (the teacher's where it is `taught` from), MFU, memory (the peak of all ranks). `time/step`
        leaves out what stands beside steps."""
        self._mark()
        self._marks[-1][1].synchronize()
        self._drain()
        spent = {name: (self.seconds[name] - self._read[name]) / steps for name in PHASES}
        self._read = Counter(self.seconds)
        step_s = sum(seconds for name, seconds in spent.items() if name not in OUTSIDE_STEPS)
        flops = {name: count if taught or name == "student" else 0.0 for name, count in self.flops.items()}
        memory = self.memory()
        memory["peak"] = int(max([memory["peak"], *(peak for *_, peak in self.peers)]))
        mfu = sum(flops.values()) / (step_s * self.peak_flops) if flops and self.peak_flops else None
        return {"time/step": step_s, **{f"time/{name}": seconds for name, seconds in spent.items()},
                **{f"perf/{name}_flops": count for name, count in flops.items()}, "perf/mfu": mfu,
                **{f"memory/{name}": size for name, size in memory.items()}}


class _HostMark:
    """A point on the host's clock, with the words of torch.cuda.Event."""

    __slots__ = ("time",)

    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _HostMark) -> float:
        return (later.time - self.time) * 1e3
