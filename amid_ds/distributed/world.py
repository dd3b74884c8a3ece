"""The process among its peers: collectives outside DeepSpeed, errors that all ranks agree on.

One class for 1 or N ranks. An error of one rank reaches all ranks before any of them acts on it:
the first exit status that a launcher sees makes it kill the others, so ranks leave together.
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

from amid_ds.distributed.failures import FailureMonitor
from amid_ds.distributed.nodes import ShardGroups, neighbour_group, shard_groups
from amid_ds.distributed.transfer import to_device
from amid_ds.errors import (
    InputError,
    Stopped,
    TrainingError,
    expected_error,
    report_error,
)

_T = TypeVar("_T")
# Seconds between the signs of life of rank 0 while the others wait for it.
HEARTBEAT_S = 20.0
# The first all-reduce of a measurement pays for the connections.
MEASURED_ROUNDS = 4


@dataclass(frozen=True)
class World:
    """This process among its peers. `device` holds its model.

    Neighbouring ranks form a tensor-parallel group: `tp_size` of them share one copy of the models
    and see the same tokens. Data follow `dp_rank`.

    tp_group: None with tp_size 1. shards: the groups over which the teacher lies; None: over all
    ranks, or over none. agreement: all ranks, in a group that training's collectives do
    not use; None: the default group. failures: None in a world of one.
    """

    rank: int
    size: int
    device: torch.device
    tp_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    shards: ShardGroups | None = None
    agreement: dist.ProcessGroup | None = None
    failures: FailureMonitor | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and messages."""
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        """The position in the tensor-parallel group."""
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        """The number of this rank's copy of the models, and so of its share of the data."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        """The number of copies of the models."""
        return self.size // self.tp_size

    def split(self, tp_size: int, shard_over: int | None = None) -> World:
        """This world in tensor-parallel groups of `tp_size`, which divides `size`. Collective.

        shard_over: the neighbouring data-parallel ranks over which a teacher lies, a divisor of
        their number; None: it has no groups of its own.
        """
        first = self.rank // tp_size * tp_size
        group = neighbour_group(range(first, first + tp_size)) if tp_size > 1 else None
        shards = None if shard_over is None else shard_groups(self.rank, tp_size, shard_over)
        return replace(self, tp_size=tp_size, tp_group=group, shards=shards)

    def numbers(self, values: Sequence[float]) -> torch.Tensor:
        """`values` on this rank's device, in float64; the host waits for nothing."""
        return to_device(torch.tensor(values, dtype=torch.float64), self.device)

    def sum(self, values: Sequence[float] | torch.Tensor) -> list[float]:
        """Elementwise sum over the data-parallel ranks, in float64. One collective, of all ranks.

        values: numbers, or a tensor [n] on this rank's device. The host waits for the device once,
        for the sums. Tensor-parallel peers work on the same tokens, so each counts as 1 / tp_size;
        a value that one rank alone has (a request to stop) still shows.
        """
        # A copy: the sum is made in place.
        total = (values.to(torch.float64, copy=True) if isinstance(values, torch.Tensor)
                 else self.numbers(values))
        dist.all_reduce(total)
        return (total / self.tp_size).tolist()

    def sum_beside(self, values: torch.Tensor, own: torch.Tensor
                   ) -> tuple[list[float], list[list[float]]]:
        """(`sum` of `values` [n], every rank's `own` [m] by rank), in one collective."""
        width = len(own)
        # One row per rank, zeros but in this rank's: their sum is all rows.
        by_rank = own.new_zeros(self.size, width, dtype=torch.float64)
        by_rank[self.rank] = own * self.tp_size
        total = self.sum(torch.cat([values.double(), by_rank.flatten()]))
        rows = total[len(values):]
        return total[:len(values)], [rows[start:start + width]
                                     for start in range(0, len(rows), width)]

    def gather(self, value: _T) -> list[_T]:
        """Every rank's `value` (anything that pickles), by rank. One collective of objects.

        Made for set-up: too slow for every step.
        """
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.agreement)
        return everyone

    def barrier(self) -> None:
        """Wait until every rank has come here. One collective of objects."""
        self.gather(None)

    def measured_sum(self, ranks: Sequence[int], size_bytes: int) -> tuple[float, float]:
        """(Σ (rank + 1) over `ranks`, bytes per second) of all-reducing a tensor of `size_bytes`.

        The fastest of a few rounds; the sum is NaN if the tensor's elements differ. Called by all
        ranks; those that are not among `ranks` get (0, 0).
        """
        group = dist.new_group(list(ranks))
        if self.rank not in ranks:
            return 0.0, 0.0
        fastest = float("inf")
        for _ in range(MEASURED_ROUNDS):
            tensor = torch.full((size_bytes // 4,), self.rank + 1.0, device=self.device)
            dist.barrier(group)
            began = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            # Reading the value also waits for a GPU.
            total = float(tensor[-1])
            fastest = min(fastest, time.perf_counter() - began)
        dist.destroy_process_group(group)
        return (total if bool((tensor == total).all()) else float("nan")), size_bytes / fastest

    def run_checked(self, work: Callable[[], _T]) -> _T:
        """Run `work` on every rank; if it raises on any, raise the lowest rank's error on all.

        One collective of objects, after `work`. A rank that fails between two collectives of `work`
        leaves the others in the second: `failures` ends those.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        own = None if error is None else self._shareable(error)
        if own is not None and self.failures is not None:
            self.failures.report(str(own))
        errors = self.gather(own)
        if own is not None and self.failures is not None:
            self.failures.withdraw()
        for first in errors:
            if first is not None:
                raise first from error
        return result   # type: ignore[return-value]

    def _shareable(self, error: Exception) -> InputError | TrainingError:
        """The error to raise on all ranks; one that nobody expects leaves its traceback on this
        one. Another's than ours names its rank: a disk or a folder may be one node's."""
        expected = expected_error(error)
        if expected is None:
            traceback.print_exception(error)
            return TrainingError(f"rank {self.rank} failed: {type(error).__name__}: {error}")
        if expected is error or self.size == 1:
            return expected
        if isinstance(expected, InputError):
            return InputError(f"rank {self.rank}: {expected.found}", expected.expected,
                              expected.remedy)
        return TrainingError(f"rank {self.rank}: {expected}")

    def leave(self, error: InputError | TrainingError | Stopped) -> None:
        """Report, on rank 0, the error that all ranks have agreed on, and leave together.

        A launcher that sees one rank end with a status other than 0 kills the rest: rank 0 must
        have reported by then, and a rank on its way out must not die of SIGTERM, which would hide
        its status. One collective of objects.
        """
        if self.is_main:
            report_error(error)
        if self.size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            # Slurm may send it more than once; a terminal that closes sends its own.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # RuntimeError: a peer is gone. A rank that did not agree is ended by `failures`.
        with contextlib.suppress(RuntimeError):
            if self.failures is not None:
                self.failures.report(str(error) or type(error).__name__)
            self.barrier()
            if self.failures is not None:
                self.failures.withdraw()

    def run_on_main(self, work: Callable[[], _T]) -> _T:
        """Run `work` on rank 0 alone, for as long as it takes, and return its result on every rank.

        An error is raised on every rank. `work` makes no collective. A collective waits no longer
        than its timeout, so rank 0 works in a thread and all ranks exchange a heartbeat meanwhile:
        one collective of objects per HEARTBEAT_S, and two at the end.
        """
        if self.size == 1:
            return self.run_checked(work)
        outcome: list[tuple[_T | None, Exception | None]] = []

        def run() -> None:
            try:
                outcome.append((work(), None))
            except Exception as error:
                outcome.append((None, error))
            except BaseException as error:
                # A SystemExit would end this thread in silence.
                outcome.append((None, RuntimeError(f"{type(error).__name__}: {error}")))

        thread = threading.Thread(target=run, name="main rank", daemon=True)
        if self.is_main:
            thread.start()
        running = True
        while running:
            if self.is_main:
                thread.join(HEARTBEAT_S)
            running = self.gather(thread.is_alive())[0]

        def finish() -> _T | None:
            result, error = outcome[0] if self.is_main else (None, None)
            if error is not None:
                raise error
            return result

        return self.gather(self.run_checked(finish))[0]   # type: ignore[return-value]


class _SliceReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, rows: slice, group: dist.ProcessGroup | None
                ) -> torch.Tensor:
        ctx.shape, ctx.rows, ctx.group = whole.shape, rows, group
        return whole[rows]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradient.new_zeros(ctx.shape)
        total[ctx.rows] = gradient
        dist.all_reduce(total, group=ctx.group)
        return total, None, None


def slice_replicated(whole: torch.Tensor, rows: slice, group: dist.ProcessGroup | None
                     ) -> torch.Tensor:
    """This rank's `rows` of a tensor that every rank of `group` holds whole.

    The gradient of `whole` is complete on every rank of the group. One collective, in backward.
    """
    return _SliceReplicated.apply(whole, rows, group)
