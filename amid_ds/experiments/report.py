"""`amid-ds report`: one page about one run or several, that opens from a file and needs no network.

Everything is read from the runs' folders; a figure is a picture inside the page (SVG, by matplotlib), so the page has
no script and may be sent by mail. Curves of more than POINTS steps are thinned to means, which the page says.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amid_ds.cluster.status import facts_of
from amid_ds.errors import InputError
from amid_ds.experiments.plots import require_matplotlib
from amid_ds.files import read_jsonl, replace_text
from amid_ds.monitor.memory_probe import Measurements, read_measurements
from amid_ds.monitor.step_timer import OUTSIDE_STEPS, PHASES
from amid_ds.planning.check import plan_measured_run
from amid_ds.run import attempts
from amid_ds.run.log import read_metrics

POINTS = 1000      # of a curve
CURVES = {         # title: (the key in metrics.jsonl, the axis)
    "Loss": ("loss", "nats per token"), "Divergence from the teacher": ("kd_loss", "nats per token"),
    "Cross entropy": ("ce_loss", "nats per token"), "Auxiliary loss": ("auxiliary_loss", "nats per token"),
    "Gradient norm": ("grad_norm", ""), "Learning rate": ("learning_rate", ""), "α": ("alpha", ""), "λ": ("lam", ""),
    "Speed": ("tokens_per_second", "valid tokens per second"), "MFU": ("perf/mfu", "share of the peak"),
    "Memory, the worst rank's peak": ("memory/peak", "bytes")}


@dataclass(frozen=True)
class ReportedRun:
    """One run, as it lies in its folder."""

    name: str
    folder: Path
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    story: list[attempts.AttemptRecord]
    # None if they cannot be read, for the reason in `unmeasured`.
    measured: Measurements | None
    unmeasured: str               # and why not

    @property
    def restarts(self) -> list[int]:
        """The steps with which lives after the first one began."""
        return [life.first_step for life in self.story[1:] if life.first_step is not None]

    def curve(self, key: str) -> tuple[list[int], list[float], int]:
        """Steps and values of `key`, thinned to means over so many lines; without those where it is null."""
        found = [(line["step"], line[key]) for line in self.steps if line.get(key) is not None]
        width = -(-len(found) // POINTS) or 1
        parts = [found[i:i + width] for i in range(0, len(found), width)]
        means = [statistics.fmean(value for _, value in part) for part in parts]
        return [part[-1][0] for part in parts], means, width

    def spent(self) -> dict[str, float]:
        """Seconds by phase of all logged steps. A line's are means over the steps since the line before."""
        total = dict.fromkeys(PHASES, 0.0)
        before = 0
        for line in self.steps:
            for name in PHASES:
                total[name] += line.get(f"time/{name}", 0.0) * (line["step"] - before)
            before = line["step"]
        return total


