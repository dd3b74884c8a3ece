"""A run's log while it trains: metrics.jsonl, eval.jsonl, its trackers and a progress bar.

Without a terminal a log message now and then takes the place of the bar. Rank 0 writes; on every
other rank the log is made with `folder=None` and does nothing. A resumed run continues the same
files: lines after the step that it resumes from are dropped first, so no step is there twice.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from amid_ds.distributed.rank_logging import PACKAGE_LOGGER
from amid_ds.errors import Stopped, printable
from amid_ds.files.append import EnduringFile
from amid_ds.files.json_lines import IsWhole, has_step, is_number, read_jsonl, truncate_jsonl
from amid_ds.run.board import Board, NoteHandler
from amid_ds.run.folder import RunFolder
from amid_ds.run.trackers import END_WAIT_S, end_trackers, start_trackers

logger = logging.getLogger(__name__)

# Seconds between two progress messages where there is no terminal; the first and the last step have
# one in any case.
MESSAGE_INTERVAL_S = 10
# What every line of metrics.jsonl has.
ALWAYS_LOGGED = ("tokens", "loss", "tokens_per_second")
TENSORBOARD_TAGS = {
    "loss": "loss/total",
    "kd_loss": "loss/kd",
    "ce_loss": "loss/ce",
    "auxiliary_loss": "loss/auxiliary",
    "router_aux_loss": "loss/router_aux",
    "router_z_loss": "loss/router_z",
    "grad_norm": "optim/grad_norm",
    "learning_rate": "optim/learning_rate",
    "learning_rate_muon": "optim/learning_rate_muon",
    "alpha": "objective/alpha",
    "lam": "objective/lam",
    "tokens_per_second": "perf/tokens_per_second",
    "teacher_entropy": "tokens/teacher_entropy",
    "student_entropy": "tokens/student_entropy",
    "divergence": "tokens/divergence",
    "label_probability": "tokens/label_probability",
    "overlap": "tokens/overlap",
    "agreement": "tokens/agreement",
    "tokens": "data/tokens",
    "padding": "data/padding",
    "data_wait": "data/wait",
}


def finite(value: float) -> float | None:
    """The value; None for one that is not finite, which JSON does not hold."""
    return value if math.isfinite(value) else None


def perplexity(loss: float) -> float | None:
    """exp(loss); None above 709 nats, where it is more than a float, and so JSON, can hold."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl: numbers by name, None for what the run lacks."""
    return read_jsonl(RunFolder(run).metrics, "step", _is_metrics_line)


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's eval.jsonl: the set's `name`, else as in metrics.jsonl."""
    return read_jsonl(RunFolder(run).evaluations, "step", _is_evaluation_line)


def read_task_scores(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's eval_tasks.jsonl: `step`, the task's `name`, its numbers by
    metric, None for one that is not finite."""
    return read_jsonl(RunFolder(run).task_scores, "step", _is_evaluation_line)


class Sample(NamedTuple):
    """A prompt, the `number`-th from 0, and the answers; the teacher's is None without one."""

    number: int
    prompt: str
    student: str
    teacher: str | None


