"""Ranks: real processes joined by gloo, forked from one server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from amid_ds.distributed.launch import free_port

# Python 3.11's fork server does not copy sys.path, and ignores silently what it cannot import.
TESTS = str(Path(__file__).parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["support.rank_imports"])


class Ranks:
    """`amid-ds ARGUMENTS` started on `size` ranks.

    `variables` are added to the ranks' environment. `target` is called in place of rank_main, with
    its arguments: a module-level function that patches amid_ds and then calls rank_main.
    """

    def __init__(self, size: int, *arguments: object, variables: dict[str, str] | None = None,
                 target: Callable[[list[str], dict[str, str], str], None] | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free_port()), **(variables or {})}
        argv = [str(argument) for argument in arguments]
        self.processes = [
            _forkserver.Process(target=target or rank_main, daemon=True, args=(
                argv, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(self.log(rank))))
            for rank in range(size)]
        for process in self.processes:
            process.start()

    def log(self, rank: int) -> Path:
        """The file of the rank's output; beside it a target may leave files of its own."""
        return Path(self.folder.name) / f"rank{rank}"

    def output(self, rank: int = 0) -> str:
        """The rank's stdout and stderr so far, in one text."""
        return self.log(rank).read_text()

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit statuses by rank; a rank that is still running then is killed and reads None."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return statuses

    def wait_until(self, condition: Callable[[], object], timeout: float = 120,
                   interval: float = 0.01) -> None:
        """Return when `condition()` is true; fail at the timeout, or if rank 0 has ended."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout} s\n{self.output()}"
            assert self.processes[0].is_alive(), f"rank 0 has ended\n{self.output()}"
            time.sleep(interval)


def rank_main(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run `amid-ds ARGV` in this process as one rank, its output in the file `log`; then exit."""
    os.setsid()
    _become(variables, log)
    from amid_ds.cli import main

    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False)
                              for descriptor in (1, 2))
    status = main(argv)
    sys.stdout.flush()
    os._exit(status)


def world_main(work: Callable[..., None], argv: list[str], variables: dict[str, str],
               log: str) -> None:
    """Call `work(world, *argv)` in this process as one rank, its output in the file `log`."""
    _become(variables, log)
    from amid_ds.distributed.rendezvous import init_distributed

    status = 1
    try:
        with init_distributed(60) as world:
            work(world, *argv)
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(status)


def _become(variables: dict[str, str], log: str) -> None:
    """Give this process a rank's environment, and its output to the file `log`."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)


def run_ranks(size: int, *arguments: object, timeout: float = 120,
              target: Callable[[list[str], dict[str, str], str], None] | None = None) -> Ranks:
    """Run `amid-ds ARGUMENTS` on `size` ranks to its end; every rank must exit with 0."""
    ranks = Ranks(size, *arguments, target=target)
    statuses = ranks.wait(timeout)
    assert statuses == [0] * size, f"statuses {statuses}\n" + "\n".join(
        ranks.output(rank) for rank in range(size))
    return ranks


class RankPool:
    """Four ranks in one gloo world that stay, with groups of the first 2, 3 and 4 of them."""

    def __init__(self) -> None:
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(4):
            ours, theirs = _forkserver.Pipe()
            process = _forkserver.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(rank, group, *arguments) on `size` ranks, results in rank order.

        If a rank raises, its traceback is raised here.
        """
        for pipe in self.pipes[:size]:
            pipe.send((size, function, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes[:size]) if rank not in answers]
            ready = wait(waiting, timeout=60)
            assert ready, f"only the ranks {list(answers)} answer"
            for pipe in ready:
                kind, value = pipe.recv()
                assert kind == "done", value
                answers[self.pipes.index(pipe)] = value
        return [answers[rank] for rank in range(size)]

    def close(self) -> None:
        """Kill the ranks."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=4,
                            timeout=timedelta(seconds=60))
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    while True:
        size, function, arguments = pipe.recv()
        try:
            pipe.send(("done", function(rank, groups[size], *arguments)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
