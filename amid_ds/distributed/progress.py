"""How far ranks have come in their collectives: which one the others wait for.

On a GPU a collective is launched and not waited for, so a rank whose peers do not come hangs later,
wherever its host next needs a number. The counts of launched collectives still tell: the rank that
is waited for has launched fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed import distributed_c10d

from amid_ds.distributed.world import World


def launched_collectives(world: World) -> dict[str, int]:
    """The collectives that this rank has launched, by the name of the group. Waits for nothing.

    A group has the same name on all of its ranks. Of a group of two backends: NCCL's. Of the group
    of agreements: those begun, for the messages of one are not as many on every rank.
    """
    groups: list[Any] = [group for group in distributed_c10d._world.pg_map
                         if group is not world.agreement]
    return {"agreements": world.agreements.total(), **{
        group.group_name: group._get_sequence_number_for_group() for group in groups}}


def rank_behind(launched: Mapping[int, Mapping[str, int]]) -> int | None:
    """The lowest rank that others wait for and that itself waits for none; None if none is.

    launched: by rank, what `launched_collectives` gave there. A rank waits for those that have
    launched fewer collectives in a group that both are in.
    """
    awaited = {rank: {other for other, theirs in launched.items()
                      if any(count > theirs.get(group, count) for group, count in own.items())}
               for rank, own in launched.items()}
    behind = set().union(*awaited.values())
    return min((rank for rank in behind if not awaited[rank]), default=None)
