"""Figures of a sweep as PNG files: a figure of merit against what was swept, and the loss of every run.

Runs that differ in their seed alone are one point, their mean with its standard error.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from amid_ds.errors import InputError
from amid_ds.run.log import read_metrics

SEED_KEY, FIRST_KEY = "train.seed", "loss.alpha"
SCORE_NAMES = ("perplexity", "kl_to_teacher", "reverse_kl", "top1_agreement", "rouge_l")


class PlottedRun(Protocol):
    """A line of the table."""

    @property
    def run(self) -> Path: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def figures(self) -> Mapping[str, Any]: ...


def require_matplotlib() -> Any:
    """matplotlib's Figure, which needs no window. InputError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed", "what figures are drawn with",
                         "pip install 'amid-ds[plots]'") from None
    return Figure


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; 0 of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def plot_sweep(rows: Sequence[PlottedRun], path: Path) -> Path:
    """A panel for each figure of merit that the runs have, against loss.alpha where it was swept, else against the
    first key of numbers; a line for each value of the others."""
    keys = [key for key in rows[0].settings if key != SEED_KEY]
    numeric = [key for key in keys if all(isinstance(row.settings[key], (int, float)) for row in rows)]
    across = FIRST_KEY if FIRST_KEY in numeric else next(iter(numeric), None)
    names = list(dict.fromkeys(itertools.chain.from_iterable(row.figures for row in rows)))
    merits = [name for name in names if name.rpartition(".")[2] in SCORE_NAMES
              and any(row.figures.get(name) is not None for row in rows)] or ["train_loss"]
    figure = require_matplotlib()(figsize=(4 * len(merits), 6 if across is None else 3.4), layout="constrained")
    panels = figure.subplots(1, len(merits), squeeze=False)[0]
    for panel, merit in zip(panels, merits, strict=True):
        for label, points in _lines(rows, across, merit).items():
            x = list(points)
            means, errors = zip(*map(mean_and_error, points.values()), strict=True)
            panel.errorbar(x, means, errors, marker="o", capsize=3, label=label)
        panel.set(title=merit, xlabel=across or "")
        if across is None:
            panel.tick_params(axis="x", rotation=60)
    if any(_lines(rows, across, merits[0])):
        panels[0].legend(fontsize="small")
    return _saved(figure, path)


def _lines(rows: Sequence[PlottedRun], across: str | None, merit: str) -> dict[str | None, dict[Any, list[float]]]:
    """Line by line, point by point: the values of `merit`, one for each seed."""
    lines: dict[str | None, dict[Any, list[float]]] = {}
    for row in rows:
        if row.figures.get(merit) is not None:
            label = label_of(row, leave_out=(across, SEED_KEY))
            line, x = (label or None, row.settings[across]) if across is not None else (None, label)
            lines.setdefault(line, {}).setdefault(x, []).append(row.figures[merit])
    return lines


def label_of(row: PlottedRun, leave_out: Sequence[Hashable] = ()) -> str:
    """What tells a run from others, in few words."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.settings.items()
                     if key not in leave_out and value is not None)


def plot_losses(rows: Sequence[PlottedRun], path: Path) -> Path:
    """The loss of every run, step by step; runs that differ in their seed alone have one colour."""
    figure = require_matplotlib()(figsize=(7, 6), layout="constrained")
    panel = figure.subplots()
    colours: dict[str, str] = {}
    for row in rows:
        if not (row.run / "metrics.jsonl").is_file():
            continue
        lines = read_metrics(row.run)
        label = label_of(row, leave_out=(SEED_KEY,))
        known = label in colours
        drawn, = panel.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8,
                            color=colours.get(label), label=None if known else label)
        colours[label] = drawn.get_color()
    panel.set(xlabel="step", ylabel="loss")
    figure.legend(loc="outside lower center", fontsize="x-small")
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path
