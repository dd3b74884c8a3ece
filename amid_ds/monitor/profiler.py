"""A few steps seen by torch's profiler: every operator, kernel and collective under the phase that it belongs to.

A trace per rank, in the format that https://ui.perfetto.dev and chrome://tracing open. Steps that are profiled are
slower than others; `train.profile` says which they are, and costs nothing in all the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from amid_ds.config.recipe import ProfileSteps
from amid_ds.monitor.step_timer import StepTimer

PROFILE_FOLDER = "profile"      # in the run's folder


class Profiler:
    """Traces steps `start` to `start + steps - 1` of this rank into `run`/profile/."""

    def __init__(self, wanted: ProfileSteps | None, run: Path, rank: int, meter: StepTimer, say: Callable[[str], None]) -> None:
        self.wanted, self.folder, self.rank, self.meter, self.say = wanted, run / PROFILE_FOLDER, rank, meter, say
        self.running: torch.profiler.profile | None = None

    def step(self, number: int) -> None:
        """Optimizer step `number` (from 1) begins now, or would, were the one before not the last."""
        wanted = self.wanted
        if wanted is None:
            return
        if self.running is not None and number >= wanted.start + wanted.steps:
            self.end()
        elif number == wanted.start:
            self.running = torch.profiler.profile()      # of the CPU and, where there is one, the GPU
            self.running.start()
            self.meter.profiled = True

    def end(self) -> None:
        """Write what was traced; a run that stops within the steps leaves those that it made."""
        if self.running is None or self.wanted is None:
            return
        self.meter.profiled = False
        self.running.stop()
        path = self.folder / f"step_{self.wanted.start:08d}_rank_{self.rank}.json"
        try:
            self.folder.mkdir(exist_ok=True)
            self.running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:      # a convenience: a full disk does not stop a run
            self.say(f"WARNING: the profile cannot be written: {error}")
        else:
            self.say(f"profile of {self.wanted.steps} step(s) in {self.folder}: open it in https://ui.perfetto.dev")
        self.running = None
