"""What a collective of a ring of ranks takes in, by kind of link, and what its hops cost.

Both gloo and NCCL put ranks into rings in the order of their nodes, and a ring enters each node
once, however many of its ranks are there: all that a collective sends round crosses each node's
border once, and not once for each rank. NCCL gives rings to all ports of a node in turn, so the
share of one rank is that of one of the node's ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Seconds before a collective moves, and of one hop from rank to rank: NCCL's own model for rings
# with its protocol LL128 (src/graph/tuning.cc, 2.23), which all-gathers and reduce-scatters between
# nodes take. A ring of R ranks on N nodes has N - 1 hops between nodes in a row, R - N others.
START_SECONDS = 14e-6
HOP_INSIDE_SECONDS = 1.9e-6
HOP_BETWEEN_SECONDS = 4.0e-6


@dataclass(frozen=True)
class Traffic:
    """What one rank receives: bytes from ranks of its node, and from other nodes.

    The seconds are those in which no byte moves: the starts and hops of collectives within a node,
    and of collectives that go through several.
    """

    inside: float = 0.0
    between: float = 0.0
    inside_waits: float = 0.0
    between_waits: float = 0.0

    @property
    def received(self) -> float:
        """Bytes from anywhere."""
        return self.inside + self.between

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between,
                       self.inside_waits + other.inside_waits,
                       self.between_waits + other.between_waits)

    def scaled(self, factor: float) -> Traffic:
        """The same collectives, each of `factor` times the bytes."""
        return replace(self, inside=factor * self.inside, between=factor * self.between)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.inside * times, self.between * times, self.inside_waits * times,
                       self.between_waits * times)


@dataclass(frozen=True)
class Ring:
    """`ranks` ranks in the order of their nodes, `per_node` of them on each."""

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)

    def gather(self, size: float, calls: float) -> Traffic:
        """An all-gather of `size` bytes, or a reduce-scatter of as many, in so many calls."""
        received = size * (1 - 1 / self.ranks)
        between = received / self.per_node if self.nodes > 1 else 0.0
        waits = calls * self.wait_seconds
        return Traffic(received - between, between,
                       *((0.0, waits) if self.nodes > 1 else (waits, 0.0)))

    @property
    def wait_seconds(self) -> float:
        """Seconds of one all-gather in which no byte moves."""
        if self.ranks == 1:
            return 0.0
        return (START_SECONDS + (self.nodes - 1) * HOP_BETWEEN_SECONDS
                + (self.ranks - self.nodes) * HOP_INSIDE_SECONDS)


@dataclass(frozen=True)
class Shards:
    """The ranks over which ZeRO-3 shards a model.

    split: those of the weights of which a rank of a tensor- or expert-parallel group has a part, or
    of all without groups; whole: those of the weights that each rank of a group has whole.
    """

    split: Ring
    whole: Ring


def shards_over(groups: int, group: int, per_node: int) -> Shards:
    """The shards over `groups` neighbours, each of `group` ranks.

    per_node: ranks on a node.
    """
    groups_per_node = max(1, per_node // group)
    ranks = groups * group
    return Shards(Ring(groups, min(groups, groups_per_node)),
                  Ring(ranks, min(ranks, per_node)))
