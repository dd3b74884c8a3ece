"""Figures of a sweep as PNG files.

In a sweep's figures, runs that differ in their seed alone are one point: their mean with its
standard error.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from amid_ds.errors import InputError, printable
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_metrics

SEED_KEY = "train.seed"
# The key on the horizontal axis, if it was swept.
PREFERRED_KEY = "loss.alpha"
SCORE_NAMES = ("perplexity", "kl_to_teacher", "reverse_kl", "top1_agreement", "rouge_l")
# Values of one point, each from a run with a seed of its own, by position on the horizontal axis.
Points = dict[Any, list[float]]

# Characters.
LONGEST_LABEL = 40


class PlottedRun(Protocol):
    """One line of the sweep's table."""

    @property
    def run(self) -> Path:
        """The run's folder."""

    @property
    def settings(self) -> Mapping[str, object]:
        """The recipe's keys that tell the run from the others, with its values."""

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Its numbers by name; None: not measured."""


def require_matplotlib() -> Any:
    """matplotlib's class Figure, which needs no window. InputError if it is not installed.

    From then on no text in a figure is a formula, whatever dollar signs it has, and what the font
    lacks is drawn as boxes without a warning.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed", "what figures are drawn with",
                         "pip install 'amid-ds[plots]'") from None
    rcParams["text.parse_math"] = False
    # Of text in a script that the font lacks.
    warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
    return Figure


def figure_text(name: str) -> str:
    """`name` as a label in a figure: one short line, which no first `_` keeps out of a legend."""
    shown = printable(name, keep="")
    shown = shown if len(shown) <= LONGEST_LABEL else f"{shown[:LONGEST_LABEL - 1]}…"
    return f" {shown}" if shown.startswith("_") else shown


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is 0 for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def plot_sweep(rows: Sequence[PlottedRun], path: Path) -> Path:
    """Save a panel for each score of the runs, over `loss.alpha` or the first swept number.

    Each combination of the other keys is a line of its own. Returns `path`.
    """
    across = _horizontal_key(rows)
    scores = _score_names(rows)
    height = 6 if across is None else 3.4
    figure = require_matplotlib()(figsize=(4 * len(scores), height), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for panel, score in zip(panels, scores, strict=True):
        for label, points in _lines(rows, across, score).items():
            means, errors = zip(*map(mean_and_error, points.values()), strict=True)
            positions = range(len(points)) if across is None else list(points)
            panel.errorbar(positions, means, errors, marker="o", capsize=3,
                           label=figure_text(label) if label else None)
            if across is None:
                panel.set_xticks(positions, map(figure_text, points), rotation=60)
        panel.set(title=figure_text(score), xlabel=across or "")
    if any(_lines(rows, across, scores[0])):
        panels[0].legend(fontsize="small")
    return _save(figure, path)


def _horizontal_key(rows: Sequence[PlottedRun]) -> str | None:
    """PREFERRED_KEY if it was swept, else the first swept key of numbers, else None."""
    numeric = [key for key in rows[0].settings if key != SEED_KEY
               and all(isinstance(row.settings[key], (int, float)) for row in rows)]
    return PREFERRED_KEY if PREFERRED_KEY in numeric else next(iter(numeric), None)


def _score_names(rows: Sequence[PlottedRun]) -> list[str]:
    names = dict.fromkeys(itertools.chain.from_iterable(row.metrics for row in rows))
    scores = [name for name in names if name.rpartition(".")[2] in SCORE_NAMES
              and any(row.metrics.get(name) is not None for row in rows)]
    return scores or ["train_loss"]


def _lines(rows: Sequence[PlottedRun], across: str | None,
           score: str) -> dict[str | None, Points]:
    """The points of each line, by its label; None: a single line without one.

    Without a key `across`, the runs' labels are the positions on the horizontal axis.
    """
    lines: dict[str | None, Points] = {}
    for row in rows:
        value = row.metrics.get(score)
        if value is None:
            continue
        label = run_label(row, leave_out=(across, SEED_KEY))
        line, x = (label or None, row.settings[across]) if across is not None else (None, label)
        lines.setdefault(line, {}).setdefault(x, []).append(value)
    return lines


def run_label(row: PlottedRun, leave_out: Sequence[Hashable] = ()) -> str:
    """The short settings that distinguish a run from the others, without those left out."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.settings.items()
                     if key not in leave_out and value is not None)


def plot_losses(rows: Sequence[PlottedRun], path: Path) -> Path:
    """Save the loss of every run by step, one colour for runs that differ in their seed alone.

    Returns `path`.
    """
    figure = require_matplotlib()(figsize=(7, 6), layout="constrained")
    panel = figure.subplots()
    colours: dict[str, str] = {}
    for row in rows:
        if not RunFolder(row.run).metrics.is_file():
            continue
        lines = read_metrics(row.run)
        label = run_label(row, leave_out=(SEED_KEY,))
        curve, = panel.plot([line["step"] for line in lines], [line["loss"] for line in lines],
                            linewidth=0.8, color=colours.get(label),
                            label=None if label in colours else figure_text(label))
        colours[label] = curve.get_color()
    panel.set(xlabel="step", ylabel="loss")
    figure.legend(loc="outside lower center", fontsize="x-small")
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})
    return path
