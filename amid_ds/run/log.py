"""What a run tells while it runs: metrics.jsonl, eval.jsonl, TensorBoard, and a progress bar or, without a terminal, a
line now and then. Rank 0 writes; on every other rank the log is made with `folder=None` and does nothing.

A resumed run carries on in the same files: lines after the step that it resumes from are dropped first, so that no
step is there twice.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from amid_ds.files import (
    read_jsonl,
    truncate_jsonl,
)

SECONDS_BETWEEN_LINES = 10      # without a terminal: the first step, the last one, and one line in so many seconds
LINES = ("metrics.jsonl", "eval.jsonl")
TENSORBOARD_TAGS = {"loss": "loss/total", "kd_loss": "loss/kd", "ce_loss": "loss/ce",
                    "auxiliary_loss": "loss/auxiliary", "grad_norm": "optim/grad_norm",
                    "learning_rate": "optim/learning_rate", "alpha": "objective/alpha", "lam": "objective/lam",
                    "tokens_per_second": "perf/tokens_per_second", "tokens": "data/tokens", "padding": "data/padding",
                    "data_wait": "data/wait"}


def perplexity(loss: float) -> float | None:
    """exp(loss); None where that is more than a float, and JSON, can hold: above 709 nats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


class RunLog:
    """The log of one life of a run, from `start` steps done to `total`."""

    def __init__(self, folder: Path | None, start: int, total: int, title: str) -> None:
        self.folder, self.start, self.total, self.title = folder, start, total, title
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.steps, self.evaluations = (_JsonLog(folder / name, start, self.say) for name in LINES)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, desc=title, unit="step", disable=not sys.stderr.isatty(),
                        dynamic_ncols=True)
        self.began = self.last_line = time.monotonic()

    def step(self, step: int, values: Mapping[str, Any] | None, slowest: str | None = None) -> None:
        """Optimizer step `step` (from 1) is done; `values` where it is one that is logged. `slowest`: the rank, by
        name, for the eye alone."""
        if self.folder is None:
            return
        if values is not None:
            self._write(step, values, slowest)
        self.bar.update(1)

    def _write(self, step: int, values: Mapping[str, Any], slowest: str | None) -> None:
        self.steps.write({"step": step, **values})
        for name, value in values.items():
            if isinstance(value, (int, float)):
                tag = name if "/" in name else TENSORBOARD_TAGS.get(name, f"objective/{name}")
                self._to_board("add_scalar", tag, value, step)
        now = time.monotonic()
        losses = {"loss": values["loss"], "kd": values["kd_loss"], "ce": values["ce_loss"]}
        shown = {name: f"{value:.4f}" for name, value in losses.items() if value is not None}
        shown["tok/s"] = f"{values['tokens_per_second']:,.0f}"
        if slowest is not None:
            shown["slowest"] = slowest
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable and (step in (self.start + 1, self.total) or now - self.last_line >= SECONDS_BETWEEN_LINES):
            left = (now - self.began) / (step - self.start) * (self.total - step)
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self.title}: step {step}/{self.total}  {text}  {tqdm.format_interval(left)} left", flush=True)
            self.last_line = now

    def evaluation(self, step: int, sets: Mapping[str, Mapping[str, float | None]]) -> None:
        """The figures of every evaluation set, by name, after `step`: a line of eval.jsonl each."""
        if self.folder is None:
            return
        for name, figures in sets.items():
            self.evaluations.write({"step": step, "name": name, **figures})
            for figure, value in figures.items():
                if value is not None and figure != "tokens":
                    self._to_board("add_scalar", f"eval/{name}/{figure}", value, step)
            shown = "  ".join(f"{figure} {value:.4g}" for figure, value in figures.items() if value is not None)
            self.say(f"step {step}/{self.total}  eval {name}: {shown}")

    def _to_board(self, method: str, *arguments: Any) -> None:
        """TensorBoard is a convenience: that its disk is full does not stop a run."""
        try:
            getattr(self.board, method)(*arguments)
        except OSError as error:
            self.say(f"WARNING: TensorBoard cannot be written: {error}")

    def say(self, message: str) -> None:
        """One line beside the progress bar, from rank 0."""
        if self.folder is not None:
            tqdm.write(f"{self.title}: {message}")
            sys.stdout.flush()

    def alarm(self, message: str) -> None:
        """What nobody may miss: a line, and a note in TensorBoard."""
        self.say(message)
        if self.folder is not None:
            self._to_board("add_text", "alarm", message)

    def close(self) -> None:
        if self.folder is not None:
            self.bar.close()
            self.steps.file.close()
            self.evaluations.file.close()
            self.board.close()


class _JsonLog:
    """A file of JSON lines, each with its step, that a resumed run carries on after `start` steps."""

    def __init__(self, path: Path, start: int, say: Callable[[str], None]) -> None:
        truncate_jsonl(path, start)
        self.file = open(path, "ab", buffering=0)   # noqa: SIM115 - open for the run's life
        self.unwritten, self.name, self.say = b"", path.name, say

    def write(self, values: Mapping[str, Any]) -> None:
        """Whole lines or nothing: what a full disk does not take is kept and tried again with the next line."""
        self.unwritten += (json.dumps(values, allow_nan=False) + "\n").encode()
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(self.unwritten) != len(self.unwritten):
                raise OSError("only a part was taken")
        except OSError as error:
            self.file.truncate(size)
            self.say(f"WARNING: {self.name} cannot be written, its lines wait in memory: {error}")
        else:
            self.unwritten = b""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return read_jsonl(run / "metrics.jsonl")
