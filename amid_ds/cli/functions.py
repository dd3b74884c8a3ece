"""`amid_ds.train`, `plan` and `evaluate`: the commands as functions, with the same errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from amid_ds.config.parse import RecipeLike
    from amid_ds.eval.evaluate import Scores
    from amid_ds.planning.devices import Device
    from amid_ds.planning.estimate import Plan
    from amid_ds.run.results import Run
    from amid_ds.training.callbacks import Callback


def train(recipe: RecipeLike, overrides: Sequence[str] = (), *,
          callbacks: Sequence[Callback] = ()) -> Run:
    """Train by a recipe, as `amid-ds train`, and return the finished run; it resumes by itself.

    In one process, or in every rank of a launcher. recipe: a path, its content, or a Recipe.
    callbacks: told, on rank 0, before those that the recipe names. Raises InputError,
    TrainingError, or Stopped where it was asked to stop before its last step (Ctrl-C, a signal, the
    file STOP).
    """
    from amid_ds.cluster.task_jobs import train_and_judge

    return train_and_judge(recipe, overrides, callbacks=callbacks)


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


def evaluate(model: str | Path, *, data: str | Path, teacher: str | Path | None = None,
             cached: str | Path | None = None, protocol: str | None = None,
             seq_length: int | None = None, seeds: int | Sequence[int] | None = None,
             new_tokens: int | None = None, no_repeat_ngram: int | None = None,
             text: str | None = None, prompt: str | None = None, response: str | None = None,
             messages: str | None = None, template: str | None = None, split: str | None = None,
             on_bad_row: Literal["error", "skip"] = "error",
             trust_remote_code: bool = False) -> Scores:
    """The scores of a model on held-out rows, as `amid-ds eval`, whose options these are.

    In one process, or in every rank of a launcher. seeds: the number of samples per prompt, or the
    seeds themselves. Raises InputError, TrainingError.
    """
    from amid_ds.distributed.rendezvous import init_distributed
    from amid_ds.eval.evaluate import EVAL_TIMEOUT_S, evaluate_named
    from amid_ds.eval.protocol import EvalArgs, eval_protocol
    from amid_ds.eval.rows import RowOptions

    if seeds is not None:
        seeds_text = str(seeds) if isinstance(seeds, int) else "".join(f"{seed}," for seed in seeds)
    chosen = eval_protocol(protocol, seq_length, None if seeds is None else seeds_text, new_tokens,
                           no_repeat_ngram)
    rows = RowOptions(text, prompt, response, messages, template, split, on_bad_row)
    args = EvalArgs(str(model), None if teacher is None else str(teacher), str(data), chosen, rows,
                    trust_remote_code=trust_remote_code,
                    cached=None if cached is None else str(cached))
    with init_distributed(EVAL_TIMEOUT_S) as world:
        return evaluate_named(args, world)
