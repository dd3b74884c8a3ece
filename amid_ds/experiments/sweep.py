"""`amid-ds sweep`: a recipe run once for each combination of values, and one table of the results.

Each combination is an ordinary run in its own folder, so the same command again resumes an
interrupted run and skips a finished one. The table is made from the runs' own recipes: its columns
are the keys in which they differ.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import itertools
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from amid_ds.checkpoint.best import comparable_best, has_finished
from amid_ds.checkpoint.manifest import newest_state
from amid_ds.config.grid import Combination, parse_swept_key, path_override, sweep_combinations
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.data import with_steps
from amid_ds.distributed.launch import launch_command
from amid_ds.distributed.leash import start_on_leash
from amid_ds.errors import ExitStatus, InputError, Stopped, TrainingError, printable
from amid_ds.experiments.plots import plot_losses, plot_sweep, require_matplotlib
from amid_ds.files.atomic import replace_text
from amid_ds.files.ownership import require_own_file, require_own_folder
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_evaluations, read_metrics
from amid_ds.run.places import BEFORE_TRAINING
from amid_ds.training.compatibility import flat_recipe
from amid_ds.training.job import check_recipe

logger = logging.getLogger(__name__)

# In a run's folder: its output.
TRAIN_LOG = "sweep.log"
# In a run's folder: more numbers for its line of the table.
SCORES_FILE = "scores.json"
# Keys that differ between any two runs.
OWN_KEYS = ("output_dir", "data.prepared")
# With these keys swept, the runs cannot share prepared data.
DATA_KEYS = ("data", "student", "train.seq_length")
TAIL_LINES = 5
# The table's training loss is the mean over this part of the logged steps.
LAST_SHARE = 10
# Between two looks at a lock.
LOCK_POLL_S = 0.2

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Sweep:
    """A recipe, overrides that hold for all runs, and the runs, each in a folder under `folder`."""

    recipe_path: str
    fixed: tuple[str, ...]
    runs: tuple[Combination, ...]
    folder: Path

    def overrides(self, run: Combination) -> list[str]:
        return [*self.fixed, *run.overrides(self.folder)]

    def recipe(self, run: Combination) -> Recipe:
        return load_recipe(self.recipe_path, self.overrides(run))

    def unfinished(self) -> tuple[Combination, ...]:
        return tuple(run for run in self.runs
                     if not is_finished(self.folder / run.name, self.recipe(run)))


def plan_sweep(recipe_path: str, settings: Sequence[str], ranks: int) -> Sweep:
    """The sweep of `settings`: a key with several values is swept, one with one is an override.

    Every run is checked as `train` does on `ranks` ranks. Raises InputError, also without
    matplotlib: better now than after the runs.
    """
    require_matplotlib()
    values = [(setting, parse_swept_key(setting)[1]) for setting in settings]
    swept = [setting for setting, several in values if len(several) > 1]
    if not swept:
        raise InputError(f"the sweep {' '.join(settings)!r} names no key with several values",
                         "KEY=VALUE,VALUE,...", "e.g. loss.alpha=-5,-1,1 loss.lam=0.1,0.5")
    fixed = [setting for setting, several in values if len(several) == 1]
    recipe = load_recipe(recipe_path, fixed)
    shares_data = not any(parse_swept_key(setting)[0].startswith(DATA_KEYS) for setting in swept)
    if recipe.data.prepared is None and shares_data:
        fixed.append(path_override("data.prepared", Path(recipe.output_dir) / "data"))
    sweep = Sweep(recipe_path, tuple(fixed), sweep_combinations(swept), Path(recipe.output_dir))
    _require_own_sweep(sweep)
    for run in sweep.runs:
        check_recipe(sweep.recipe(run), ranks)
    return sweep


def _require_own_sweep(sweep: Sweep) -> None:
    """Raise InputError unless the sweep's folder is new, or holds runs: of this sweep or others."""
    own_names = {run.name for run in sweep.runs} | set(BEFORE_TRAINING)
    require_own_folder(sweep.folder, bool(_run_folders(sweep.folder)), "output_dir",
                       lambda entry: entry.name in own_names or entry.suffix in (".yaml", ".yml"))
    _require_own_table(sweep.folder)


def _require_own_table(folder: Path) -> None:
    """Raise InputError where the table or a figure is there, and is not that of a sweep."""
    table = folder / "sweep.md"
    require_own_file(table, lambda text: text.startswith("| "), "the table")
    for name in ("sweep.csv", "sweep.png", "losses.png"):
        require_own_file(folder / name, lambda _: table.exists(), "the table")


