"""Fresh ranks of this machine, and the results of the work that each of them did."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from amid_ds.bench.measure import no_progress
from amid_ds.config.recipe import Train
from amid_ds.distributed.launch import local_group_variables
from amid_ds.distributed.rendezvous import init_distributed
from amid_ds.errors import TrainingError

_T = TypeVar("_T")


def on_local_ranks(size: int, title: str, work: Callable[..., _T], *arguments: Any,
                   variables: Mapping[str, str] | None = None) -> list[_T]:
    """The results of `work(world, *arguments)` on `size` fresh processes, by rank.

    work: a function of a module. Results: of less than 60 KB when pickled. variables: more of the
    ranks' environment. Raises TrainingError, which begins with `title`, where a rank fails.
    """
    threads = str(max(1, (os.cpu_count() or 1) // size))
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in range(size)]
    before = dict(os.environ)
    # Set here, because torch reads its number of threads when a rank imports it.
    os.environ.update({**local_group_variables(size), "OMP_NUM_THREADS": threads,
                       **(variables or {})})
    try:
        ranks = [spawn.Process(target=_run_rank, args=(rank, sender, work, arguments))
                 for rank, (_, sender) in enumerate(pipes)]
        for rank in ranks:
            rank.start()
    finally:
        # This process is no rank.
        os.environ.clear()
        os.environ.update(before)
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise TrainingError(f"{title}: ranks ended with {[rank.exitcode for rank in ranks]}")
    return [receiver.recv() for receiver, _ in pipes]


def _run_rank(rank: int, sender: Connection, work: Callable[..., object],
              arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with init_distributed(Train.model_fields["hang_timeout"].default) as world, no_progress():
        sender.send(work(world, *arguments))
