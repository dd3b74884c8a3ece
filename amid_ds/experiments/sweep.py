"""`amid-ds sweep`: a recipe run once for each combination of values, and one table of what came out.

Every combination is a run like any other, in a folder of its own, so one that was cut goes on and one that is finished
is not run again: the same command, again, is all there is to resuming. The table asks nobody what was swept. It looks
at the runs' own recipes, and its columns are the keys in which these differ.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amid_ds.checkpoint.manifest import checkpoint_step, list_checkpoints
from amid_ds.cluster.requeue import STOPPED
from amid_ds.config.grid import Combination, parse_swept_key, sweep_combinations
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.distributed.launch import launch_command
from amid_ds.errors import InputError, Stopped, TrainingError
from amid_ds.files import replace_text
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_metrics
from amid_ds.training.compatibility import flat_recipe
from amid_ds.training.job import check_recipe

TRAIN_LOG = "sweep.log"      # in a run's folder: what it said
APART = ("output_dir", "data.prepared")      # in which runs differ without being different
SweepMetrics = Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What is swept. `fixed` overrides hold for all runs."""

    recipe_path: str
    fixed: tuple[str, ...]
    runs: tuple[Combination, ...]
    folder: Path

    def overrides(self, run: Combination) -> list[str]:
        return [*self.fixed, *run.overrides(self.folder)]

    def recipe(self, run: Combination) -> Recipe:
        return load_recipe(self.recipe_path, self.overrides(run))

    def unfinished(self) -> tuple[Combination, ...]:
        return tuple(run for run in self.runs if not is_finished(self.folder / run.name, self.recipe(run)))


def plan_sweep(recipe_path: str, words: Sequence[str], ranks: int) -> Sweep:
    """The sweep that `words` ask for: a key with several values is swept, one with a single value is an override.
    Every run is checked as `train` would on `ranks` ranks. Raises InputError."""
    split = [(word, parse_swept_key(word)) for word in words]
    swept = [word for word, (_, values) in split if len(values) > 1]
    if not swept:
        raise InputError(f"the sweep {' '.join(words)!r} names no key with several values", "KEY=VALUE,VALUE,...",
                         "e.g. loss.alpha=-5,-1,1 loss.lam=0.1,0.5")
    fixed = [word for word, (_, values) in split if len(values) == 1]
    recipe = load_recipe(recipe_path, fixed)
    keys = [parse_swept_key(word)[0] for word in swept]
    if recipe.data.prepared is None and not any(key.startswith(("data", "student", "train.seq_length"))
                                                for key in keys):
        fixed.append(f"data.prepared={Path(recipe.output_dir) / 'data'}")      # once for all of them
    sweep = Sweep(recipe_path, tuple(fixed), sweep_combinations(swept), Path(recipe.output_dir))
    for run in sweep.runs:
        check_recipe(sweep.recipe(run), ranks)
    return sweep


def is_finished(run: Path, recipe: Recipe) -> bool:
    saved = list_checkpoints(run / "checkpoints")
    return bool(saved) and checkpoint_step(saved[-1]) == recipe.train.steps and (RunFolder(run).model).is_dir()


def run_here(sweep: Sweep, ranks: int) -> None:
    """What is not finished, one after another. A request to stop stops the run that is at it in order: Stopped.
    A run that fails does not keep the others from running; TrainingError names it at the end."""
    failed = [run.name for number, run in enumerate(sweep.runs, 1)
              if run_one(f"[{number}/{len(sweep.runs)}] {run.name}", sweep.recipe_path, sweep.overrides(run), ranks)]
    if failed:
        if list(sweep.folder.glob("*/recipe.yaml")):
            write_results(sweep.folder)
        raise TrainingError(f"{len(failed)} of {len(sweep.runs)} run(s) failed: {' '.join(failed)}\n"
                            f"  each says why in its {TRAIN_LOG}; the same command again runs these alone")