def is_finished(run: Path, recipe: Recipe) -> bool:
    """True once the run has saved its last step and exported its model, its best one too."""
    folder = RunFolder(run)
    state = newest_state(folder)
    if state is None or not has_finished(with_steps(recipe), state):
        return False
    selects = comparable_best(recipe, state) is not None
    return folder.model.is_dir() and (folder.best_model.is_dir() or not selects)


def run_here(sweep: Sweep, ranks: int) -> None:
    """Run the unfinished runs one after another.

    A request to stop stops the current run in good order and raises Stopped. A failed run does not
    keep the others from running; TrainingError names it at the end.
    """
    failed = []
    for number, run in enumerate(sweep.runs, 1):
        title = f"[{number}/{len(sweep.runs)}] {run.name}"
        if run_one(title, sweep.recipe_path, sweep.overrides(run), ranks):
            failed.append(run.name)
    if failed:
        if _run_folders(sweep.folder):
            write_results(sweep.folder)
        raise TrainingError(
            f"{len(failed)} of {len(sweep.runs)} run(s) failed: {' '.join(failed)}\n"
            f"  each says why in its {TRAIN_LOG}; the same command again runs these alone")


def run_one(title: str, recipe_path: str, overrides: Sequence[str], ranks: int) -> int:
    """Run a recipe in processes of its own unless it is finished; its exit status.

    Its output goes to TRAIN_LOG. Raises Stopped if it was asked to stop.
    """
    recipe = load_recipe(recipe_path, overrides)
    folder = Path(recipe.output_dir)
    if is_finished(folder, recipe):
        logger.info(f"{title}: finished already")
        return int(ExitStatus.DONE)
    logger.info(f"{title}: {folder / TRAIN_LOG}")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / TRAIN_LOG, "ab") as log:
        if _wait_for_others(log) and is_finished(folder, recipe):
            return int(ExitStatus.DONE)
        status = _wait(launch_command(ranks, "train", recipe_path, *overrides), log, folder)
    if status:
        logger.error(f"{title}: ended with status {status}\n{_tail(folder / TRAIN_LOG)}")
    return status


def _wait_for_others(log: BinaryIO) -> bool:
    """Lock the log of a run; True if its processes of another sweep had to be waited for.

    They hold the lock, as their output, until the last of them has ended: a sweep that was killed
    is not started again beside a run of its own that still saves.
    """
    waited = False
    while True:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return waited
        except BlockingIOError:
            if not waited:
                logger.info(f"another process writes {log.name}: waiting for its end")
            waited = True
            time.sleep(LOCK_POLL_S)
        except OSError:
            # A file system without locks.
            return waited


def run_logged(arguments: Sequence[str], path: Path) -> int:
    """Run a command that can be begun again at any time, its output in `path`; its exit status.

    Raises Stopped if it was asked to stop.
    """
    with open(path, "wb") as log:
        status = _wait(arguments, log, path.parent, resumes=False)
    if status:
        logger.error(f"{path}: ended with status {status}\n{_tail(path)}")
    return status


def _wait(arguments: Sequence[str], log: BinaryIO, run: Path, resumes: bool = True) -> int:
    """Start a run's command and return its exit status.

    A signal lets go of the run's leash, because a launcher may die of it before its ranks do.
    resumes: the command saves what it has when it is asked to stop. Raises Stopped; or
    TrainingError if such a one was asked to and failed, so that no other run begins.
    """
    with start_on_leash(arguments, stdout=log, stderr=subprocess.STDOUT,
                        start_new_session=True) as process:
        assert process.stdin is not None
        with signals_to(process.stdin.close,
                        lambda: os.killpg(process.pid, signal.SIGKILL)) as received:
            status = process.wait()
    if received and resumes and status not in (ExitStatus.DONE, ExitStatus.RESTART):
        raise TrainingError(f"the run in {run} was asked to stop and ended with status {status}\n"
                            f"{_tail(run / TRAIN_LOG)}")
    if received or status == ExitStatus.RESTART:
        message = f"stopped in {run}; the same command goes on from there"
        logger.info(message)
        raise Stopped(message)
    return status


@contextlib.contextmanager
def signals_to(first: Callable[[], object], then: Callable[[], object]) -> Iterator[list[int]]:
    """Call `first` on the first signal to stop and `then` on later ones; yields those received.

    A signal that is ignored stays ignored, as under `nohup`.
    """
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        received.append(number)
        if len(received) == 1:
            first()
        elif number != signal.SIGHUP:
            # A closed terminal sends SIGHUP, and its shell sends it again.
            then()

    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])


