"""The process among its peers: collectives outside DeepSpeed, errors that all ranks agree on.

One class for 1 or N ranks. An error of one rank reaches all ranks before any of them acts on it:
the first exit status that a launcher sees makes it kill the others, so ranks leave together.
"""

from __future__ import annotations

import contextlib
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from amid_ds.distributed.background import BackgroundWork
from amid_ds.distributed.failures import FailureMonitor, broke_in_collective, waited_in_vain
from amid_ds.distributed.nodes import ExpertGroups, ShardGroups, neighbour_group, shard_groups
from amid_ds.distributed.transfer import to_device
from amid_ds.errors import (
    InputError,
    RankError,
    Stopped,
    TrainingError,
    expected_error,
    report_error,
)

_T = TypeVar("_T")
_Number = TypeVar("_Number", int, float)
# The first all-reduce of a measurement pays for the connections.
MEASURED_ROUNDS = 4
# A packed number has as many bits for its rank.
MAX_RANKS = 1 << 20
MAX_INT32 = (1 << 31) - 1


class Peak(NamedTuple):
    """The largest of the ranks' values, and the rank that has it."""

    value: float
    rank: int


@dataclass(frozen=True)
class World:
    """This process among its peers. `device` holds its model.

    Neighbouring ranks form a tensor-parallel group: `tp_size` of them share one copy of the models
    and see the same tokens. Data follow `dp_rank`.

    tp_group: None with tp_size 1. shards: the groups over which the teacher lies; None: all ranks,
    or none. experts: see ExpertGroups; None: none. agreement: all ranks, in a group that training's
    collectives do not use; None: the default group. failures: None in a world of one. hosts: by
    rank, on rank 0 all of them, elsewhere its own and rank 0's. on_host: the ranks of this rank's
    host, of which one `is_first_on_host`. agreements: those that this rank has begun, by kind.
    """

    rank: int
    size: int
    device: torch.device
    tp_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    shards: ShardGroups | None = None
    experts: ExpertGroups | None = None
    agreement: dist.ProcessGroup | None = None
    failures: FailureMonitor | None = None
    hosts: Mapping[int, str] = field(default_factory=dict)
    on_host: int = 1
    is_first_on_host: bool = True
    agreements: Counter[str] = field(default_factory=Counter)

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

    def name_of(self, rank: int) -> str:
        """The rank and, where this rank knows it, its host: `rank 3 on n1`."""
        return f"rank {rank}" + (f" on {self.hosts[rank]}" if rank in self.hosts else "")

    def numbers(self, values: Sequence[float]) -> torch.Tensor:
        """`values` on this rank's device, in float64; the host waits for nothing."""
        return to_device(torch.tensor(values, dtype=torch.float64), self.device)

    def sum(self, values: Sequence[float] | torch.Tensor) -> list[float]:
        """`summed` as numbers; the host waits for the device once."""
        return self.summed(values).tolist()

    def summed(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Elementwise float64 sum over the data-parallel ranks, of a tensor [n] on the device too.

        One collective, of all ranks. Tensor-parallel peers, with the same tokens, are 1 / tp_size.
        """
        own = values if isinstance(values, torch.Tensor) else self.numbers(values)
        dist.all_reduce(total := own.to(torch.float64, copy=True))
        return total / self.tp_size

    def sum_with_peaks(self, values: torch.Tensor, candidates: torch.Tensor
                       ) -> tuple[list[float], list[Peak]]:
        """(`sum` of `values` [n], the largest of all ranks' `candidates` [m], each with its rank).

        Two collectives, of as many bytes on any number of ranks; the host waits for the device
        once. A peak is in fp32; of ranks that have the same one it is the lowest's, NaN is the
        largest.
        """
        total = values.to(torch.float64, copy=True)
        peaks = _packed(candidates, self.rank)
        dist.all_reduce(total)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        numbers = torch.cat([total / self.tp_size, peaks]).tolist()
        return numbers[:len(values)], [_unpacked(number) for number in numbers[len(values):]]

    def least(self, number: _Number) -> _Number:
        """The least of the ranks' numbers. 8 bytes up the `tree`, 8 bytes down."""
        return self._extreme(number, torch.minimum)

    def most(self, number: _Number) -> _Number:
        """The greatest of the ranks' numbers. 8 bytes up the `tree`, 8 bytes down."""
        return self._extreme(number, torch.maximum)

    def any(self, flag: bool) -> bool:
        """True on every rank where `flag` is on one. 8 bytes up the `tree`, 8 bytes down."""
        return self.most(int(flag)) > 0

    def barrier(self) -> None:
        """Wait until every rank has come here. 8 bytes up the `tree`, 8 bytes down."""
        self.least(0)

    @property
    def tree(self) -> tuple[int | None, list[int]]:
        """(the rank above this one, None above rank 0; the ranks below it) for what goes to rank 0.

        A rank's parent is its number without the highest bit, so there are ⌈log2 ranks⌉ levels.
        gloo's broadcast from rank 0 goes down by the same connections; its reductions would pass
        through all ranks, one after another.
        """
        bits = self.rank.bit_length()
        parent = self.rank - (1 << (bits - 1)) if self.rank else None
        below = [self.rank + (1 << bit) for bit in range(bits, self.size.bit_length())]
        return parent, [rank for rank in below if rank < self.size]

    def _extreme(self, number: _Number,
                 choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> _Number:
        self.agreements["extreme"] += 1
        own = torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)
        parent, children = self.tree
        for child in children:
            other = torch.empty_like(own)
            dist.recv(other, child, self.agreement)
            own = choose(own, other)
        if parent is not None:
            dist.send(own, parent, self.agreement)
        if self.size > 1:
            dist.broadcast(own, 0, self.agreement)
        return type(number)(own.item())

    def broadcast(self, value: _T, source: int = 0) -> _T:
        """Rank `source`'s `value` (anything that pickles) on every rank. Two collectives."""
        if self.size == 1:
            return value
        self.agreements["broadcast"] += 1
        values: list[Any] = [value if self.rank == source else None]
        dist.broadcast_object_list(values, source, self.agreement)
        return values[0]

    def first(self, value: _T | None) -> _T | None:
        """The value of the lowest rank that has one, on every rank; None where none has.

        `least`, and where there is one `broadcast`.
        """
        source = self.least(self.size if value is None else self.rank)
        return None if source == self.size else self.broadcast(value, source)

    def collect(self, value: _T) -> list[_T] | None:
        """Every rank's `value` (anything that pickles), by rank, on rank 0; None on the others.

        Up the `tree`: half of all ranks send their own alone, and rank 0 receives all values in
        ⌈log2 ranks⌉ messages.
        """
        self.agreements["collect"] += 1
        values = {self.rank: value}
        parent, children = self.tree
        for child in children:
            received: list[Any] = [None]
            dist.recv_object_list(received, child, self.agreement)
            values |= received[0]
        if parent is None:
            return [values[rank] for rank in range(self.size)]
        dist.send_object_list([values], parent, self.agreement)
        return None

    def gather(self, value: _T) -> list[_T]:
        """Every rank's `value` (anything that pickles), by rank, on every rank.

        Its bytes grow with the ranks: not for a step, nor for every start. `collect`, `broadcast`.
        """
        return self.broadcast(self.collect(value) or [])

    def gather_in_group(self, value: _T) -> list[_T]:
        """`value` (anything that pickles) of every rank of the tensor-parallel group, by tp_rank.

        One collective of objects.
        """
        if self.tp_group is None:
            return [value]
        values: list[Any] = [None] * self.tp_size
        dist.all_gather_object(values, value, self.tp_group)
        return values

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

        `first` of the error, after `work`. An error that ranks have agreed on in `work` is raised
        as it is: a rank that has failed before may have agreed on it here with others that were
        there. One that fails between two other collectives of `work` leaves the others in the
        second: `failures` ends those.
        """
        result, error = None, None
        own: InputError | TrainingError | None = None
        try:
            result = work()
        except Exception as caught:
            if getattr(caught, "agreed", False) or isinstance(caught, RankError):
                raise
            if (explained := self.explained(caught)) is not caught:
                raise explained from None
            error, own = caught, self._shareable(caught)
        if own is not None and self.failures is not None:
            self.failures.report(str(own))
        try:
            first = self.first(own)
        # A peer is gone, and this rank's error with nobody to agree on it.
        except RuntimeError as broken:
            if own is None:
                raise self.explained(broken) from broken
            raise RankError(str(own)) from error
        if own is not None and self.failures is not None:
            self.failures.withdraw()
        if first is not None:
            raise _agreed(first) from (first.__cause__ if first is error else error)
        return result   # type: ignore[return-value]

    def explained(self, error: Exception) -> Exception:
        """The error, or where a collective broke because a peer has failed one that says so."""
        if self.failures is None or not broke_in_collective(error):
            return error
        failure = self.failures.of_a_peer()
        return error if failure is None else RankError(waited_in_vain(self.rank, failure))

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

        One `barrier`. A launcher that sees one rank end with a status other than 0 kills the rest:
        rank 0 must have reported by then, and a rank on its way out must not die of SIGTERM, which
        would hide its status. A rank that is alone leaves the report to its caller.
        """
        if self.size > 1:
            if self.is_main:
                report_error(error)
            # Slurm sends USR1, a terminal that closes HUP. ValueError: not in the main thread.
            with contextlib.suppress(ValueError):
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
        # RuntimeError: a peer is gone. A rank that did not agree is ended by `failures`.
        with contextlib.suppress(RuntimeError):
            if self.failures is not None:
                self.failures.report(str(error) or type(error).__name__)
            self.barrier()
            # Rank 0 alone: it holds the store, and may be gone before another has asked for it.
            if self.failures is not None and self.is_main:
                self.failures.withdraw()

    def run_on_main(self, work: Callable[[], _T]) -> _T:
        """Run `work` on rank 0 alone, for as long as it takes, and return its result on every rank.

        An error is raised on every rank. `work` makes no collective. A collective waits no longer
        than its timeout, so rank 0 works in a thread and says each HEARTBEAT_S whether it still
        does: a `broadcast` each time, and one of the outcome.
        """
        if self.size == 1:
            return self.run_checked(work)
        own = BackgroundWork(0, work) if self.is_main else None
        while self.broadcast(own is not None and own.goes_on()):
            pass
        result, error = self.broadcast(self._outcome(own))
        if error is not None:
            raise _agreed(error)
        return result

    def run_on_hosts(self, work: Callable[[], _T]) -> _T | None:
        """Run `work` on the first rank of each host, for as long as it takes, and return its result
        there, None elsewhere.

        As `run_on_main`, with an `any` each time, and a `run_checked` of the outcome.
        """
        own = BackgroundWork(self.rank, work) if self.is_first_on_host else None
        while self.any(own is not None and own.goes_on()):
            pass
        return self.run_checked(lambda: None if own is None else own.result())

    def _outcome(self, work: BackgroundWork[Any] | None
                 ) -> tuple[Any, InputError | TrainingError | None]:
        """(result, error) of ended work; of none, nothing."""
        try:
            return (None if work is None else work.result()), None
        except Exception as error:
            return None, self._shareable(error)


def _agreed(error: Any) -> Exception:
    """An error that every rank has: nobody has to be told again."""
    error.agreed = True
    return error


def _packed(values: torch.Tensor, rank: int) -> torch.Tensor:
    """[n] -> [n] float64 whose order is that of `values` in fp32, then of falling ranks.

    The bits of an fp32 number, which are in its order as an integer, and the rank together fill 52
    of the 53 that float64 has. Nothing waits for the device.
    """
    bits = values.float().view(torch.int32).long()
    size = bits & MAX_INT32
    # The sign of NaN says nothing.
    ordered = torch.where((bits >= 0) | values.isnan(), size, -size)
    return (ordered * MAX_RANKS + (MAX_RANKS - 1 - rank)).double()


def _unpacked(number: float) -> Peak:
    ordered, place = divmod(int(number), MAX_RANKS)
    size, = struct.unpack("f", struct.pack("i", abs(ordered)))
    return Peak(size if ordered >= 0 else -size, MAX_RANKS - 1 - place)
