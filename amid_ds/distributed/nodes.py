"""The nodes that ranks run on, and groups of neighbouring ranks.

Inside a node ranks exchange weights over NVLink, between nodes at a tenth of its speed. A frozen
model may therefore lie over a node's ranks alone, once on each node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from amid_ds.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from amid_ds.distributed.world import World

OVER_NEIGHBOURS = ("start as many ranks on every node, neighbours on it (srun --distribution=block,"
                   " mpirun --map-by slot); or set teacher.shard_over to a number of ranks, or "
                   "teacher.placement to zero3")


@dataclass(frozen=True)
class Nodes:
    """node_of: the node of each rank; nodes are numbered by their lowest ranks."""

    node_of: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of nodes."""
        return max(self.node_of) + 1

    def hold_groups_of(self, size: int) -> bool:
        """True where each `size` neighbouring ranks share a node."""
        groups = (self.node_of[first:first + size] for first in range(0, len(self.node_of), size))
        return all(len(set(group)) == 1 for group in groups)

    def copies_per_node(self, tp_size: int) -> int:
        """The data-parallel ranks of a node: its ranks, `tp_size` of which share a copy.

        Raises InputError unless every node has as many ranks, neighbours, in whole copies.
        """
        ranks = Counter(self.node_of)
        least, most = min(ranks.values()), max(ranks.values())
        if least < most:
            raise _irregular(f"nodes of {least} to {most} ranks", "as many ranks on every node")
        if list(self.node_of) != sorted(self.node_of):
            stranger = next(rank for rank, node in enumerate(self.node_of) if node != rank // most)
            raise _irregular(f"rank {stranger} runs on another node than its neighbours of "
                             f"{most}", "the ranks of a node are neighbours")
        if most % tp_size:
            raise _irregular(f"tensor_parallel {tp_size} on nodes of {most} rank(s)",
                             "whole copies of the models on every node")
        return most // tp_size


def _irregular(found: str, expected: str) -> InputError:
    return InputError(f"{found}, and a teacher that lies over the ranks of a node", expected,
                      OVER_NEIGHBOURS)


@dataclass(frozen=True)
class ShardGroups:
    """This rank's part of groups of neighbours, over each of which the weights of a model lie.

    split: for weights that tensor parallelism splits, the ranks with the same part of them; whole:
    for the others, all ranks of the group.
    """

    whole: ProcessGroup
    split: ProcessGroup


def find_nodes(world: World) -> Nodes:
    """The nodes of all ranks, told by their host names. On rank 0 alone, which knows them."""
    numbers: dict[str, int] = {}
    hosts = (world.hosts.get(rank, "") for rank in range(world.size))
    return Nodes(tuple(numbers.setdefault(host, len(numbers)) for host in hosts))


def ranks_of_copy(shard_over: int | None, tp_size: int, world: World) -> int:
    """The neighbouring data-parallel ranks over which `placement: node` lays a copy. On rank 0.

    shard_over: the recipe's own number of them; None: a node's. Raises InputError where the ranks
    or their nodes do not allow it.
    """
    ranks = shard_over or find_nodes(world).copies_per_node(tp_size)
    require_divisor(ranks, world.size // tp_size)
    return ranks


def require_divisor(shard_over: int, data_parallel: int) -> None:
    """Raise InputError unless `shard_over` divides the number of data-parallel ranks."""
    if data_parallel % shard_over:
        fitting = ", ".join(str(n) for n in range(1, data_parallel + 1) if data_parallel % n == 0)
        raise InputError(f"teacher.shard_over {shard_over} on {data_parallel} data-parallel "
                         "rank(s)", "a divisor of their number",
                         f"set it to one of {fitting}, or leave it out for the ranks of a node")


def shard_groups(rank: int, tp_size: int, copies: int) -> ShardGroups:
    """The groups of `copies` neighbouring data-parallel ranks, which divide their number.

    Collective: at most two groups are made, however many ranks there are.
    """
    block = copies * tp_size
    first = rank // block * block
    whole = neighbour_group(range(first, first + block))
    if tp_size == 1:
        return ShardGroups(whole, whole)
    return ShardGroups(whole, neighbour_group(range(first + rank % tp_size, first + block,
                                                    tp_size)))


@dataclass(frozen=True)
class ExpertGroups:
    """This rank's part of the groups that hold the experts of each layer together.

    exchange: neighbours, each with its part of the experts, between which tokens travel. alike: all
    ranks with this rank's part; teachers: those of them over which the teacher lies.
    """

    exchange: ProcessGroup
    alike: ProcessGroup
    teachers: ProcessGroup


def expert_groups(rank: int, size: int, neighbours: int, shard_over: int | None) -> ExpertGroups:
    """The groups by which every `neighbours` of `size` ranks, a divisor, hold experts together.

    shard_over: the neighbouring ranks over which a teacher lies; None: all. Raises InputError where
    they are no whole groups. Collective: at most three groups are made.
    """
    block = shard_over or size
    require_whole_groups(neighbours, block)
    first = rank // neighbours * neighbours
    exchange = neighbour_group(range(first, first + neighbours))
    alike = neighbour_group(range(rank % neighbours, size, neighbours))
    if block == size:
        return ExpertGroups(exchange, alike, alike)
    first = rank // block * block
    return ExpertGroups(exchange, alike, neighbour_group(
        range(first + rank % neighbours, first + block, neighbours)))


def require_whole_groups(neighbours: int, block: int) -> None:
    """Raise InputError unless a copy of the teacher over `block` ranks has whole groups of
    `neighbours` that hold experts together."""
    if block % neighbours:
        raise InputError(
            f"expert_parallel {neighbours}, and a teacher that lies over {block} rank(s)",
            "whole groups of neighbours in each copy of the teacher",
            f"set expert_parallel to a divisor of {block}; or teacher.shard_over to a multiple of "
            f"{neighbours}; or teacher.placement to zero3")


def neighbour_group(ranks: Iterable[int]) -> ProcessGroup:
    """The group of `ranks`, of which this rank is one, while all other ranks make theirs.

    Collective, one act of all ranks: every rank is in one of the groups, and names its own alone.
    On a GPU NCCL splits them off the default group at once, each by its own colour; groups made one
    after the other would be a split of all ranks each.
    """
    return dist.new_group(list(ranks), use_local_synchronization=True)