@dataclass(frozen=True)
class SweepRow:
    """One run of the table.

    settings: the recipe's keys in which the runs differ, with this run's values. metrics: numbers
    by name, None for one without a value.
    """

    run: Path
    settings: Mapping[str, object]
    metrics: Mapping[str, float | None]


def read_sweep_rows(folder: Path) -> list[SweepRow]:
    """The runs in a folder, ordered by their settings. Raises InputError for a folder without."""
    runs = _run_folders(folder)
    if not runs:
        raise InputError(f"{folder} holds no runs", "the output_dir of a sweep", "check the path")
    recipes = [_flat_recipe(run) for run in runs]
    keys = dict.fromkeys(itertools.chain.from_iterable(recipes))
    differing = [key for key in keys if len({repr(recipe.get(key)) for recipe in recipes}) > 1]
    rows = [SweepRow(run, {key: recipe.get(key) for key in differing}, final_metrics(run))
            for run, recipe in zip(runs, recipes, strict=True)]
    return sorted(rows, key=lambda row: [_sort_key(value) for value in row.settings.values()])


def _run_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if RunFolder(path).exists)


def _flat_recipe(run: Path) -> dict[str, object]:
    """The run's recipe by dotted keys, without those in which all runs differ."""
    values = flat_recipe(load_recipe(RunFolder(run).recipe))
    return {key: value for key, value in values.items() if key not in OWN_KEYS}


def _sort_key(value: object) -> tuple[int, float, str]:
    """Numbers before all else, by their value."""
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def final_metrics(run: Path) -> dict[str, float | None]:
    """A run's last step, its training loss, its last evaluation on each set, its best evaluation by
    `checkpoint.best`, and its scores.

    The training loss is the mean over the last tenth of the logged steps. The scores are those of
    SCORES_FILE, e.g. the output of `amid-ds eval --json`.
    """
    lines = read_metrics(run)
    last = lines[-max(1, len(lines) // LAST_SHARE):]
    metrics: dict[str, float | None] = {
        "step": lines[-1]["step"] if lines else 0,
        "train_loss": sum(line["loss"] for line in last) / len(last) if last else None}
    latest = {line["name"]: line for line in read_evaluations(run)}
    for name, line in latest.items():
        prefix = "" if len(latest) == 1 else f"{name}."
        metrics |= {prefix + key: value for key, value in line.items()
                    if key not in ("step", "name", "tokens")}
    recipe, state = load_recipe(RunFolder(run).recipe), newest_state(RunFolder(run))
    best = None if state is None else comparable_best(recipe, state)
    if best is not None and recipe.checkpoint.best is not None:
        metrics |= {"best_step": best["step"],
                    f"best_{recipe.checkpoint.best.key}": best["value"]}
    if (run / SCORES_FILE).is_file():
        scores = json.loads((run / SCORES_FILE).read_text(encoding="utf-8"))
        # Not the text that says how they were made.
        metrics |= {name: value for name, value in scores.items() if not isinstance(value, str)}
    return metrics


def write_table(folder: Path, rows: Sequence[SweepRow]) -> str:
    """Write sweep.csv and sweep.md in `folder`, one line per run; returns the Markdown."""
    settings = list(rows[0].settings)
    names = dict.fromkeys(itertools.chain.from_iterable(row.metrics for row in rows))
    metrics = [name for name in names if any(row.metrics.get(name) is not None for row in rows)]
    lines = [[*row.settings.values(), *(row.metrics.get(name) for name in metrics)]
             for row in rows]
    table = markdown_table([*settings, *metrics], lines, left_aligned=len(settings))
    # First: the other files are known as ours by it.
    replace_text(folder / "sweep.md", table)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*settings, *metrics], *lines])
    replace_text(folder / "sweep.csv", text.getvalue())
    return table


def markdown_table(titles: Sequence[str], lines: Sequence[Sequence[object]],
                   left_aligned: int = 1) -> str:
    """A Markdown table with floats to four significant digits; the other columns align right."""
    rule = ["---"] * left_aligned + ["---:"] * (len(titles) - left_aligned)
    rows = [map(_cell, titles), rule, *(map(_cell, line) for line in lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    # A name may have a bar in it, or what a terminal would obey.
    return printable(str(value), keep="").replace("|", "\\|")


def write_results(folder: Path) -> None:
    """Print and write the table of a sweep's folder, and draw its figures."""
    rows = read_sweep_rows(folder)
    _require_own_table(folder)
    print(write_table(folder, rows))
    figures = [plot_sweep(rows, folder / "sweep.png"), plot_losses(rows, folder / "losses.png")]
    print(f"the table is in {folder / 'sweep.csv'} and sweep.md, the figures in "
          f"{' and '.join(path.name for path in figures)}")
