"""`amid-ds report`: one page about one or several runs, which opens from a file without a network.

Everything is read from the runs' folders. A figure is a picture inside the page (SVG, drawn by
matplotlib), so the page has no script and may be sent by mail. Curves of more than POINTS steps
are thinned to means, and the caption says so.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amid_ds.cluster.status import run_status
from amid_ds.errors import InputError, printable
from amid_ds.experiments.plots import figure_text, require_matplotlib
from amid_ds.experiments.reported_run import Curve, ReportedRun, read_reported_run
from amid_ds.files.atomic import replace_text
from amid_ds.files.ownership import require_own_file
from amid_ds.monitor.step_timer import OUTSIDE_STEPS
from amid_ds.planning.check import plan_measured_run
from amid_ds.run.folder import RunFolder

# In the head of every page, by which it is known as ours.
PAGE_SIGN = '<meta name="generator" content="amid-ds report">'
# A curve of fewer points is drawn with a marker for each.
FEW_POINTS = 40
# Title: (key in metrics.jsonl, label of the vertical axis).
CURVES = {
    "Loss": ("loss", "nats per token"),
    "Divergence from the teacher": ("kd_loss", "nats per token"),
    "Cross entropy": ("ce_loss", "nats per token"),
    "Auxiliary loss": ("auxiliary_loss", "nats per token"),
    "Gradient norm": ("grad_norm", ""),
    "Learning rate": ("learning_rate", ""),
    "α": ("alpha", ""),
    "λ": ("lam", ""),
    "Speed": ("tokens_per_second", "valid tokens per second"),
    "MFU": ("perf/mfu", "share of the peak"),
    "Memory, the worst rank's peak": ("memory/peak", "bytes"),
}
PART_COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948",
                "#9c755f", "#bab0ac", "#d37295", "#8cd17d", "#499894"]
RUN_COLOURS = 10


@dataclass(frozen=True)
class Drawing:
    """A figure of the page; `svg` is in base64."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class ReportSection:
    """A part of the page: drawings, then a paragraph for each note."""

    title: str
    drawings: Sequence[Drawing]
    notes: Sequence[str] = ()


