"""A run as a report needs it: curves, times and attempts, read from its folder."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from amid_ds.errors import InputError
from amid_ds.monitor.memory_probe import Measurements, read_measurements
from amid_ds.monitor.step_timer import PHASES
from amid_ds.run.attempts import AttemptRecord, read_attempts
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_evaluations, read_metrics, read_task_scores

# Points of a curve.
POINTS = 1000
# A line of eval.jsonl; its numbers are None where the run had none.
EvaluationLine = Mapping[str, Any]


class Curve(NamedTuple):
    """Points of a curve; each is the mean of `lines_per_point` logged lines, at the last step."""

    steps: list[int]
    values: list[float]
    lines_per_point: int


class TaskTable(NamedTuple):
    """Rows (task, metric, values by step) over the `steps` whose checkpoints were judged."""

    steps: list[int]
    rows: list[tuple[str, str, list[float | None]]]


@dataclass(frozen=True)
class ReportedRun:
    """One run, as read from its folder.

    measured: the measurements of memory and network, None if there are none; unmeasured: the
    reason.
    """

    name: str
    folder: Path
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[EvaluationLine]
    attempts: Sequence[AttemptRecord]
    measured: Measurements | None
    unmeasured: str

    @property
    def restarts(self) -> list[int]:
        """The first steps of all attempts but the first."""
        return [attempt.first_step for attempt in self.attempts[1:]
                if attempt.first_step is not None]

    def curve(self, key: str) -> Curve:
        """The curve of `key`, without steps that have no value, thinned to POINTS points."""
        points = [(line["step"], line[key]) for line in self.steps if line.get(key) is not None]
        width = math.ceil(len(points) / POINTS) or 1
        parts = [points[start:start + width] for start in range(0, len(points), width)]
        means = [statistics.fmean(value for _, value in part) for part in parts]
        return Curve([part[-1][0] for part in parts], means, width)

    def evaluation_curve(self, name: str, key: str) -> Curve:
        """The curve of `key` on the evaluation set `name`."""
        lines = [line for line in self.evaluations
                 if line["name"] == name and line.get(key) is not None]
        return Curve([line["step"] for line in lines], [line[key] for line in lines], 1)

    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds of all steps by phase. A line's are means over the steps since the last one."""
        total = dict.fromkeys(PHASES, 0.0)
        last_step = 0
        for line in self.steps:
            for name in PHASES:
                total[name] += (line.get(f"time/{name}") or 0.0) * (line["step"] - last_step)
            last_step = line["step"]
        return total

    @property
    def last_evaluations(self) -> list[EvaluationLine]:
        """Each set's last line."""
        return list({line["name"]: line for line in self.evaluations}.values())

    @property
    def evaluation_keys(self) -> list[str]:
        """The keys of these lines: one that samples has more than another."""
        return list(dict.fromkeys(key for line in self.last_evaluations for key in line))


    @property
    def task_table(self) -> TaskTable:
        """What benchmarks have said of the run's checkpoints."""
        values: dict[tuple[str, str], dict[int, float | None]] = {}
        for line in read_task_scores(self.folder):
            for metric in line.keys() - {"step", "name"}:
                values.setdefault((line["name"], metric), {})[line["step"]] = line[metric]
        steps = sorted({step for row in values.values() for step in row})
        return TaskTable(steps, [(name, metric, [values[name, metric].get(step) for step in steps])
                                 for name, metric in sorted(values)])


def read_reported_run(folder: Path, name: str) -> ReportedRun:
    """Read a run's folder. Raises InputError for one without a run that has logged a step."""
    run = RunFolder(folder)
    if not run.exists:
        raise InputError(f"{folder} is not the folder of a run",
                         "a folder with recipe.yaml and metrics.jsonl",
                         "give the recipe's output_dir")
    steps = read_metrics(folder)
    if not steps:
        raise InputError(f"{folder} has no metrics yet", "metrics.jsonl with a step at least",
                         "report on it once it has logged its first step")
    measured = None
    unmeasured = ""
    try:
        measured = read_measurements(folder)
    except InputError as error:
        unmeasured = error.found
    return ReportedRun(name, folder, steps, read_evaluations(folder),
                       read_attempts(folder), measured, unmeasured)