def run_one(title: str, recipe_path: str, overrides: Sequence[str], ranks: int) -> int:
    """A run in processes of its own, if it is not finished; its words go to a file. Its exit status, or Stopped."""
    recipe = load_recipe(recipe_path, overrides)
    folder = Path(recipe.output_dir)
    if is_finished(folder, recipe):
        print(f"{title}: finished already", flush=True)
        return 0
    print(f"{title}: {folder / TRAIN_LOG}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / TRAIN_LOG, "ab") as log:
        status = _wait(launch_command(ranks, "train", recipe_path, *overrides), log, folder)
    if status:
        print(f"{title}: ended with status {status}\n{_tail(folder / TRAIN_LOG)}", file=sys.stderr, flush=True)
    return status


def _wait(arguments: Sequence[str], log: Any, run: Path) -> int:
    """The exit status of a run. A signal becomes the run's STOP file: a launcher may die of one before its ranks.
    Raises Stopped, or TrainingError where the run was asked to stop and failed: what comes next is not begun."""
    process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    with _signals_to(lambda: RunFolder(run).stop_file.touch(), lambda: os.killpg(process.pid, signal.SIGKILL)) as asked:
        status = process.wait()
    RunFolder(run).stop_file.unlink(missing_ok=True)      # asked for after its last step
    if asked and status not in (0, STOPPED):
        raise TrainingError(f"the run in {run} was asked to stop and ended with status {status}\n{_tail(run / TRAIN_LOG)}")
    if asked or status == STOPPED:
        raise Stopped(f"stopped in {run}; the same command goes on from there")
    return status


@contextmanager
def _signals_to(first: Callable[[], object], then: Callable[[], object]) -> Iterator[list[int]]:
    """Within it a signal to stop calls `first`, another one `then`; yields the signals that have come. What is ignored
    stays ignored: `nohup`."""
    asked: list[int] = []

    def hear(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) == 1:
            first()
        elif number != signal.SIGHUP:      # which a terminal that is closed sends, and its shell again
            then()

    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
               if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, hear) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _tail(path: Path, lines: int = 5) -> str:
    return "\n".join(f"    {line}" for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@dataclass(frozen=True)
class SweepRow:
    """One run of the table: what tells it from the others, how far it is, and its figures."""

    run: Path
    settings: Mapping[str, Any]
    figures: SweepMetrics


def read_sweep_rows(folder: Path) -> list[SweepRow]:
    """The runs in a folder, in the order of their settings. Raises InputError where there is none."""
    runs = sorted(path.parent for path in folder.glob("*/recipe.yaml"))
    if not runs:
        raise InputError(f"{folder} holds no runs", "the output_dir of a sweep", "check the path")
    recipes = {run: {key: value for key, value in flat_recipe(load_recipe(run / "recipe.yaml")).items()
                    if key not in APART}
               for run in runs}
    keys = dict.fromkeys(itertools.chain.from_iterable(recipes.values()))
    apart = [key for key in keys if len({repr(recipe.get(key)) for recipe in recipes.values()}) > 1]
    rows = [SweepRow(run, {key: recipe.get(key) for key in apart}, final_metrics(run)) for run, recipe in recipes.items()]
    return sorted(rows, key=lambda row: [_order(value) for value in row.settings.values()])


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def final_metrics(run: Path) -> dict[str, Any]:
    """How far a run is, the mean loss of its last tenth, the figures of its last evaluation on each set, and what
    `scores.json` says, where `amid-ds eval --json` was written there."""
    lines = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    last = lines[-max(1, len(lines) // 10):]
    found: dict[str, Any] = {"step": lines[-1]["step"] if lines else 0,
                             "train_loss": sum(line["loss"] for line in last) / len(last) if last else None}
    path = run / "eval.jsonl"
    evaluations = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    latest = {line["name"]: line for line in map(json.loads, evaluations)}
    for name, line in latest.items():
        found |= {key if len(latest) == 1 else f"{name}.{key}": value for key, value in line.items()
                  if key not in ("step", "name", "tokens")}
    if (run / SCORES).is_file():
        found |= json.loads((run / SCORES).read_text(encoding="utf-8"))
    return found


SCORES = "scores.json"


def write_table(folder: Path) -> str:
    """sweep.csv and sweep.md in `folder`, one line for each run; the Markdown."""
    rows = read_sweep_rows(folder)
    settings = list(rows[0].settings)
    figures = list(dict.fromkeys(itertools.chain.from_iterable(row.figures for row in rows)))
    figures = [name for name in figures if any(row.figures.get(name) is not None for row in rows)]
    lines = [[*(row.settings[key] for key in settings), *(row.figures.get(name) for name in figures)] for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*settings, *figures], *lines])
    replace_text(folder / "sweep.csv", text.getvalue())
    table = markdown([*settings, *figures], lines, left=len(settings))
    replace_text(folder / "sweep.md", table)
    return table


def markdown(titles: Sequence[str], lines: Sequence[Sequence[Any]], left: int = 1) -> str:
    """A table with the first `left` columns to the left; numbers with four digits that count."""
    def shown(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    rule = ["---"] * left + ["---:"] * (len(titles) - left)
    every = [titles, rule, *([shown(value) for value in line] for line in lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in every)


def write_results(folder: Path) -> None:
    """The table, and the figures where matplotlib is installed; says where they are."""
    from amid_ds.experiments.plots import plot_losses, plot_sweep

    print(write_table(folder))
    rows = read_sweep_rows(folder)
    drawn = [plot_sweep(rows, folder / "sweep.png"), plot_losses(rows, folder / "losses.png")]
    print(f"the table is in {folder / 'sweep.csv'} and sweep.md, the figures in "
          f"{' and '.join(path.name for path in drawn)}")