def report(folders: Sequence[str], out: str, trust_remote_code: bool = False) -> None:
    """`amid-ds report RUN [RUN …] -o OUT`."""
    figure = require_matplotlib()
    require_own_file(Path(out), lambda text: PAGE_SIGN in text, "-o")
    paths = [Path(folder) for folder in folders]
    short = [path.resolve().name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    runs = [read_reported_run(path, name) for path, name in zip(paths, names, strict=True)]
    page = _page(runs, _sections(runs, _Draw(figure, runs), trust_remote_code))
    try:
        replace_text(Path(out), printable(page))
    except OSError as error:
        raise InputError(f"the page {out} cannot be written: {error}", "a file that can be written",
                         "give -o another path") from None
    print(out)


class _Draw:
    """Draws figures of the runs, each run in its own colour. `figure` is matplotlib's class."""

    def __init__(self, figure: Any, runs: Sequence[ReportedRun]) -> None:
        self.figure, self.runs = figure, runs
        self.colours = {run.name: f"C{index % RUN_COLOURS}" for index, run in enumerate(runs)}

    def picture(self, title: str, height: float, fill: Callable[[Any], str]) -> Drawing:
        """A drawing of `height` inches; `fill` draws on the axes and returns the caption."""
        figure = self.figure(figsize=(7.2, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(figure_text(title), fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        caption = fill(axes)
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        return Drawing(title, caption, base64.b64encode(svg.getvalue()).decode())

    def lines(self, title: str, axis: str, curves: Mapping[str, Curve]) -> Drawing:
        """Each run's curve by step, with restarts as dotted lines."""
        def fill(axes: Any) -> str:
            drawn = [run for run in self.runs if curves[run.name].steps]
            for run in drawn:
                curve, colour = curves[run.name], self.colours[run.name]
                axes.plot(curve.steps, curve.values, color=colour, linewidth=1.2,
                          label=figure_text(run.name),
                          marker="." if len(curve.steps) < FEW_POINTS else None)
                for step in run.restarts:
                    axes.axvline(step, color=colour, linestyle=":", linewidth=1)
            axes.set_xlabel("step")
            axes.set_ylabel(axis)
            axes.grid(alpha=0.25)
            if len(self.runs) > 1:
                axes.legend(fontsize=8, frameon=False)
            notes = ["dotted: a restart"] if any(run.restarts for run in drawn) else []
            widest = max(curve.lines_per_point for curve in curves.values())
            if widest > 1:
                notes.append(f"means of up to {widest} lines")
            return "; ".join(notes)
        return self.picture(title, 2.9, fill)

    def bars(self, title: str, axis: str, bars: Mapping[str, Mapping[str, float]],
             caption: str) -> Drawing:
        """A horizontal bar by name, stacked from its parts."""
        def fill(axes: Any) -> str:
            parts = list(dict.fromkeys(part for amounts in bars.values() for part in amounts))
            starts = [0.0] * len(bars)
            for part, colour in zip(parts, itertools.cycle(PART_COLOURS)):
                widths = [amounts.get(part, 0.0) for amounts in bars.values()]
                if any(widths):
                    axes.barh(range(len(bars)), widths, left=starts, color=colour,
                              label=figure_text(part.replace("_", " ")), height=0.6)
                    starts = [start + width for start, width in zip(starts, widths, strict=True)]
            axes.set_yticks(range(len(bars)), map(figure_text, bars))
            axes.invert_yaxis()
            axes.set_xlabel(axis)
            axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
            return caption
        return self.picture(title, 1.9 + 0.35 * len(bars), fill)


def _sections(runs: Sequence[ReportedRun], draw: _Draw,
              trust_remote_code: bool = False) -> list[ReportSection]:
    return [ReportSection("Curves", [*_metric_curves(runs, draw), *_evaluation_curves(runs, draw)]),
            ReportSection("Time", _time_bars(runs, draw)),
            _memory_section(runs, draw, trust_remote_code)]


def _metric_curves(runs: Sequence[ReportedRun], draw: _Draw) -> list[Drawing]:
    """The loss, and every other curve that is not constant in all runs."""
    drawings = []
    for title, (key, axis) in CURVES.items():
        curves = {run.name: run.curve(key) for run in runs}
        if key == "loss" or any(len(set(curve.values)) > 1 for curve in curves.values()):
            drawings.append(draw.lines(title, axis, curves))
    return drawings


def _evaluation_curves(runs: Sequence[ReportedRun], draw: _Draw) -> list[Drawing]:
    keys = {(line["name"], key) for run in runs for line in run.evaluations
            for key, value in line.items() if isinstance(value, float)}
    return [draw.lines(f"{name}: {key.replace('_', ' ')}", "",
                       {run.name: run.evaluation_curve(name, key) for run in runs})
            for name, key in sorted(keys)]


def _time_bars(runs: Sequence[ReportedRun], draw: _Draw) -> list[Drawing]:
    bars = {}
    for run in runs:
        steps = run.steps[-1]["step"]
        phases = {name: seconds / steps for name, seconds in run.seconds_by_phase().items()}
        if any(phases.values()):
            bars[run.name] = phases
    if not bars:
        return []
    caption = f"{' and '.join(OUTSIDE_STEPS)} happen between steps and are spread over them"
    return [draw.bars("Where the time went", "seconds per step, rank 0", bars, caption)]


def _memory_section(runs: Sequence[ReportedRun], draw: _Draw,
                    trust_remote_code: bool) -> ReportSection:
    """Memory by part, planned and measured, with a note for each run that lacks a plan."""
    bars, notes = {}, []
    for run in runs:
        planned, note = _planned(run, trust_remote_code)
        if planned:
            bars[f"{run.name}, planned"] = _gigabytes(planned)
        if run.measured:
            bars[f"{run.name}, measured"] = _gigabytes(run.measured.memory_per_rank)
        if note:
            notes.append(note)
    caption = "planned: as by amid-ds plan; measured: the parts that a run records"
    drawings = [draw.bars("Memory by part", "GB of a rank", bars, caption)] if bars else []
    return ReportSection("Memory", drawings, notes)


def _planned(run: ReportedRun, trust_remote_code: bool = False) -> tuple[dict[str, int], str]:
    """A rank's planned bytes by part on the run's own ranks and device; or {} and the reason."""
    if not run.measured:
        return {}, f"{run.name}: no plan, because nothing was measured: {run.unmeasured}"
    try:
        plan = plan_measured_run(run.measured, trust_remote_code=trust_remote_code)
        return plan.memory_per_rank, ""
    except InputError as error:
        # E.g. its models have been moved.
        return {}, f"{run.name}: no plan can be made here: {error.found}; {error.remedy}"


def _gigabytes(memory: Mapping[str, int]) -> dict[str, float]:
    return {part: size / 1e9 for part, size in memory.items() if part != "total"}


@dataclass(frozen=True)
class RunTables:
    """One run's tables and texts on the page."""

    run: ReportedRun
    status: Mapping[str, str]
    provenance: str
    recipe: str


def _page(runs: Sequence[ReportedRun], sections: Sequence[ReportSection]) -> str:
    from jinja2 import Environment

    tables = [RunTables(run, run_status(run.folder), _provenance(run.folder),
                        RunFolder(run.folder).recipe.read_text(encoding="utf-8")) for run in runs]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    return template.render(
        title=", ".join(run.name for run in runs), sections=sections, tables=tables,
        format_number=_format_number,
        keys=list(dict.fromkeys(key for row in tables for key in row.status)))


def _provenance(folder: Path) -> str:
    path = RunFolder(folder).provenance
    if not path.is_file():
        return "none"
    try:
        return json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1)
    except (OSError, ValueError, RecursionError) as error:
        return f"{path.name} cannot be read: {error}"


def _format_number(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:,.5g}" if isinstance(value, float) else f"{value}"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="amid-ds report">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1.5em;
       color: #222 }
figure { display: inline-block; width: 47%; min-width: 30em; margin: 0 1% 1em 0;
         vertical-align: top }
figure img { width: 100% }
figcaption { color: #777; font-size: 85%; min-height: 1.3em }
table { border-collapse: collapse; margin: .5em 0 1.5em }
td, th { padding: .2em .9em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 85% }
h2 { border-bottom: 2px solid #eee; margin-top: 1.6em }
summary { cursor: pointer }
</style></head><body>
<h1>{{ title }}</h1>
<table><tr><th>run</th>{% for key in keys %}<th>{{ key }}</th>{% endfor %}<th>tokens</th></tr>
{% for row in tables %}
<tr><td>{{ row.run.name }}</td>
{% for key in keys %}<td>{{ row.status.get(key, "–") }}</td>{% endfor %}
<td>{{ "{:,}".format(row.run.steps[-1].tokens) }}</td></tr>
{% endfor %}</table>
{% for section in sections %}
{% if section.drawings or section.notes %}
<h2>{{ section.title }}</h2>
{% for figure in section.drawings %}
<figure><img alt="{{ figure.title }}" src="data:image/svg+xml;base64,{{ figure.svg }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
{% for note in section.notes %}<p>{{ note }}</p>{% endfor %}
{% endif %}
{% endfor %}
<h2>Evaluation</h2>
{% for row in tables %}
<h3>{{ row.run.name }}</h3>
{% set lines = row.run.last_evaluations %}
{% if lines %}
{% set keys = row.run.evaluation_keys %}
<table><tr>{% for key in keys %}<th>{{ key.replace("_", " ") }}</th>{% endfor %}</tr>
{% for line in lines %}
<tr>{% for key in keys %}<td>{{ format_number(line.get(key)) }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% else %}<p>not evaluated</p>{% endif %}
{% set tasks = row.run.task_table %}
{% if tasks.rows %}
<table><tr><th>task</th><th>metric</th>
{%- for step in tasks.steps %}<th>step {{ step }}</th>{% endfor %}</tr>
{% for name, metric, values in tasks.rows %}
<tr><td>{{ name }}</td><td>{{ metric }}</td>
{%- for value in values %}<td>{{ format_number(value) }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endif %}
{% endfor %}
<h2>Provenance</h2>
{% for row in tables %}
<h3>{{ row.run.name }}</h3>
<p>{{ row.run.folder.resolve() }}
{%- for attempt in row.run.attempts %}{% if loop.index > 1 %}; started again
{%- if attempt.first_step %} at step {{ attempt.first_step }}{% endif %}{% endif %}{% endfor %}</p>
<details><summary>versions, revisions, hashes</summary><pre>{{ row.provenance }}</pre></details>
<details><summary>recipe</summary><pre>{{ row.recipe }}</pre></details>
{% endfor %}
</body></html>
"""
