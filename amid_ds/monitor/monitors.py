"""Everything that watches a step: hang watchdog, profiler, timer, anomalies, memory probe.

    with Monitors(recipe, world, attempt, costs, steps_before) as monitors:
        for step in ...:
            monitors.step_begin(step)
            # ... agree with the other ranks whether to go on
            monitors.step_agreed()
            with monitors.train_step(engine):
                ...
            seconds = monitors.step_end(sampled)
            # ... log `monitors.metrics(uses_teacher)`, evaluate, save
            monitors.restart_clock()
        monitors.rest()
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from amid_ds.config.recipe import Recipe
from amid_ds.distributed.world import World
from amid_ds.monitor.anomalies import AnomalyMonitor
from amid_ds.monitor.hang_watchdog import HangWatchdog
from amid_ds.monitor.memory_probe import PROBED_STEP, probe_step
from amid_ds.monitor.profiler import Profiler
from amid_ds.monitor.step_timer import StepTimer
from amid_ds.run.attempts import Attempt
from amid_ds.run.folder import RunFolder

if TYPE_CHECKING:
    from amid_ds.engine.engine import Engine


class PlannedCosts(NamedTuple):
    """FLOPs of a rank's `student` and `teacher` in a step, and its device's peak in FLOP/s.

    The peak is None where it is not known.
    """

    flops: Mapping[str, float]
    peak_flops: float | None


class Monitors:
    """All that watches the steps of one attempt on this rank; a context, made by all ranks.

    steps_before: optimizer steps done before this attempt.
    """

    def __init__(self, recipe: Recipe, world: World, attempt: Attempt, costs: PlannedCosts,
                 steps_before: int) -> None:
        self.recipe, self.world, self.attempt = recipe, world, attempt
        self.step, self.steps_before, self.logged_step = steps_before, steps_before, steps_before
        self.watchdog = HangWatchdog(recipe.train.hang_timeout, world, attempt)
        self.timer = StepTimer(world.device, costs.flops, costs.peak_flops, world.rank)
        self.anomalies = AnomalyMonitor(world.name_of, world.size, world.tp_size)
        run = RunFolder(Path(recipe.output_dir))
        self.profiler = Profiler(recipe.train.profile, run, world.rank, self.timer)
        self._stack = contextlib.ExitStack()
        self._began = time.monotonic()

    def __enter__(self) -> Monitors:
        self._stack.enter_context(self.watchdog)
        self._stack.enter_context(self.timer)
        self.restart_clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def restart_clock(self) -> None:
        """The next step's time starts now."""
        self._began = time.monotonic()

    def step_begin(self, step: int) -> None:
        """Optimizer step `step` (from 1) begins, unless the ranks agree to stop."""
        self.step = step
        self.watchdog.step(step)
        self.profiler.step(step)

    def step_agreed(self) -> None:
        """Every rank has come to the step and goes on."""
        self.attempt.stepping(self.step)

    def train_step(self, engine: Engine) -> contextlib.AbstractContextManager[None]:
        """The context of the train step itself: rank 0 measures the fourth one of an attempt."""
        if self.world.is_main and self.step == self.steps_before + PROBED_STEP:
            return probe_step(engine, self.recipe, self.step)
        return contextlib.nullcontext()

    def step_end(self, sampled: bool) -> float:
        """The step's seconds; looks for a loss that jumps and a rank that is slow.

        sampled: the step learnt from student samples.
        """
        seconds = time.monotonic() - self._began
        assert self.timer.peers is not None
        self.anomalies.step(self.step, self.timer.peers, sampled)
        return seconds

    def metrics(self, uses_teacher: bool) -> dict[str, float | None]:
        """Times, FLOPs and memory since the last call, for a line of metrics.jsonl."""
        line = self.timer.line(self.step - self.logged_step, uses_teacher)
        self.logged_step = self.step
        assert self.timer.peers is not None
        return {**line, "perf/slowest_rank": self.timer.peers.slowest.rank}

    @property
    def slowest_name(self) -> str | None:
        """The slowest rank and its host; None for a rank that is alone."""
        if self.timer.peers is None or self.world.size == 1:
            return None
        return self.world.name_of(self.timer.peers.slowest.rank)

    def evaluation_begin(self) -> None:
        """An evaluation after the step begins; it may take as long as a step."""
        self.watchdog.step(self.step)

    def rest(self) -> None:
        """The last step is over: no time limit from here on."""
        self.watchdog.rest()
        self.profiler.end()
