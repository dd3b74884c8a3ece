"""Rows that the ranks of a group send one another, as many as each has for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Route(NamedTuple):
    """sent, received: the rows for each rank of the group and from each, in their order."""

    sent: list[int]
    received: list[int]
    group: ProcessGroup

    @classmethod
    def of(cls, sent: Tensor, group: ProcessGroup) -> Route:
        """The route of `sent` [ranks], int64, rows to each rank.

        Collective: one exchange of numbers, for which the host waits.
        """
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        to_each, from_each = torch.stack([sent, received]).tolist()
        return cls(to_each, from_each, group)

    def back(self) -> Route:
        """The way of the answers."""
        return Route(self.received, self.sent, self.group)

    def carry(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """[rows sent, ...] of each tensor -> [rows received, ...], rank by rank.

        Collective: one exchange for each tensor, and in backward, back, one for each that has a
        gradient, in the same order.
        """
        carried: tuple[Tensor, ...] = _Carry.apply(self, *rows)
        return carried


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, route: Route, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.route = route
        return tuple(_exchange(route, each) for each in rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        back = ctx.route.back()
        return None, *(_exchange(back, each) if needed else None for each, needed in
                       zip(gradients, ctx.needs_input_grad[1:], strict=True))


def _exchange(route: Route, rows: Tensor) -> Tensor:
    arrived = rows.new_empty(sum(route.received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), route.received, route.sent,
                           group=route.group)
    return arrived
