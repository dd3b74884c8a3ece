"""Ranks from any launcher, the few collectives that training makes outside DeepSpeed, and agreement between ranks.

One class for 1 or N ranks. What goes wrong on one rank is told to all before any of them acts on it: the first exit
status that a launcher sees makes it kill the others, so ranks agree first and leave together.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from amid_ds.distributed.failures import (
    FailureMonitor,
)
from amid_ds.errors import InputError, Stopped, TrainingError, report_error

T = TypeVar("T")
HEARTBEAT_S = 20.0      # how often rank 0 is heard of while the others wait for it


@dataclass(frozen=True)
class World:
    """This process among its peers. `device` is where its model lives.

    Neighbouring ranks form a tensor-parallel group: `tp_size` of them share one copy of the models and see the same
    tokens. Data follow `dp_rank`.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    tp_size: int = 1
    tp_group: dist.ProcessGroup | None = None      # None: nobody to share with
    agreement: dist.ProcessGroup | None = None     # all ranks, apart from the group that training's collectives use
    failures: FailureMonitor | None = None               # None: nobody to tell

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        return self.size // self.tp_size

    def split(self, tp_size: int) -> World:
        """The same world in tensor-parallel groups of `tp_size`, which divides `size`. Collective."""
        group = dist.new_subgroups(group_size=tp_size)[0] if tp_size > 1 else None
        return replace(self, tp_size=tp_size, tp_group=group)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over the data-parallel ranks, in float64. One collective, of all ranks.

        Tensor-parallel peers work on the same tokens, so each of them counts as one part in `tp_size`; what any rank
        alone says (a request to stop) still shows.
        """
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return (tensor / self.tp_size).tolist()

    def sum_beside(self, values: Sequence[float], own: Sequence[float]) -> tuple[list[float], list[list[float]]]:
        """`sum` of `values`, and every rank's `own` numbers, by rank, in the same collective."""
        places = [0.0] * (len(own) * self.size)
        places[self.rank * len(own):(self.rank + 1) * len(own)] = [value * self.tp_size for value in own]
        total = self.sum([*values, *places])
        rows = total[len(values):]
        return total[:len(values)], [rows[i:i + len(own)] for i in range(0, len(rows), len(own))]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (anything that pickles), by rank. One collective of objects: for set-up, not steps."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.agreement)
        return everyone

    def barrier(self) -> None:
        self.gather(None)

    def measured_sum(self, ranks: Sequence[int], size_bytes: int) -> tuple[float, float]:
        """Σ (rank + 1) over `ranks` by way of a tensor of `size_bytes`, and the bytes per second of the all-reduce, the
        best of a few. Called by all ranks; those that are not among `ranks` get (0, 0)."""
        group = dist.new_group(list(ranks))
        if self.rank not in ranks:
            return 0.0, 0.0
        fastest = float("inf")
        for _ in range(4):      # the first one pays for the connections
            tensor = torch.full((size_bytes // 4,), self.rank + 1.0, device=self.device)
            dist.barrier(group)
            began = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            total = float(tensor[-1])      # also waits for a GPU
            fastest = min(fastest, time.perf_counter() - began)
        dist.destroy_process_group(group)
        return (total if bool((tensor == total).all()) else float("nan")), size_bytes / fastest

    def run_checked(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if it raises on any, raise on all what the lowest rank raised.

        A rank that fails between two collectives of `work` leaves the others in the second: `failures` ends those.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        own = error if error is None or isinstance(error, (InputError, TrainingError)) else _foreign(self.rank, error)
        if own is not None and self.failures is not None:
            self.failures.tell(str(own))
        everyone = self.gather(own)
        if own is not None and self.failures is not None:
            self.failures.take_back()
        for found in everyone:
            if found is not None:
                raise found from error
        return result   # type: ignore[return-value]

    def leave(self, error: InputError | TrainingError | Stopped) -> None:
        """Say, once, what all ranks have agreed on, and leave together.

        A launcher that sees one rank end with a status other than 0 kills the rest: the one that was about to say why
        must not be among them, nor may a rank that is on its way out die of SIGTERM, which would hide its status.
        """
        if self.is_main:
            report_error(error)
        if self.size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)      # Slurm may send it more than once
        with contextlib.suppress(RuntimeError):      # a rank that did not agree is ended by `failures`
            if self.failures is not None:
                self.failures.tell(str(error) or type(error).__name__)
            self.barrier()
            if self.failures is not None:
                self.failures.take_back()

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone, for as long as it takes, and return its result on every rank.

        An error is raised on every rank. `work` makes no collective. A collective waits no longer
        than its timeout, so rank 0 works in a thread and all ranks exchange a heartbeat meanwhile.
        """
        if self.size == 1:
            return self.run_checked(work)
        outcome: list[tuple[T | None, Exception | None]] = []

        def run() -> None:
            try:
                outcome.append((work(), None))
            except Exception as error:
                outcome.append((None, error))

        thread = threading.Thread(target=run, name="main rank", daemon=True)
        if self.is_main:
            thread.start()
        running = True
        while running:
            if self.is_main:
                thread.join(HEARTBEAT_S)
            running = self.gather(thread.is_alive())[0]

        def finish() -> T | None:
            result, error = outcome[0] if self.is_main else (None, None)
            if error is not None:
                raise error
            return result

        return self.gather(self.run_checked(finish))[0]   # type: ignore[return-value]


def _foreign(rank: int, error: Exception) -> TrainingError:
    traceback.print_exception(error)      # here, where it happened; the other ranks get one line
    return TrainingError(f"rank {rank} failed: {type(error).__name__}: {error}")


class _SliceReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, rows: slice, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.shape, ctx.rows, ctx.group = whole.shape, rows, group
        return whole[rows]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradient.new_zeros(ctx.shape)
        total[ctx.rows] = gradient
        dist.all_reduce(total, group=ctx.group)
        return total, None, None


def slice_replicated(whole: torch.Tensor, rows: slice, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's `rows` of a tensor that every rank of `group` holds whole, each using rows of its own.

    Its gradient comes back whole on every rank, like that of a tensor all of them use alike. One collective, backward.
    """
    return _SliceReplicated.apply(whole, rows, group)
