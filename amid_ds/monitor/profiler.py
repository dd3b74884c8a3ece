"""A few steps under torch's profiler: every operator, kernel and collective, by its phase.

Each rank writes a trace in the format that https://ui.perfetto.dev and chrome://tracing open.
Profiled steps are slower than others; `train.profile` names them, and costs nothing in the others.
"""

from __future__ import annotations

import logging

import torch

from amid_ds.config.recipe import ProfileSteps
from amid_ds.monitor.step_timer import StepTimer
from amid_ds.run.folder import RunFolder

logger = logging.getLogger(__name__)


class Profiler:
    """Traces this rank's optimizer steps `steps` (None: none) into the run's profile/."""

    def __init__(self, steps: ProfileSteps | None, run: RunFolder, rank: int,
                 timer: StepTimer) -> None:
        self.steps, self.folder, self.rank, self.timer = steps, run.profile, rank, timer
        self.running: torch.profiler.profile | None = None

    def step(self, number: int) -> None:
        """Note that optimizer step `number` (from 1) begins, or would begin after the last one."""
        if self.steps is None:
            return
        if self.running is not None and number >= self.steps.start + self.steps.steps:
            self.end()
        elif number == self.steps.start:
            # Of the CPU and, where there is one, the GPU.
            self.running = torch.profiler.profile()
            self.running.start()
            self.timer.profiled = True

    def end(self) -> None:
        """Write the trace; a run that stops among the profiled steps leaves those that it made."""
        if self.running is None or self.steps is None:
            return
        self.timer.profiled = False
        self.running.stop()
        path = self.folder / f"step_{self.steps.start:08d}_rank_{self.rank}.json"
        # A convenience: a full disk does not end a run.
        try:
            self.folder.mkdir(exist_ok=True)
            self.running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.warning("the profile cannot be written: %s", error)
        else:
            logger.info("profile of %d step(s) in %s: open it in https://ui.perfetto.dev",
                        self.steps.steps, self.folder)
        self.running = None
