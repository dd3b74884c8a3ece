"""Ranks of this package's commands, forked from one process that has imported what they need.

Under a launcher each rank imports torch, DeepSpeed and transformers by itself, for many seconds. A
command that runs several jobs one after the other has them imported once, beside its other work.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection

from amid_ds.distributed.launch import local_group_variables
from amid_ds.distributed.leash import LEASH_VARIABLE
from amid_ds.errors import ExitStatus

# What a training imports.
PRELOADED = ["amid_ds.cli", "amid_ds.training.train", "deepspeed",
             "transformers.generation.utils", "transformers.integrations.deepspeed",
             "transformers.models.llama.modeling_llama"]

_context = multiprocessing.get_context("forkserver")


def preload_ranks() -> None:
    """Begin to import, in a process beside this one, what `run_forked_ranks` will need."""
    _context.set_forkserver_preload(PRELOADED)
    # Inherited: Ctrl-C amid its imports would end it with a traceback. The ranks hear of it from
    # this process.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


def run_forked_ranks(ranks: int, arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run `amid-ds ARGUMENTS` on `ranks` ranks of this machine, until they have ended.

    variables: of their environment, beside those of a rank. Returns the status that stands for
    all: 0, that of a failure, or that of a stop in good order. The ranks stop so at Ctrl-C, and
    when this process ends, however that happens.
    """
    shared = {**variables, **local_group_variables(ranks), LEASH_VARIABLE: "stdin"}
    leash, held = _context.Pipe(duplex=False)
    processes = [_context.Process(target=_run_rank, args=(
        list(arguments), {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, leash))
        for rank in range(ranks)]
    try:
        for process in processes:
            process.start()
        leash.close()
        for process in processes:
            process.join()
    finally:
        # Whatever the reason: the ranks are not left behind.
        held.close()
        for process in processes:
            if process.pid is not None:
                process.join()
    statuses = {process.exitcode for process in processes} - {0}
    failures = statuses - {int(ExitStatus.RESTART)}
    return int(next(iter(failures or statuses), 0) or 0)


def _run_rank(arguments: Sequence[str], variables: Mapping[str, str], leash: Connection) -> None:
    """Be one of the ranks, as `python -m amid_ds ARGUMENTS` is; its end is the process's."""
    os.environ.update(variables)
    os.dup2(leash.fileno(), 0)
    sys.argv = ["amid-ds", *arguments]
    runpy.run_module("amid_ds", run_name="__main__")
