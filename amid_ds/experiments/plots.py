"""Figures as PNG files: of a sweep, and of the demo.

In a sweep's figures, runs that differ in their seed alone are one point: their mean with its
standard error.
"""

from __future__ import annotations

import itertools
import math
import statistics
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

TEACHER_COLOUR = "#4e79a7"
CE_COLOUR = "#bab0ac"
# Characters.
LONGEST_LABEL = 40
# The light line under a smoothed one.
RAW_ALPHA = 0.25
# A curve is smoothed by means over this part of its steps.
SMOOTHING_SHARE = 0.08
# A curve whose largest value is more times its last smoothed one is drawn on a log scale.
LOG_SCALE_RATIO = 5


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

    From then on no text in a figure is a formula, whatever dollar signs it has.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is not installed", "what figures are drawn with",
                         "pip install 'amid-ds[plots]'") from None
    rcParams["text.parse_math"] = False
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


def plot_demo(kl_to_teacher: Mapping[str, float], run: Path, path: Path) -> Path:
    """Save the demo's picture: held-out divergences from the teacher, and the distillation.

    kl_to_teacher: nats per token, by the bar's label, the distilled student first. run: its
    folder, of which the right panel shows `kd_loss`. Returns `path`.
    """
    figure = require_matplotlib()(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    bars = left.bar(list(kl_to_teacher), list(kl_to_teacher.values()), width=0.55,
                    color=[TEACHER_COLOUR, CE_COLOUR])
    left.bar_label(bars, fmt="%.3f", padding=2)
    left.margins(y=0.12)
    left.set(title="KL to the teacher, held-out text", ylabel="nats per token")
    lines = [line for line in read_metrics(run) if line.get("kd_loss") is not None]
    steps, values = [line["step"] for line in lines], [line["kd_loss"] for line in lines]
    smoothed = _smoothed(values)
    right.plot(steps, values, color=TEACHER_COLOUR, alpha=RAW_ALPHA, linewidth=1)
    right.plot(steps, smoothed, color=TEACHER_COLOUR, linewidth=2)
    right.set(title="divergence from the teacher, by step", xlabel="step",
              ylabel="objective, nats per token")
    if min(values) > 0 and max(values) > LOG_SCALE_RATIO * smoothed[-1]:
        right.set_yscale("log", subs=[])
        ticks = [digit * 10.0 ** exponent for exponent in range(-4, 4) for digit in (1, 2, 5)]
        shown = [tick for tick in ticks if 0.8 * min(values) <= tick <= max(values)]
        right.set_yticks(shown, [f"{tick:g}" for tick in shown])
    for panel in (left, right):
        panel.title.set_fontsize(11)
        panel.spines[["top", "right"]].set_visible(False)
    return _save(figure, path, dpi=100)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window around each value, which is narrower at both ends."""
    reach = max(1, round(len(values) * SMOOTHING_SHARE / 2))
    smoothed = []
    for index in range(len(values)):
        half = min(reach, index, len(values) - 1 - index)
        smoothed.append(statistics.fmean(values[index - half:index + half + 1]))
    return smoothed


def _save(figure: Any, path: Path, dpi: int = 110) -> Path:
    figure.savefig(path, dpi=dpi, pil_kwargs={"optimize": True})
    return path
