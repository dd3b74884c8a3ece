"""What a report shows of `train.samples`: each prompt's answers over the steps, run beside run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amid_ds.experiments.reported_run import ReportedRun

# Steps of a prompt's table, the first and the last among them.
SHOWN_STEPS = 6


@dataclass(frozen=True)
class SampleTable:
    """A prompt's answers: rows of (what answers, its answer in each run; None: there is none)."""

    prompt: str
    runs: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str | None]]]


def sample_tables(runs: Sequence[ReportedRun]) -> list[SampleTable]:
    """A table for each prompt, in the order of the runs; [] where no run has samples."""
    prompts = dict.fromkeys(line["prompt"] for run in runs for line in run.samples)
    return [_table(prompt, [run for run in runs if run.answers(prompt)]) for prompt in prompts]


def _table(prompt: str, runs: Sequence[ReportedRun]) -> SampleTable:
    by_run = [run.answers(prompt) for run in runs]
    teachers = [next((line["teacher"] for line in reversed(answers.values())
                      if line["teacher"] is not None), None) for answers in by_run]
    rows: list[tuple[str, Sequence[str | None]]] = [("teacher", teachers)] if any(
        text is not None for text in teachers) else []
    for step in _shown_steps([list(answers) for answers in by_run]):
        rows.append((f"step {step}", [answers[step]["student"] if step in answers else None
                                      for answers in by_run]))
    return SampleTable(prompt, [run.name for run in runs], rows)


def _shown_steps(by_run: Sequence[Sequence[int]]) -> list[int]:
    """At most SHOWN_STEPS of the steps that all runs have, evenly chosen, and each run's last."""
    common = sorted(set.intersection(*map(set, by_run))) or sorted(set().union(*by_run))
    last = len(common) - 1
    count = min(SHOWN_STEPS, len(common))
    chosen = {common[round(index * last / max(1, count - 1))] for index in range(count)}
    return sorted(chosen | {max(steps) for steps in by_run})
