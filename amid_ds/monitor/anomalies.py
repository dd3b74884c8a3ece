"""Alarms that nobody should have to find in a curve: a loss that spikes, a rank that is slow.

Both are judged against the run's own recent past, so there is nothing to set. A loss that comes
back and a rank that catches up are forgotten, and reported again should they return. A loss that
stays up becomes normal after a while, and the next spike is judged against it. Of several ranks
that become slow together one is reported in each step, the slowest first. Slow ranks are not looked
for in an attempt's first step, in which kernels compile.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Callable

from amid_ds.monitor.rank_stats import RECENT_STEPS, PeerStats

# A spike is this many spreads above the recent median, and at least this share of the median.
SPIKE_SPREADS = 8.0
SPIKE_SHARE = 0.25
# Scales the median absolute deviation to a normal distribution's standard deviation.
MAD_TO_DEVIATION = 1.4826

logger = logging.getLogger(__name__)


class AnomalyMonitor:
    """Looks at every step, on every rank alike, and logs one warning per event.

    name_of: a rank's name; each `tp_size` neighbours are a tensor-parallel group, which has one
    part of the loss.
    """

    def __init__(self, name_of: Callable[[int], str], size: int, tp_size: int = 1) -> None:
        self.name_of, self.size, self.tp_size = name_of, size, tp_size
        self.losses: dict[bool, deque[float]] = {sampled: deque(maxlen=RECENT_STEPS)
                                                 for sampled in (False, True)}
        self.spiking = {False: False, True: False}

    def step(self, step: int, peers: PeerStats, sampled: bool = False) -> None:
        """Judge optimizer step `step`.

        sampled: the step learnt from student samples, whose loss differs from the data's, so each
        kind is judged by its own past.
        """
        self._check_spike(step, peers, sampled)
        if self.size > 1 and peers.is_slow(peers.unreported.value):
            logger.warning("%s is slow: in the %d steps up to %d it took %.3g s for its data and "
                           "in the loss, the median rank %.2g s",
                           self.name_of(peers.unreported.rank), RECENT_STEPS, step,
                           peers.unreported.value, peers.median_s)

    def _check_spike(self, step: int, peers: PeerStats, sampled: bool) -> None:
        past, loss = self.losses[sampled], peers.loss
        if len(past) == RECENT_STEPS:
            median = statistics.median(past)
            spread = MAD_TO_DEVIATION * statistics.median(abs(value - median) for value in past)
            spiking = loss > median + max(SPIKE_SPREADS * spread, SPIKE_SHARE * abs(median))
            if spiking and not self.spiking[sampled]:
                part, rank = peers.largest_part
                share = f", {part / loss:.0%} of it" if self.size > self.tp_size else ""
                logger.warning("the loss spikes: %.4g in step %d, the median of the %d steps "
                               "before is %.4g; most of it comes from %s%s", loss, step,
                               RECENT_STEPS, median,
                               self.name_of(rank // self.tp_size * self.tp_size), share)
            self.spiking[sampled] = spiking
        past.append(loss)
