"""What the ranks of a step tell each other of themselves: as many bytes on any number of ranks.

Own work (data and loss) shows which rank the others wait for. No rank needs every other one's
seconds: the slowest, the median and the mean step say which ranks are slow. A median is no sum, so
the ranks add up a histogram of their logarithms, which has it to within 5 %.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from amid_ds.distributed.world import Peak

# Steps of the recent past.
RECENT_STEPS = 20
# A slow rank takes this many times the median rank's own time, and this share of a step more.
SLOW_FACTOR = 1.5
SLOW_SHARE = 0.05
# The histogram's bins: from SHORTEST_S on, each RATIO times as long as the one before, to 90,000 s.
SHORTEST_S = 1e-4
RATIO = 1.1
BINS = 217


class LocalStats(NamedTuple):
    """This rank's part: numbers to be summed over the ranks, and such of which the largest counts.
    """

    summands: list[float]
    candidates: list[float]


class PeerStats(NamedTuple):
    """What all ranks know of each other after a step.

    loss: the step's; largest_part: of it. steps: those that the seconds are of. median_s: of the
    ranks' own work; step_s: of a whole step's mean rank, times `steps`. slowest: by own work;
    unreported: the same of those that no warning has named. peak_bytes: of memory.
    """

    loss: float
    largest_part: Peak
    steps: int
    median_s: float
    step_s: float
    slowest: Peak
    unreported: Peak
    peak_bytes: Peak

    def is_slow(self, own_s: float) -> bool:
        """True for a rank with so many seconds of its own, once there are enough steps."""
        return (self.steps == RECENT_STEPS and own_s > SLOW_FACTOR * self.median_s
                and own_s - self.median_s > SLOW_SHARE * self.step_s)


class RecentWork:
    """The recent steps of rank `rank`, this one. The first step, in which kernels compile, is left
    out once there is another."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.own: deque[float] = deque(maxlen=RECENT_STEPS)
        self.whole: deque[float] = deque(maxlen=RECENT_STEPS)
        self.first_step_over = False
        # A warning has named this rank, and it is still slow.
        self.reported = False

    def add(self, own_s: float, step_s: float) -> None:
        """Add a step of `step_s` seconds, `own_s` of which were own work."""
        if not self.first_step_over and self.own:
            self.own.clear()
            self.whole.clear()
            self.first_step_over = True
        self.own.append(own_s)
        self.whole.append(step_s)

    def local(self, peak_bytes: float) -> LocalStats:
        """What this rank tells the others."""
        own_s = sum(self.own)
        bins = [0.0] * BINS
        bins[_bin_of(own_s)] = 1.0
        return LocalStats([*bins, sum(self.whole)],
                          [own_s, -math.inf if self.reported else own_s, peak_bytes])

    def combine(self, loss: float, sums: Sequence[float], peaks: Sequence[Peak]) -> PeerStats:
        """What the ranks' `local` amount to.

        sums: of their summands; peaks: of their parts of `loss`, then of their candidates.
        """
        *counts, step_s = sums
        peers = PeerStats(loss, peaks[0], len(self.own), _median(counts), step_s / sum(counts),
                          *peaks[1:])
        if peers.unreported.rank == self.rank:
            self.reported = peers.is_slow(peers.unreported.value)
        elif self.reported:
            self.reported = peers.is_slow(sum(self.own))
        return peers


def _bin_of(seconds: float) -> int:
    return min(int(math.log(max(seconds, SHORTEST_S) / SHORTEST_S, RATIO)), BINS - 1)


def _median(counts: Sequence[float]) -> float:
    """The middle of the bin in which the median lies; of two ranks the quicker one's."""
    half = sum(counts) / 2
    # Tensor-parallel ranks count as fractions, whose sums are rounded.
    number = next(number for number, below in enumerate(itertools.accumulate(counts))
                  if below > half - 1e-6)
    return SHORTEST_S * RATIO ** (number + 0.5)
