"""Ranks without processes: what each tells of a step is reduced here, and rank 0 judges it."""

from __future__ import annotations

from collections.abc import Sequence

from amid_ds.distributed.world import Peak
from amid_ds.monitor.anomalies import AnomalyMonitor
from amid_ds.monitor.rank_stats import PeerStats, RecentWork


class WatchedRanks:
    """The anomaly monitor of rank 0 of `size` ranks, whose names are `rank 0` and so on."""

    def __init__(self, size: int, tp_size: int = 1) -> None:
        self.tp_size = tp_size
        self.work = [RecentWork(rank) for rank in range(size)]
        self.monitor = AnomalyMonitor(lambda rank: f"rank {rank}", size, tp_size)

    def step(self, step: int, ranks: Sequence[tuple[float, float]], step_s: float = 1.0,
             sampled: bool = False) -> PeerStats:
        """Judge a step of which each rank has (its part of the loss, its seconds of own work)."""
        stats = []
        for work, (_, own_s) in zip(self.work, ranks, strict=True):
            work.add(own_s, step_s)
            stats.append(work.local(peak_bytes=own_s))
        sums = [sum(column) / self.tp_size
                for column in zip(*(each.summands for each in stats), strict=True)]
        candidates = [(part, *each.candidates) for (part, _), each in zip(ranks, stats,
                                                                          strict=True)]
        peaks = [Peak(max(column), column.index(max(column)))
                 for column in zip(*candidates, strict=True)]
        loss = sum(part for part, _ in ranks) / self.tp_size
        peers = [work.combine(loss, sums, peaks) for work in self.work]
        assert peers.count(peers[0]) == len(peers)
        self.monitor.step(step, peers[0], sampled)
        return peers[0]
