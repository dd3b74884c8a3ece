"""Alarms that nobody should have to find in a curve: a loss that spikes, a rank that is slow.

Both are judged against the run's own recent past, so there is nothing to set. A loss that comes
back and a rank that catches up are forgotten, and reported again should they return. A loss that
stays up becomes normal after a while, and the next spike is judged against it. Slow ranks are not
looked for in an attempt's first step, in which kernels compile.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Sequence

# Steps of the recent past.
RECENT_STEPS = 20
# A spike is this many spreads above the recent median, and at least this share of the median.
SPIKE_SPREADS = 8.0
SPIKE_SHARE = 0.25
# Scales the median absolute deviation to a normal distribution's standard deviation.
MAD_TO_DEVIATION = 1.4826
# A slow rank takes this many times the median rank's own time, and this share of a step more.
SLOW_FACTOR = 1.5
SLOW_SHARE = 0.05

logger = logging.getLogger(__name__)


class AnomalyMonitor:
    """Looks at every step, on every rank alike, and logs one warning per event.

    names: of the ranks, by number; each `tp_size` neighbours are a tensor-parallel group, which has
    one part of the loss.
    """

    def __init__(self, names: Sequence[str], tp_size: int = 1) -> None:
        self.names, self.tp_size = names, tp_size
        self.losses: dict[bool, deque[float]] = {sampled: deque(maxlen=RECENT_STEPS)
                                                 for sampled in (False, True)}
        self.own_seconds: deque[Sequence[float]] = deque(maxlen=RECENT_STEPS)
        self.step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self.spiking = {False: False, True: False}
        self.slow: set[int] = set()
        self.first_step_over = False

    @property
    def slowest(self) -> int:
        """The rank that has taken most time of its own in the recent steps."""
        seconds = self._recent_own_seconds()
        return seconds.index(max(seconds))

    @property
    def slowest_name(self) -> str | None:
        """The name of the slowest rank; None for a rank that is alone."""
        return self.names[self.slowest] if len(self.names) > 1 else None

    def _recent_own_seconds(self) -> list[float]:
        return [sum(of_rank) for of_rank in zip(*self.own_seconds, strict=True)]

    def step(self, step: int, peers: Sequence[Sequence[float]], step_s: float,
             sampled: bool = False) -> None:
        """Judge optimizer step `step`, which took `step_s` seconds.

        peers, by rank: its tokens' part of the loss, its own seconds (see StepTimer.own_seconds),
        and more. sampled: the step learnt from student samples, whose loss differs from the
        data's, so each kind is judged by its own past.
        """
        losses, own, *_ = zip(*peers, strict=True)
        self._check_spike(step, losses[::self.tp_size], sampled)
        if not self.first_step_over and self.own_seconds:
            self.own_seconds.clear()
            self.step_seconds.clear()
            self.first_step_over = True
        self.own_seconds.append(own)
        self.step_seconds.append(step_s)
        self._check_slow_ranks(step)

    def _check_spike(self, step: int, parts: Sequence[float], sampled: bool) -> None:
        past, loss = self.losses[sampled], sum(parts)
        if len(past) == RECENT_STEPS:
            median = statistics.median(past)
            spread = MAD_TO_DEVIATION * statistics.median(abs(value - median) for value in past)
            spiking = loss > median + max(SPIKE_SPREADS * spread, SPIKE_SHARE * abs(median))
            if spiking and not self.spiking[sampled]:
                worst = max(range(len(parts)), key=parts.__getitem__)
                share = f", {parts[worst] / loss:.0%} of it" if len(parts) > 1 else ""
                logger.warning("the loss spikes: %.4g in step %d, the median of the %d steps "
                               "before is %.4g; most of it comes from %s%s", loss, step,
                               RECENT_STEPS, median, self.names[worst * self.tp_size], share)
            self.spiking[sampled] = spiking
        past.append(loss)

    def _check_slow_ranks(self, step: int) -> None:
        if len(self.own_seconds) < RECENT_STEPS or len(self.names) < 2:
            return
        seconds = self._recent_own_seconds()
        # Of two ranks the quicker one.
        median = statistics.median_low(seconds)
        for rank, own in enumerate(seconds):
            if own <= SLOW_FACTOR * median or own - median <= SLOW_SHARE * sum(self.step_seconds):
                self.slow.discard(rank)
                continue
            if rank not in self.slow:
                logger.warning("%s is slow: in the %d steps up to %d it took %.3g s for its data "
                               "and in the loss, the median rank %.3g s", self.names[rank],
                               RECENT_STEPS, step, own, median)
            self.slow.add(rank)
