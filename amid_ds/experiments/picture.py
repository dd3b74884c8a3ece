"""A report's picture: how near each run comes to its teacher on held-out rows, and what both say.

It is 900 pixels wide, as a README shows it.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amid_ds.errors import InputError, printable
from amid_ds.experiments.plots import figure_text, require_matplotlib
from amid_ds.experiments.report_samples import SampleTable, sample_tables
from amid_ds.experiments.reported_run import ReportedRun
from amid_ds.files.ownership import require_own_file

# In the file, by which it is known as ours.
PICTURE_SIGN = "amid-ds report"
# By run, in their order.
COLOURS = ["#4e79a7", "#bab0ac", "#59a14f", "#e15759", "#b07aa1", "#f28e2b"]
# What is drawn, the first that a run has, with its title.
METRICS = {"kl_to_teacher": "KL to the teacher", "loss": "loss"}
WIDTH, DPI = 9.0, 100
# Inches.
METRIC_HEIGHT, LINE_HEIGHT = 3.0, 0.145
TEXT_POINTS = 7
# Prompts, the lines of an answer, characters over the width, and runs that have a column.
PROMPTS, LINES, CHARACTERS, ANSWERING_RUNS = 2, 7, 140, 4


def require_own_picture(path: Path) -> None:
    """Raise InputError unless `path` names a PNG that is not there, or one of ours."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--picture {str(path)!r}", "the name of a PNG file, ending in .png",
                         "name one")
    require_own_file(path, lambda text: PICTURE_SIGN in text, "--picture")


def draw_picture(runs: Sequence[ReportedRun], path: Path) -> None:
    """Save the picture of runs that were evaluated. Raises InputError.

    Above, a metric of the first evaluation set, by step and at the end; below, where there are
    samples, the first prompts with the teacher's answer and each run's last one.
    """
    figure_class = require_matplotlib()
    name, key = _metric_of(runs)
    tables = sample_tables(runs)[:PROMPTS]
    text_height = LINE_HEIGHT * (LINES + 2) * len(tables)
    figure = figure_class(figsize=(WIDTH, METRIC_HEIGHT + text_height), layout="constrained")
    if tables:
        above, below = figure.subfigures(2, 1, height_ratios=(METRIC_HEIGHT, text_height))
        _write_answers(below, tables)
    else:
        above = figure
    _draw_metric(above, runs, name, key)
    try:
        figure.savefig(path, dpi=DPI, metadata={"Software": PICTURE_SIGN},
                       pil_kwargs={"optimize": True})
    except OSError as error:
        raise InputError(f"the picture {path} cannot be written: {error}",
                         "a file that can be written", "give --picture another path") from None


def _metric_of(runs: Sequence[ReportedRun]) -> tuple[str, str]:
    """(evaluation set, metric) of the first evaluation that has one of METRICS."""
    lines = [line for run in runs for line in run.evaluations]
    for key, line in itertools.product(METRICS, lines):
        if line.get(key) is not None:
            return line["name"], key
    raise InputError("--picture, and none of the runs was evaluated", "a run with data.eval",
                     "leave --picture out, or set data.eval and train.eval_every")


def _draw_metric(figure: Any, runs: Sequence[ReportedRun], name: str, key: str) -> None:
    """The metric by step on the left, its last values as bars on the right."""
    curves = {run.name: curve for run in runs if (curve := run.evaluation_curve(name, key)).steps}
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(curves))]
    for (label, curve), colour in zip(curves.items(), colours, strict=True):
        left.plot(curve.steps, curve.values, color=colour, linewidth=2, marker="o", markersize=4,
                  label=figure_text(label))
    left.set(title=f"{METRICS[key]} by step, {figure_text(name)}", xlabel="step",
             ylabel="nats per token", ylim=(0, None))
    left.grid(alpha=0.25)
    left.legend(frameon=False)
    bars = right.bar(list(map(figure_text, curves)), [curve.values[-1] for curve in
                                                      curves.values()], width=0.55, color=colours)
    right.bar_label(bars, fmt="%.3f", padding=2)
    right.margins(y=0.12)
    right.set(title="at the end")
    for panel in (left, right):
        panel.title.set_fontsize(11)
        panel.spines[["top", "right"]].set_visible(False)


def _write_answers(figure: Any, tables: Sequence[SampleTable]) -> None:
    """A row for each prompt: it, the teacher's answer, each run's last."""
    for number, table in enumerate(tables):
        answers = dict(table.rows)
        columns = [("prompt", table.prompt)]
        if (taught := next(filter(None, answers.get("teacher", ())), None)) is not None:
            columns.append(("teacher", taught))
        columns += [(run, _last_answer(table, index)) for index, run
                    in enumerate(table.runs[:ANSWERING_RUNS])]
        for index, (title, text) in enumerate(columns):
            x, y = 0.02 + 0.97 * index / len(columns), 1 - number / len(tables)
            figure.text(x, y, figure_text(title), fontsize=TEXT_POINTS + 1, va="top",
                        color="#777777")
            figure.text(x, y - 1.2 / (LINES + 2) / len(tables),
                        _wrapped(text, CHARACTERS // len(columns)), fontsize=TEXT_POINTS,
                        family="monospace", va="top", linespacing=1.25)


def _last_answer(table: SampleTable, run: int) -> str:
    return next((answers[run] or "" for _, answers in reversed(table.rows)
                 if answers[run] is not None), "")


def _wrapped(text: str, width: int) -> str:
    """The text's first LINES lines of at most `width` characters less a margin, none empty before.
    """
    if not text.strip():
        return "(white space)" if text else "(ends at once)"
    lines = [part for line in printable(text).strip("\n").expandtabs(4).split("\n")
             for part in textwrap.wrap(line, width - 2, drop_whitespace=False) or [""]]
    return "\n".join(lines if len(lines) <= LINES else [*lines[:LINES - 1], "…"])
