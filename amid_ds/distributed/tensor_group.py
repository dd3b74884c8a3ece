"""Sums and exchanges of activations over a tensor-parallel group, with their gradients.

What every rank of the group holds whole has the same, whole gradient on every rank. A layer of
which each rank has a part takes such an input and gives such an output, and these four are the ways
in and out:

    enter(x)    x                         the gradients of the ranks' parts, summed
    total(y)    Σ over the ranks of y     the gradient
    joined(y)   the ranks' y, [..., n] -> [..., ranks · n]     this rank's part of the gradient
    own(x)      this rank's part of x's last dimension         the ranks' parts of it, joined
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Exchange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peers:
    """This rank's place among the `size` ranks of a tensor-parallel group.

    group None: nobody is there, as where shapes alone count. A sum then is this rank's part, and a
    join is as many copies of it. Each of the methods is one collective at most, in forward or in
    backward.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def enter(self, whole: Tensor) -> Tensor:
        """`whole`, on its way into a part; its gradient is summed over the group."""
        return _Exchange.apply(whole, _as_it_is, self.add)

    def total(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' parts."""
        return _Exchange.apply(partial, self.add, _as_it_is)

    def joined(self, part: Tensor) -> Tensor:
        """The ranks' parts of the last dimension, side by side."""
        return _Exchange.apply(part, self.join, self.part)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of the last dimension, which the number of ranks divides."""
        return _Exchange.apply(whole, self.part, self.join)

    def add(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' parts, without a gradient; `partial` is not changed."""
        total = partial.clone(memory_format=torch.contiguous_format)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total

    def parts(self, own: Tensor) -> list[Tensor]:
        """The ranks' parts, without a gradient."""
        if self.group is None:
            return [own] * self.size
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format)
                 for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return parts

    def join(self, part: Tensor) -> Tensor:
        """The ranks' parts of the last dimension, side by side, without a gradient."""
        return torch.cat(self.parts(part), -1)

    def part(self, whole: Tensor) -> Tensor:
        """A copy of this rank's part of the last dimension, without a gradient."""
        size = whole.shape[-1] // self.size
        return whole.narrow(-1, self.rank * size, size).contiguous()


class _Exchange(torch.autograd.Function):
    """`there` of a tensor, and `back` of its gradient."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        return there(given)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)
