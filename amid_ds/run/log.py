"""A run's log while it trains: metrics.jsonl, eval.jsonl, TensorBoard and a progress bar.

Without a terminal a log message now and then takes the place of the bar. Rank 0 writes; on every
other rank the log is made with `folder=None` and does nothing. A resumed run continues the same
files: lines after the step that it resumes from are dropped first, so no step is there twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from amid_ds.distributed.rank_logging import PACKAGE_LOGGER
from amid_ds.errors import printable
from amid_ds.files.json_lines import read_jsonl, truncate_jsonl
from amid_ds.run.folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

# Seconds between two progress messages where there is no terminal; the first and the last step have
# one in any case.
MESSAGE_INTERVAL_S = 10
TENSORBOARD_TAGS = {
    "loss": "loss/total",
    "kd_loss": "loss/kd",
    "ce_loss": "loss/ce",
    "auxiliary_loss": "loss/auxiliary",
    "grad_norm": "optim/grad_norm",
    "learning_rate": "optim/learning_rate",
    "alpha": "objective/alpha",
    "lam": "objective/lam",
    "tokens_per_second": "perf/tokens_per_second",
    "tokens": "data/tokens",
    "padding": "data/padding",
    "data_wait": "data/wait",
}


def perplexity(loss: float) -> float | None:
    """exp(loss); None above 709 nats, where it is more than a float, and so JSON, can hold."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl: numbers by name, None for those that the run lacks."""
    return read_jsonl(RunFolder(run).metrics)


class RunLog:
    """The log of one attempt at a run, from `start` steps done to `total`.

    While it is open, warnings that the package logs also become text notes in TensorBoard.
    """

    def __init__(self, folder: RunFolder | None, start: int, total: int) -> None:
        self.folder, self.start, self.total = folder, start, total
        if folder is None:
            return
        self.title = printable(folder.path.name, keep="")
        from torch.utils.tensorboard import SummaryWriter

        self.metrics_file = _JsonLines(folder.metrics, start)
        self.evaluations_file = _JsonLines(folder.evaluations, start)
        self.board = SummaryWriter(str(folder.tensorboard), purge_step=start + 1)
        self.board_handler = _BoardHandler(self.board)
        PACKAGE_LOGGER.addHandler(self.board_handler)
        self.bar = tqdm(total=total, initial=start, desc=self.title, unit="step",
                        disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.began = self.last_message = time.monotonic()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, step: int, metrics: Mapping[str, float | None] | None,
             slowest: str | None = None) -> None:
        """Note that optimizer step `step` (from 1) is done, and write its `metrics` if it has any.

        `slowest` names the slowest rank, in the progress bar alone.
        """
        if self.folder is None:
            return
        if metrics is not None:
            self.metrics_file.write({"step": step, **metrics})
            for name, value in metrics.items():
                if value is not None:
                    self._add_scalar(_tag(name), value, step)
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
            known = {key: value for key, value in metrics.items() if value is not None}
            for key, value in known.items():
                if key != "tokens":
                    self._add_scalar(f"eval/{name}/{key}", value, step)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in known.items())
            logger.info(f"{self.title}: step {step}/{self.total}  eval {name}: {shown}")

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        # TensorBoard is a convenience: a full disk there does not end the run.
        try:
            self.board.add_scalar(tag, value, step)
        except OSError as error:
            logger.warning(f"TensorBoard cannot be written: {error}")

    def close(self) -> None:
        """Close the files and the progress bar."""
        if self.folder is not None:
            PACKAGE_LOGGER.removeHandler(self.board_handler)
            self.bar.close()
            self.metrics_file.close()
            self.evaluations_file.close()
            self.board.close()


def _tag(name: str) -> str:
    """The TensorBoard tag of a metric; one that has a `/` in its name is its own."""
    return name if "/" in name else TENSORBOARD_TAGS.get(name, f"objective/{name}")


class _BoardHandler(logging.Handler):
    """Adds each warning to TensorBoard as a text note."""

    def __init__(self, board: SummaryWriter) -> None:
        super().__init__(logging.WARNING)
        self.board = board

    def emit(self, record: logging.LogRecord) -> None:
        # One that cannot be written is dropped: a warning about it would come here again.
        with contextlib.suppress(OSError):
            self.board.add_text("alarm", record.getMessage())


class _JsonLines:
    """A file of JSON lines, each with its step, continued after `start` steps."""

    def __init__(self, path: Path, start: int) -> None:
        truncate_jsonl(path, start)
        self.path = path
        self.file = open(path, "ab", buffering=0)   # noqa: SIM115 - closed by `close`
        self.unwritten = b""

    def write(self, values: Mapping[str, object]) -> None:
        """Append a line, whole or not at all.

        Lines that a full disk refuses are kept in memory and tried again with the next one.
        """
        self.unwritten += (json.dumps(values, allow_nan=False) + "\n").encode()
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(self.unwritten) != len(self.unwritten):
                raise OSError("only a part was written")
        except OSError as error:
            self.file.truncate(size)
            logger.warning(f"{self.path.name} cannot be written, its lines wait in memory: {error}")
        else:
            self.unwritten = b""

    def close(self) -> None:
        self.file.close()
