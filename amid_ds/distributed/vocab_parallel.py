"""A vocabulary split over ranks: each rank's rows, and the reductions of a loss over all of them.

Each rank of a tensor-parallel group holds the rows [start, stop) of both heads. The ranks exchange
row statistics alone, a few numbers per token. They are gathered and reduced locally, in rank order,
rather than all-reduced: the payload is tiny, a log-sum-exp takes one collective instead of two, and
every rank gets the same bits. `group=None` is one process and makes no collective; there is no
second code path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from amid_ds.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows [start, stop) of the vocabulary; the ranks of `group` hold the others.

    group None: this rank holds all rows. Shards may be uneven or empty, as long as the group's
    cover the vocabulary from 0 without a gap or an overlap. That is checked on every rank, with one
    collective, at the first call with this object.
    """

    start: int
    stop: int
    group: ProcessGroup | None = None
    # [width of the widest shard, end of the last one] over the group; empty before the first call.
    _extent: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    # What `least` has found, by subject.
    _least: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False,
                                         compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise InputError(f"VocabShard(start={self.start}, stop={self.stop})",
                             "0 <= start <= stop",
                             "the rows of the head that this rank holds are [start, stop)")

    @property
    def width(self) -> int:
        """The number of this rank's rows."""
        return self.stop - self.start

    def agree(self, rows: dict[str, int], vocab_size: int | None, tokens: int,
              device: torch.device) -> tuple[int, int]:
        """Check this shard with its peers; (width of the group's widest shard, vocabulary's end).

        rows: this rank's number of rows or columns of each tensor, by the tensor's name. The first
        call checks all ranks together (one collective), so that all of them raise InputError; later
        calls check local values alone.
        """
        if not self._extent:
            own = [self.start, self.stop, -1 if vocab_size is None else vocab_size, tokens,
                   *rows.values()]
            peers = self.gather(torch.tensor(own, device=device)).tolist()
            _check_peers(peers, list(rows))
            self._extent.append(max(stop - start for start, stop, *_ in peers))
            self._extent.append(max(stop for _, stop, *_ in peers))
        for name, count in rows.items():
            _check_rows(name, count, self.start, self.stop)
        widest, end = self._extent
        if vocab_size is not None and vocab_size > end:
            raise InputError(f"vocab_size={vocab_size}, and shards that end at row {end}",
                             "shards that cover the vocabulary",
                             "lower vocab_size or give the ranks the missing rows")
        return widest, end

    def least(self, subject: str, values: list[int], device: torch.device) -> list[int]:
        """The least of the ranks' `values`, number by number, as the first call has found them.

        For what follows from a rank's device and has to be equal over the group, such as the
        number of blocks. One collective at the first call with this object about `subject`.
        """
        if self.group is None:
            return values
        if subject not in self._least:
            self._least[subject] = self.gather(torch.tensor(values, device=device)).amin(0).tolist()
        return self._least[subject]

    def logsumexp(self, local: Tensor) -> Tensor:
        """Log-sum-exps over the group, pairs [..., 2, n] (see merge_logsumexp). One collective."""
        return local if self.group is None else merge_logsumexp(self.gather(local))

    def sum(self, local: Tensor) -> Tensor:
        """Σ over the group, element by element. One collective."""
        return local if self.group is None else self.gather(local).sum(0)

    def add_up(self, partial: Tensor) -> None:
        """Σ over the group, in place, of a tensor that is too large to gather. One collective."""
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)

    def gather(self, local: Tensor) -> Tensor:
        """local [...] -> [ranks, ...], the same on every rank. One collective."""
        if self.group is None:
            return local[None]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.stack(parts)


def merge_logsumexp(parts: Tensor) -> Tensor:
    """Log-sum-exps of m parts [m, ..., 2, n] -> of their union [..., 2, n].

    Each is a pair (peak, rest = log Σ exp(x - peak)), whose sum is the log-sum-exp: with large
    logits x, x - peak - rest keeps digits that x - (peak + rest) loses. An empty part's peak is
    -inf.
    """
    peak = parts[..., 0, :].amax(0)
    rest = (parts[..., 0, :] - peak + parts[..., 1, :]).logsumexp(0)
    return torch.stack([peak, rest], -2)


def _check_rows(name: str, count: int, start: int, stop: int) -> None:
    if count != stop - start:
        raise InputError(f"{name} with {count} rows of the vocabulary",
                         f"the {stop - start} rows [{start}, {stop})",
                         "cut the student's and the teacher's heads at the same rows, those of the "
                         "VocabShard")


def _check_peers(peers: list[list[int]], names: list[str]) -> None:
    """Raise InputError unless the group's shards and inputs fit together.

    peers: per rank start, stop, vocab_size (-1: none), tokens and the rows of each tensor in
    `names`.
    """
    for rank, (start, stop, _, _, *rows) in enumerate(peers):
        for name, count in zip(names, rows, strict=True):
            _check_rows(f"{name} (rank {rank} of the group)", count, start, stop)
    for column, quantity in ((2, "vocab_size"), (3, "the number of tokens")):
        values = [peer[column] for peer in peers]
        if len(set(values)) > 1:
            raise InputError(f"{quantity} that differs over the group's ranks: {values}",
                             "the same on every rank",
                             "the ranks of a tensor-parallel group work on the same tokens and the "
                             "same vocabulary")
    vocab_size = peers[0][2]
    shards = [(start, stop) for start, stop, *_ in peers]
    filled = sorted((start, stop) for start, stop in shards if stop > start)
    ends = [0, *(stop for _, stop in filled)]
    contiguous = all(start == end for (start, _), end in zip(filled, ends, strict=False))
    if not contiguous or vocab_size > ends[-1]:
        raise InputError(f"shards {shards} and vocab_size {vocab_size} (-1: none)",
                         "shards that cover the vocabulary from row 0, without a gap or an overlap",
                         "give each rank of the group the rows that follow its predecessor's")


class _SliceReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, rows: slice, group: dist.ProcessGroup | None
                ) -> Tensor:
        ctx.shape, ctx.rows, ctx.group = whole.shape, rows, group
        return whole[rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.new_zeros(ctx.shape)
        total[ctx.rows] = gradient
        dist.all_reduce(total, group=ctx.group)
        return total, None, None


def slice_replicated(whole: Tensor, rows: slice, group: dist.ProcessGroup | None
                     ) -> Tensor:
    """This rank's `rows` of a tensor that every rank of `group` holds whole.

    The gradient of `whole` is complete on every rank of the group. One collective, in backward.
    """
    return _SliceReplicated.apply(whole, rows, group)
