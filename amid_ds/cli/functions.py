"""`amid_ds.train`, `plan` and `evaluate`: the commands as functions, with the same errors."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from amid_ds.errors import InputError

if TYPE_CHECKING:
    from amid_ds.config.parse import RecipeLike
    from amid_ds.config.recipe import Recipe
    from amid_ds.eval.evaluate import Scores
    from amid_ds.planning.devices import Device
    from amid_ds.planning.estimate import Plan
    from amid_ds.run.results import Run
    from amid_ds.training.callbacks import Callback


def train(recipe: RecipeLike, overrides: Sequence[str] = (), *,
          callbacks: Sequence[Callback] = (), began: float | None = None) -> Run:
    """Train by a recipe, as `amid-ds train`, and return the finished run; it resumes by itself.

    In one process, or in every rank of a launcher. recipe: a path, its content, or a Recipe.
    callbacks: told, on rank 0, before those that the recipe names. began: when the start began, by
    time.monotonic(), such as the process's own; None: now. Raises InputError, TrainingError, or
    Stopped where it was asked to stop before its last step (Ctrl-C, a signal, the file STOP).
    """
    from amid_ds.distributed.launch import launched_rank
    from amid_ds.run.start import imports_kept

    with imports_kept():
        from amid_ds.training.train import run_training
    asked = _readable_recipe(recipe, overrides)
    jobs = None
    if asked is not None and asked.eval_tasks is not None:
        from amid_ds.cluster.task_jobs import TaskJobs

        jobs = TaskJobs(asked)
    run = run_training(recipe, overrides, began, [*callbacks, *([] if jobs is None else [jobs])])
    if asked is not None and launched_rank() == 0:
        if jobs is not None:
            jobs.finish()
        _attach_report(asked)
    return run


def _readable_recipe(recipe: RecipeLike, overrides: Sequence[str]) -> Recipe | None:
    """The recipe; None for a wrong one, which all ranks report together."""
    from amid_ds.config.parse import load_recipe

    with contextlib.suppress(InputError):
        return load_recipe(recipe, overrides)
    return None


def _attach_report(recipe: Recipe) -> None:
    """Give the report of a finished run to its trackers beside TensorBoard."""
    from amid_ds.run.trackers import with_processes

    if with_processes(recipe.train.trackers):
        from amid_ds.experiments.report import attach_report

        attach_report(recipe)


def plan(recipe: RecipeLike, overrides: Sequence[str] = (), *, nodes: int = 1,
         ranks_per_node: int = 1, device: str | Device | None = None,
         storage: float | None = None) -> Plan:
    """The plan of a recipe, as `amid-ds plan`: memory, network and time of one rank.

    recipe: a path, its content, or a Recipe. device: as `--device` names it; None: its default.
    storage: bytes/s that a node reads of the file system. `fits` of the plan says whether the run
    does. Raises InputError.
    """
    from amid_ds.config.parse import load_recipe
    from amid_ds.planning.devices import DEFAULT_DEVICE, find_device
    from amid_ds.planning.plan import make_plan
    from amid_ds.planning.reading import storage_bandwidth
    from amid_ds.training.objective import check_objectives

    loaded = load_recipe(recipe, overrides)
    check_objectives(loaded)
    if device is None or isinstance(device, str):
        device = find_device(device or DEFAULT_DEVICE, ranks_per_node)
    return make_plan(loaded, nodes, ranks_per_node, device, storage_bandwidth(storage))


def evaluate(model: str | Path, *, data: str | Path | None = None,
             teacher: str | Path | None = None, cached: str | Path | None = None,
             tasks: str | Sequence[str | Path] | None = None, limit: int | None = None,
             apply_chat_template: bool = False, protocol: str | None = None,
             seq_length: int | None = None, seeds: int | str | Sequence[int] | None = None,
             new_tokens: int | None = None, no_repeat_ngram: int | None = None,
             text: str | None = None, prompt: str | None = None, response: str | None = None,
             messages: str | None = None, template: str | None = None, split: str | None = None,
             on_bad_row: Literal["error", "skip"] = "error",
             trust_remote_code: bool = False) -> Scores:
    """The scores of a model on held-out rows, on tasks or on both, as `amid-ds eval`, whose
    options these are.

    In one process, or in every rank of a launcher, on every rank. seeds: the number of samples per
    prompt, or the seeds themselves. Raises InputError, TrainingError.
    """
    from amid_ds.distributed.rendezvous import init_distributed
    from amid_ds.eval.evaluate import EVAL_TIMEOUT_S
    from amid_ds.eval.protocol import EvalArgs, eval_protocol
    from amid_ds.eval.rows import RowOptions
    from amid_ds.eval.tasks import TaskArgs, evaluate_named

    _refuse_without(data, "--data", {"--teacher": teacher, "--cached": cached,
                                     "--protocol": protocol})
    _refuse_without(tasks, "--tasks", {"--limit": limit,
                                       "--apply-chat-template": apply_chat_template})
    if data is None and tasks is None:
        raise InputError("amid-ds eval with neither --data nor --tasks", "one of them, or both",
                         "name the file to score on, or benchmarks")
    rows = asked = None
    if data is not None:
        chosen = eval_protocol(protocol, seq_length, seeds, new_tokens, no_repeat_ngram)
        options = RowOptions(text, prompt, response, messages, template, split, on_bad_row)
        rows = EvalArgs(str(model), None if teacher is None else str(teacher), str(data), chosen,
                        options, trust_remote_code=trust_remote_code,
                        cached=None if cached is None else str(cached))
    if tasks is not None:
        names = tasks.split(",") if isinstance(tasks, str) else map(str, tasks)
        asked = TaskArgs(tuple(name.strip() for name in names), limit, apply_chat_template)
    with init_distributed(EVAL_TIMEOUT_S) as world:
        return evaluate_named(str(model), rows, asked, world, trust_remote_code=trust_remote_code)


def _refuse_without(needed: object, option: str, others: Mapping[str, object]) -> None:
    """Raise InputError where an option is given that does something for `option` alone."""
    given = [name for name, value in others.items() if value not in (None, False)]
    if needed is None and given:
        raise InputError(f"{' and '.join(given)} without {option}", f"{option} beside it",
                         "add it, or leave the others out")