def read_reported_run(folder: Path, name: str) -> ReportedRun:
    """Raises InputError where `folder` holds no run that has logged a step."""
    if not (folder / "recipe.yaml").is_file():
        raise InputError(f"{folder} is not the folder of a run", "a folder with recipe.yaml and metrics.jsonl",
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
    return ReportedRun(name, folder, steps, read_jsonl(folder / "eval.jsonl"), attempts.read_attempts(folder), measured, unmeasured)


def report(folders: Sequence[str], out: str) -> None:
    """`amid-ds report RUN [RUN …] -o OUT`."""
    figure = require_matplotlib()
    paths = [Path(folder) for folder in folders]
    short = [path.resolve().name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    runs = [read_reported_run(path, name) for path, name in zip(paths, names, strict=True)]
    draw = _Draw(figure, runs)
    page = _page(runs, _figures(runs, draw))
    try:
        replace_text(Path(out), page)
    except OSError as error:
        raise InputError(f"the page {out} cannot be written: {error}", "a file that can be written",
                         "give -o another path") from None
    print(out)


class _Draw:
    """Draws figures of the runs, each run in a colour of its own."""

    def __init__(self, figure: Any, runs: Sequence[ReportedRun]) -> None:
        self.figure, self.runs = figure, runs
        self.colours = {run.name: f"C{index % 10}" for index, run in enumerate(runs)}

    def picture(self, title: str, height: float, fill: Callable[[Any], str]) -> dict[str, str]:
        """`fill` draws on the axes and returns the caption."""
        figure = self.figure(figsize=(7.2, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        caption = fill(axes)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        return {"title": title, "caption": caption, "svg": base64.b64encode(drawn.getvalue()).decode()}

    def lines(self, title: str, axis: str, curves: Mapping[str, tuple[list[int], list[float], int]]) -> dict[str, str]:
        """Curves by run, over steps, restarts as dotted lines."""
        def fill(axes: Any) -> str:
            restarted = False
            for run in (run for run in self.runs if curves[run.name][0]):
                steps, values, _ = curves[run.name]
                axes.plot(steps, values, color=self.colours[run.name], linewidth=1.2, label=run.name,
                          marker="." if len(steps) < 40 else None)
                for step in run.restarts:
                    axes.axvline(step, color=self.colours[run.name], linestyle=":", linewidth=1)
                    restarted = True
            axes.set_xlabel("step")
            axes.set_ylabel(axis)
            axes.grid(alpha=0.25)
            if len(self.runs) > 1:
                axes.legend(fontsize=8, frameon=False)
            widest = max(width for *_, width in curves.values())
            return "; ".join(["dotted: a restart"] * restarted + [f"means of up to {widest} lines"] * (widest > 1))
        return self.picture(title, 2.9, fill)

    def bars(self, title: str, axis: str, parts: Mapping[str, Mapping[str, float]], caption: str) -> dict[str, str]:
        """A bar of `parts` on top of one another for each name."""
        def fill(axes: Any) -> str:
            names = list(dict.fromkeys(part for amounts in parts.values() for part in amounts))
            starts = dict.fromkeys(parts, 0.0)
            for index, part in enumerate(names):
                widths = [amounts.get(part, 0.0) for amounts in parts.values()]
                if any(widths):
                    axes.barh(list(parts), widths, left=list(starts.values()), color=_COLOURS[index % len(_COLOURS)],
                              label=part.replace("_", " "), height=0.6)
                    starts = {name: starts[name] + width for name, width in zip(parts, widths, strict=True)}
            axes.invert_yaxis()
            axes.set_xlabel(axis)
            axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
            return caption
        return self.picture(title, 1.9 + 0.35 * len(parts), fill)


_COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#bab0ac",
            "#d37295", "#8cd17d", "#499894"]      # of parts


def _figures(runs: Sequence[ReportedRun], draw: _Draw) -> list[dict[str, Any]]:
    """Sections of figures: {title, figures, notes}."""
    curves = []
    for title, (key, axis) in CURVES.items():
        found = {run.name: run.curve(key) for run in runs}
        if any(len(set(values)) > 1 or key == "loss" for _, values, _ in found.values()):
            curves.append(draw.lines(title, axis, found))
    sets = sorted({(line["name"], key) for run in runs for line in run.evaluations for key, value in line.items()
                   if isinstance(value, float)})
    for name, key in sets:
        found = {}
        for run in runs:
            rows = [row for row in run.evaluations if row["name"] == name and row.get(key) is not None]
            found[run.name] = ([row["step"] for row in rows], [row[key] for row in rows], 1)
        curves.append(draw.lines(f"{name}: {key.replace('_', ' ')}", "", found))
    spent = {run.name: {name: seconds / run.steps[-1]["step"] for name, seconds in run.spent().items()} for run in runs}
    timed = {name: parts for name, parts in spent.items() if any(parts.values())}
    where = [draw.bars("Where the time went", "seconds per step, rank 0", timed,
                       f"{' and '.join(OUTSIDE_STEPS)} stand beside the steps, spread over them")] if timed else []
    parts, notes = {}, []
    for run in runs:
        planned, note = _planned(run)
        if planned:
            parts[f"{run.name}, planned"] = _gigabytes(planned)
        if run.measured:
            parts[f"{run.name}, measured"] = _gigabytes(run.measured.memory_per_rank)
        notes += [note] if note else []
    memory = [draw.bars("Memory by part", "GB of a rank", parts, "as amid-ds plan has it, and the parts that a "
                        "run measures; its peak is a curve above")] if parts else []
    return [{"title": "Curves", "figures": curves, "notes": []}, {"title": "Time", "figures": where, "notes": []},
            {"title": "Memory", "figures": memory, "notes": notes}]


def _planned(run: ReportedRun) -> tuple[dict[str, int], str]:
    """A rank's bytes by part as planned for the run's own ranks and device, or why there is no plan."""
    if not run.measured:
        return {}, f"{run.name}: nothing was measured, and nothing is planned: {run.unmeasured}"
    try:
        return plan_measured_run(run.measured).memory_per_rank, ""
    except InputError as error:      # its models may be elsewhere by now
        return {}, f"{run.name}: no plan can be made here: {error.found}"


def _gigabytes(memory: Mapping[str, int]) -> dict[str, float]:
    return {part: size / 1e9 for part, size in memory.items() if part != "total"}


def _page(runs: Sequence[ReportedRun], sections: Sequence[Mapping[str, Any]]) -> str:
    from jinja2 import Environment

    tables: list[dict[str, Any]] = [{
        "run": run, "facts": facts_of(run.folder), "last": run.steps[-1],
        "evaluated": list({line["name"]: line for line in run.evaluations}.values()),      # each set's last line
        "provenance": _provenance(run.folder),
        "recipe": (run.folder / "recipe.yaml").read_text(encoding="utf-8")} for run in runs]
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE).render(
        title=", ".join(run.name for run in runs), sections=sections, tables=tables, number=_number,
        keys=list(dict.fromkeys(key for row in tables for key in row["facts"])))


def _provenance(folder: Path) -> str:
    path = folder / "provenance.json"
    try:
        return json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1) if path.is_file() else "there is none"
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read: {error}"


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,.5g}" if isinstance(value, float) else f"{value}"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1.5em; color: #222 }
figure { display: inline-block; width: 47%; min-width: 30em; margin: 0 1% 1em 0; vertical-align: top }
figure img { width: 100% } figcaption { color: #777; font-size: 85%; min-height: 1.3em }
table { border-collapse: collapse; margin: .5em 0 1.5em } td, th { padding: .2em .9em; border-bottom: 1px solid #ddd;
text-align: right } td:first-child, th:first-child { text-align: left } pre { background: #f6f6f6; padding: 1em;
overflow-x: auto; font-size: 85% } h2 { border-bottom: 2px solid #eee; margin-top: 1.6em } summary { cursor: pointer }
</style></head><body>
<h1>{{ title }}</h1>
<table><tr><th>run</th>{% for key in keys %}<th>{{ key }}</th>{% endfor %}<th>tokens</th></tr>
{% for row in tables %}
<tr><td>{{ row.run.name }}</td>{% for key in keys %}<td>{{ row.facts.get(key, "–") }}</td>{% endfor %}
<td>{{ "{:,}".format(row.last.tokens) }}</td></tr>
{% endfor %}</table>
{% for section in sections %}
{% if section.figures or section.notes %}
<h2>{{ section.title }}</h2>
{% for figure in section.figures %}
<figure><img alt="{{ figure.title }}" src="data:image/svg+xml;base64,{{ figure.svg }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
{% for note in section.notes %}<p>{{ note }}</p>{% endfor %}
{% endif %}
{% endfor %}
<h2>Evaluation</h2>
{% for row in tables %}
<h3>{{ row.run.name }}</h3>
{% if row.evaluated %}
<table><tr>{% for key in row.evaluated[0] %}<th>{{ key.replace("_", " ") }}</th>{% endfor %}</tr>
{% for line in row.evaluated %}
<tr>{% for key in row.evaluated[0] %}<td>{{ number(line.get(key)) }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% else %}<p>not evaluated</p>{% endif %}
{% endfor %}
<h2>Provenance</h2>
{% for row in tables %}
<h3>{{ row.run.name }}</h3>
<p>{{ row.run.folder.resolve() }}{% for life in row.run.story %}{% if loop.index > 1 %}; started again
{%- if life.first_step %} at step {{ life.first_step }}{% endif %}{% endif %}{% endfor %}</p>
<details><summary>versions, revisions, hashes</summary><pre>{{ row.provenance }}</pre></details>
<details><summary>recipe</summary><pre>{{ row.recipe }}</pre></details>
{% endfor %}
</body></html>
"""
