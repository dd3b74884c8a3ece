"""The places that a run writes to, checked against what it reads and against what lies there.

Before anything is written: a run's folder and its prepared data are new or our own, and no input
is equal to, inside or around a place that is written. Symbolic links and `..` are resolved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.data.locate import is_hub_id, source_files
from amid_ds.data.prepared_folder import require_own_prepared
from amid_ds.data.targets import read_target_plan
from amid_ds.errors import InputError
from amid_ds.files.ownership import require_own_folder
from amid_ds.run.folder import RunFolder
from amid_ds.run.warm_start import find_run

# In a run's folder before its first attempt: what prepare, submit, requeue, sweep, Slurm and the
# user put there. Beside these only settings do not count, YAML files and the DeepSpeed config; the
# weights that a warm start has exported; and a teacher's distributions.
BEFORE_TRAINING = ("data", "submissions", "logs", "attempts.jsonl", "lives.jsonl", "sweep.log",
                   "STOP", "lease.json")
# The sign of a model that `export` wrote is its card.
MODEL_CARD_SIGN = "amid-ds"


def check_places(recipe: Recipe) -> None:
    """Raise InputError where the run would write over, into or around what is not its own."""
    run = RunFolder(Path(recipe.output_dir))
    deepspeed = os.path.realpath(recipe.deepspeed)

    def is_spared(entry: Path) -> bool:
        is_setting = entry.suffix in (".yaml", ".yml") and entry != run.recipe
        return (entry.name in BEFORE_TRAINING or entry.name.startswith("lease.json.") or is_setting
                or os.path.realpath(entry) == deepspeed
                or (entry == run.start_model and is_exported(entry))
                or _is_cache(entry)
                or (entry == run.recipe and _is_resolved(entry)))

    require_own_folder(run.path, run.is_own, "output_dir", is_spared)
    require_own_model(run.model)
    if recipe.checkpoint.best is not None:
        require_own_model(run.best_model)
    if not recipe.data.streams:
        for subfolder in recipe.data.parts():
            require_own_prepared(recipe.prepared_dir / subfolder)
    other = find_run(recipe.student.model)
    if other is not None and other.resolve() == run.path.resolve():
        raise InputError(f"student.model, {recipe.student.model}, is the run's own folder",
                         "a model, or another run", "name the model that the student begins with")
    places = [os.path.realpath(place) for place in _written_places(run)]
    prepared = os.path.realpath(recipe.prepared_dir)
    for place in places:
        _refuse_overlap("data.prepared", prepared, place)
    for setting, path in _inputs(recipe):
        for place in (*places, prepared):
            _refuse_overlap(setting, path, place)
    for setting, path in (("output_dir", os.path.realpath(run.path)), ("data.prepared", prepared)):
        _refuse_inside_another_run(setting, Path(path))


def check_cache_place(recipe: Recipe, out: Path) -> None:
    """Raise InputError where a cache in `out` would lie over, in or around what the recipe's run
    reads or writes, or in a place that another run writes."""
    run, path = RunFolder(Path(recipe.output_dir)), os.path.realpath(out)
    others = [(f"{place.relative_to(run.path)} of output_dir", os.path.realpath(place))
              for place in _written_places(run)]
    others += [("data.prepared", os.path.realpath(recipe.prepared_dir)), *_inputs(recipe)]
    for setting, other in others:
        if relation := _relation(path, other):
            raise InputError(f"--out, {path}, {relation} {setting}, {other}",
                             "a folder of its own", "name another --out")
    _refuse_inside_another_run("--out", Path(path))


def _refuse_inside_another_run(setting: str, path: Path) -> None:
    """Raise InputError where another run would replace or prune what is written to `path`."""
    for parent in path.parents:
        other = RunFolder(parent)
        if not other.exists:
            continue
        for place in map(os.path.realpath, _written_places(other)):
            if path.is_relative_to(place):
                raise InputError(f"{setting}, {path}, is inside {place}, which another run writes",
                                 "a folder apart from what another run writes",
                                 f"set {setting} to another folder")


def is_exported(model: Path) -> bool:
    """True for a model's folder that `export` wrote."""
    try:
        return MODEL_CARD_SIGN in (model / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def require_own_model(model: Path) -> None:
    """Raise InputError where a run's model lies that is none that `export` wrote."""
    require_own_folder(model, is_exported(model), "the run's model")


def _is_resolved(recipe: Path) -> bool:
    """True for a recipe as a run's start writes it: every key, and nothing of a person's hand."""
    try:
        return recipe.read_text(encoding="utf-8") == dump_recipe(load_recipe(recipe))
    except (InputError, OSError, UnicodeDecodeError):
        return False


def _is_cache(folder: Path) -> bool:
    """True for a folder that `amid-ds cache` has begun or finished."""
    try:
        return read_target_plan(folder) is not None
    except InputError:
        return False


def _written_places(run: RunFolder) -> tuple[Path, ...]:
    """What the run writes beside the prepared data."""
    return (run.checkpoints, run.model, run.best_model, run.start_model, run.student_files,
            run.tensorboard, run.profile, run.failures, run.submissions, run.logs, run.recipe,
            run.task_checkpoints, run.task_scores, run.provenance, run.metrics, run.evaluations,
            run.samples, run.tracker_ids, run.mlflow, run.report, run.measurements, run.attempts)


def _inputs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(what names it, real path) of all that the run reads on this machine."""
    models = {"student.model": recipe.student.model}
    teacher = recipe.live_teacher
    if teacher is not None:
        bases = {} if teacher.delta is None else teacher.delta.bases
        models |= {"teacher.model": teacher.model,
                   **{f"teacher.delta.{name}.model": base.model for name, base in bases.items()}}
    if recipe.cached_teacher is not None:
        models["teacher.cached"] = recipe.cached_teacher.cached
    for setting, model in models.items():
        # A run may be the student's start; of its folder only the checkpoints are read.
        if os.path.exists(model) and find_run(model) is None:
            yield setting, os.path.realpath(model)
    for subfolder, part in recipe.data.parts().items():
        for source in part.train:
            if is_hub_id(source.path):
                continue
            setting = f"the data source {source.path!r} of data.{subfolder or 'train'}"
            paths = ([source.path] if os.path.exists(source.path)
                     else [file.path for file in source_files(source)])
            for path in {*paths, *_searched_folder(source.path)}:
                yield setting, os.path.realpath(path)
    if os.path.exists(recipe.deepspeed):
        yield "deepspeed", os.path.realpath(recipe.deepspeed)


def _searched_folder(pattern: str) -> list[str]:
    """The folder that a pattern with `**` takes everything below of; [] for any other path."""
    head, found, _ = pattern.partition("**")
    return [os.path.dirname(head) or "."] if found and not os.path.exists(pattern) else []


def _refuse_overlap(setting: str, path: str, place: str) -> None:
    if relation := _relation(path, place):
        raise InputError(f"{setting}, {path}, {relation} {place}, which the run writes",
                         "inputs apart from the folders that are written",
                         "set output_dir or data.prepared to another folder, or move the input")


def _relation(path: str, place: str) -> str | None:
    """How two real paths overlap, as a predicate of the first; None where they do not."""
    if path == place:
        return "is"
    if path.startswith(place.rstrip("/") + "/"):
        return "is inside"
    return "is around" if place.startswith(path.rstrip("/") + "/") else None