def read_samples(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's samples.jsonl: the `step`, and a Sample's fields."""
    return read_jsonl(RunFolder(run).samples, "step", _is_samples_line)


def _is_samples_line(line: Mapping[str, Any]) -> bool:
    teacher = line.get("teacher", 0)
    return (has_step(line) and type(line.get("number")) is int
            and all(isinstance(line.get(key), str) for key in ("prompt", "student"))
            and (teacher is None or isinstance(teacher, str)))


def _is_metrics_line(line: Mapping[str, Any]) -> bool:
    return (has_step(line) and all(is_number(line.get(key)) for key in ALWAYS_LOGGED)
            and all(value is None or is_number(value) for value in line.values()))


def _is_evaluation_line(line: Mapping[str, Any]) -> bool:
    return (has_step(line) and isinstance(line.get("name"), str)
            and all(value is None or is_number(value)
                    for key, value in line.items() if key != "name"))


class RunLog:
    """The log of one attempt at a run, from `start` steps done to `total`.

    While it is open, warnings that the package logs also become notes in its trackers, which are
    those of `train.trackers`.
    """

    def __init__(self, folder: RunFolder | None, start: int, total: int,
                 trackers: Sequence[str] = ("tensorboard",)) -> None:
        self.folder, self.start, self.total = folder, start, total
        if folder is None:
            return
        self.title = printable(folder.path.name, keep="")
        self.metrics_file = _JsonLines(folder.metrics, start, _is_metrics_line)
        self.evaluations_file = _JsonLines(folder.evaluations, start, _is_evaluation_line)
        self.samples_file = _JsonLines(folder.samples, start, _is_samples_line)
        self.board = None
        if "tensorboard" in trackers:
            self.board = Board(folder.tensorboard, first_step=start + 1)
        self.trackers = start_trackers(trackers, folder, start)
        self.notes = NoteHandler([*self.trackers, *([self.board] if self.board else [])])
        PACKAGE_LOGGER.addHandler(self.notes)
        self.bar = tqdm(total=total, initial=start, desc=self.title, unit="step",
                        disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.began = self.last_message = time.monotonic()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("finished" if kind is None else "stopped" if kind is Stopped else "failed")

    def step(self, step: int, metrics: Mapping[str, float | None] | None,
             slowest: str | None = None) -> None:
        """Note that optimizer step `step` (from 1) is done, and write its `metrics` if it has any.

        `slowest` names the slowest rank, in the progress bar alone.
        """
        if self.folder is None:
            return
        if metrics is not None:
            self.metrics_file.write({"step": step, **metrics})
            if self.board is not None:
                self.board.add_scalars(curves_of_step(metrics), step)
            self._show_progress(step, metrics, slowest)
        self.bar.update(1)

    def _show_progress(self, step: int, metrics: Mapping[str, float | None],
                       slowest: str | None) -> None:
        losses = {"loss": metrics["loss"], "kd": metrics["kd_loss"], "ce": metrics["ce_loss"]}
        shown = {name: f"{loss:.4f}" for name, loss in losses.items() if loss is not None}
        shown["tok/s"] = f"{metrics['tokens_per_second']:,.0f}"
        if slowest is not None:
            shown["slowest"] = slowest
        self.bar.set_postfix(shown, refresh=False)
        now = time.monotonic()
        is_due = now - self.last_message >= MESSAGE_INTERVAL_S
        if self.bar.disable and (is_due or step in (self.start + 1, self.total)):
            left_s = (now - self.began) / (step - self.start) * (self.total - step)
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            logger.info(f"{self.title}: step {step}/{self.total}  {text}  "
                        f"{tqdm.format_interval(left_s)} left")
            self.last_message = now

    def evaluation(self, step: int, sets: Mapping[str, Mapping[str, float | None]]) -> None:
        """Write the metrics of every evaluation set, by the set's name, after `step`."""
        if self.folder is None:
            return
        for name, metrics in sets.items():
            self.evaluations_file.write({"step": step, "name": name, **metrics})
            if self.board is not None:
                self.board.add_scalars(curves_of_evaluation({"name": name, **metrics}), step)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()
                              if value is not None)
            logger.info(f"{self.title}: step {step}/{self.total}  eval {name}: {shown}")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write what was answered to each prompt after `step`."""
        if self.folder is None:
            return
        for sample in samples:
            line = {"step": step, **sample._asdict()}
            self.samples_file.write(line)
            if self.board is not None:
                for tag, text in texts_of_sample(line).items():
                    self.board.add_note(tag, text, step)

    def close(self, outcome: str = "finished") -> None:
        """Close the files and the progress bar, and wait END_WAIT_S for the trackers.

        outcome: what became of the attempt: `finished`, `stopped` or `failed`.
        """
        if self.folder is None:
            return
        self.bar.close()
        self.metrics_file.close()
        self.evaluations_file.close()
        self.samples_file.close()
        end_trackers(self.trackers, outcome, END_WAIT_S)
        PACKAGE_LOGGER.removeHandler(self.notes)
        if self.board is not None:
            self.board.close()


def curves_of_step(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as values by the tags of their curves.

    A metric that has a `/` in its name is its own tag.
    """
    return {name if "/" in name else TENSORBOARD_TAGS.get(name, f"objective/{name}"): value
            for name, value in line.items() if name != "step" and value is not None}


def curves_of_evaluation(line: Mapping[str, Any], above: str = "eval") -> dict[str, float]:
    """A line of eval.jsonl as values by the tags of their curves, `eval/NAME/KEY`."""
    return {f"{above}/{line['name']}/{key}": value for key, value in line.items()
            if key not in ("step", "name", "tokens") and value is not None}


def texts_of_sample(line: Mapping[str, Any]) -> dict[str, str]:
    """A line of samples.jsonl as Markdown by its tag, `samples/NUMBER`.

    Prompt and answers are code, in which no character is Markdown.
    """
    return {f"samples/{line['number']}": "\n\n".join(
        f"{name}:\n\n{textwrap.indent(line[name], ' ' * 4, lambda _: True)}"
        for name in ("prompt", "student", "teacher") if line[name] is not None)}


class _JsonLines:
    """A file of JSON lines, each with its step, continued after `start` steps."""

    def __init__(self, path: Path, start: int, is_whole: IsWhole) -> None:
        truncate_jsonl(path, start, is_whole)
        self.file = EnduringFile(path)

    def write(self, values: Mapping[str, object]) -> None:
        """Append a line."""
        self.file.append((json.dumps(values, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self.file.close()
