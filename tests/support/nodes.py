"""Ranks on nodes of their own: each takes its host's name from its number."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.data import write_instructions
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main
from support.runs import write_gathering_config, write_recipe


def name_host(variables: dict[str, str]) -> None:
    """Give this process, the rank of these variables, the host name of its node of two ranks.

    With the variable CYCLIC there are two nodes, and neighbours run on different ones. With STOP_AT
    the run stops at that step, in order.
    """
    rank = int(variables["RANK"])
    node = rank % 2 if "CYCLIC" in variables else rank // 2
    socket.gethostname = lambda: f"node{node}"

    def around(trainer: Any, batch: object) -> Iterator[None]:
        yield
        if trainer.world.is_main and trainer.state.step == int(variables["STOP_AT"]):
            (trainer.job.run.path / "STOP").touch()

    if "STOP_AT" in variables:
        patch_train_step(around)


def node_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank of a node of two."""
    name_host(variables)
    rank_main(argv, variables, log)


def write_windows_recipe(folder: Path, pair: tuple[Path, Path], data: Path, **changes: Any) -> Path:
    """Write a recipe of windows of two micro-batches on four ranks, with an evaluation set."""
    held_out = write_instructions(folder / "held.jsonl", rows=8, seed=5)
    evaluated = {"path": str(held_out), "prompt": "prompt", "response": "response"}
    return write_recipe(folder / "r.yaml", *pair, data, folder / "run",
                        data__prepared=str(folder / "data"), data__eval=[evaluated],
                        train__global_batch_size=8,
                        deepspeed=str(write_gathering_config(folder)), **changes)


def train_on_nodes(ranks: int, recipe: Path, run: Path, *overrides: str, stop_at: int | None = None,
                   target: Any = node_rank, expected: int | None = None, **variables: str) -> Ranks:
    """Train on nodes of two ranks, to the end or until the step `stop_at`.

    variables: further ones of name_host; expected: another exit status than theirs.
    """
    if stop_at is not None:
        variables["STOP_AT"] = str(stop_at)
    processes = Ranks(ranks, "train", recipe, f"output_dir={run}", *overrides,
                      variables=variables, target=target)
    status = expected if expected is not None else 0 if stop_at is None else 75
    statuses = processes.wait(300)
    assert statuses == [status] * ranks, "\n".join(map(processes.output, range(ranks)))
    return processes
