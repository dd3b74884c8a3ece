"""A vocabulary cut over ranks: who holds which rows, and the reductions that a loss over it needs.

Each rank of a tensor-parallel group holds the rows [start, stop) of both heads. All that the ranks exchange are row
statistics, a few numbers per token. They are gathered and reduced locally, in rank order, rather than all-reduced: the
payload is tiny, a log-sum-exp takes one collective instead of two, and every rank gets the same bits.
`group=None` is one process and makes no collective; there is no second code path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from amid_ds.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows [start, stop) of the vocabulary; `group` holds the ranks with the others (None: no others).

    Any split will do, uneven or empty shards included, as long as the group's shards cover the vocabulary from 0
    without a gap or an overlap. That is checked with one collective, at the first call with this object, on every rank.
    """

    start: int
    stop: int
    group: ProcessGroup | None = None
    _widest: list[int] = field(default_factory=list, init=False, repr=False, compare=False)   # agreed at the first call

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise InputError(f"VocabShard(start={self.start}, stop={self.stop})", "0 <= start <= stop",
                             "the rows of the head that this rank holds are [start, stop)")

    @property
    def width(self) -> int:
        return self.stop - self.start

    def agree(self, rows: dict[str, int], vocab_size: int | None, tokens: int, device: torch.device) -> tuple[int, int]:
        """Check this shard with its peers; the group's widest shard, and where the vocabulary ends.

        rows: how many rows or columns each tensor has here, by the tensor's name. At the first call everything is
        checked on all ranks together (one collective), so that all of them raise; afterwards only what is local.
        """
        if not self._widest:
            names = list(rows)
            mine = [self.start, self.stop, -1 if vocab_size is None else vocab_size, tokens, *rows.values()]
            peers = self.gather(torch.tensor(mine, device=device)).tolist()
            _check_peers(peers, names)
            self._widest.extend([max(peer[1] - peer[0] for peer in peers), max(peer[1] for peer in peers)])
        for name, found in rows.items():
            _check_rows(name, found, self.start, self.stop)
        widest, end = self._widest
        if vocab_size is not None and vocab_size > end:
            raise InputError(f"vocab_size={vocab_size}, and shards that end at row {end}",
                             "shards that cover the vocabulary", "lower vocab_size or give the ranks the missing rows")
        return widest, end

    def logsumexp(self, local: Tensor) -> Tensor:
        """Log-sum-exps as pairs [..., 2, n] (see `joined`) over the group. One collective."""
        return local if self.group is None else merge_logsumexp(self.gather(local))

    def sum(self, local: Tensor) -> Tensor:
        """Σ over the group, element by element. One collective."""
        return local if self.group is None else self.gather(local).sum(0)

    def add_up(self, partial: Tensor) -> None:
        """Σ over the group in place, for what is too large to gather. One collective."""
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
    """Log-sum-exps of parts [m, ..., 2, n] -> of their union [..., 2, n].

    Each is a pair (peak, log Σ exp(x - peak)), whose sum is the log-sum-exp: where logits are large, x - peak - rest
    keeps the digits that x - (peak + rest) has lost. An empty part has the peak -inf.
    """
    peak = parts[..., 0, :].amax(0)
    rest = (parts[..., 0, :] - peak + parts[..., 1, :]).logsumexp(0)
    return torch.stack([peak, rest], -2)


def _check_rows(name: str, found: int, start: int, stop: int) -> None:
    if found != stop - start:
        raise InputError(f"{name} with {found} rows of the vocabulary", f"the {stop - start} rows [{start}, {stop})",
                         "cut the student's and the teacher's heads at the same rows, those of the VocabShard")


def _check_peers(peers: list[list[int]], names: list[str]) -> None:
    """peers: per rank start, stop, vocab_size, tokens and the rows of each tensor in `names`."""
    for rank, (start, stop, _, _, *rows) in enumerate(peers):
        for name, found in zip(names, rows, strict=True):
            _check_rows(f"{name} (rank {rank} of the group)", found, start, stop)
    for column, what in ((2, "vocab_size"), (3, "the number of tokens")):
        values = [peer[column] for peer in peers]
        if len(set(values)) > 1:
            raise InputError(f"{what} that differs over the group's ranks: {values}", "the same on every rank",
                             "the ranks of a tensor-parallel group work on the same tokens and the same vocabulary")
    shards = sorted((peer[0], peer[1]) for peer in peers if peer[1] > peer[0])
    ends = [0, *(stop for _, stop in shards)]
    if any(start != end for (start, _), end in zip(shards, ends, strict=False)) or peers[0][2] > ends[-1]:
        raise InputError(f"shards {[(peer[0], peer[1]) for peer in peers]} and vocab_size {peers[0][2]} (-1: none)",
                         "shards that cover the vocabulary from row 0, without a gap or an overlap",
                         "give each rank of the group the rows that follow its predecessor's")
