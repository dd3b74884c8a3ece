"""What nobody should have to find in a curve: a loss that jumps, a rank that is slower than the others.

Both are judged against the run's own recent past, so there is nothing to set. A loss that comes back and a rank that
catches up are forgotten, and said again should they return. A loss that stays up is what is normal after a while: the
next spike stands out against it. The first step of a life, in which kernels compile, says nothing of who is slow.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence

RECENT_STEPS = 20           # of the recent past
SPIKE = 8.0          # spreads above the recent median, where one spread is what a normal distribution's deviation is
RISE = 0.25          # and at least this share of the median
SLOW_RANK = 1.5           # times the median rank's own time
SHARE = 0.05         # and by at least this share of a step


class AnomalyMonitor:
    """Looks at every step on every rank alike; `say` is called once per event. `names`: of the ranks, by number; each
    `tp_size` neighbours among them are a tensor-parallel group, which has one part of the loss."""

    def __init__(self, names: Sequence[str], say: Callable[[str], None], tp_size: int = 1) -> None:
        self.names, self.say, self.tp_size = names, say, tp_size
        self.losses: dict[bool, deque[float]] = {sampled: deque(maxlen=RECENT_STEPS) for sampled in (False, True)}
        self.own: deque[Sequence[float]] = deque(maxlen=RECENT_STEPS)
        self.steps_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self.spiking = {False: False, True: False}
        self.slow: set[int] = set()
        self.compiled = False      # the first step is over

    @property
    def slowest(self) -> int:
        """The rank that has taken most time of its own in the recent steps."""
        seconds = self._seconds()
        return seconds.index(max(seconds))

    @property
    def slowest_name(self) -> str | None:
        """`slowest` in words; None for a rank that is alone."""
        return self.names[self.slowest] if len(self.names) > 1 else None

    def _seconds(self) -> list[float]:
        return [sum(step) for step in zip(*self.own, strict=True)]

    def step(self, step: int, peers: Sequence[Sequence[float]], step_s: float, sampled: bool = False) -> None:
        """Optimizer step `step` took `step_s` seconds. `peers`, by rank: its tokens' part of the loss, the seconds that
        it had to itself (see Meter.own_seconds), and more. A step on the student's own words (`sampled`) has another
        loss than one on the data: each is judged by its like."""
        parts, own, *_ = zip(*peers, strict=True)
        self._spike(step, parts[::self.tp_size], sampled)
        if not self.compiled and self.own:
            self.own.clear()
            self.steps_s.clear()
            self.compiled = True
        self.own.append(own)
        self.steps_s.append(step_s)
        self._slow(step)

    def _spike(self, step: int, parts: Sequence[float], sampled: bool) -> None:
        past, loss = self.losses[sampled], sum(parts)
        if len(past) == RECENT_STEPS:
            middle = statistics.median(past)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in past)
            spiking = loss > middle + max(SPIKE * spread, RISE * abs(middle))
            if spiking and not self.spiking[sampled]:
                worst = max(range(len(parts)), key=parts.__getitem__)
                share = f", {parts[worst] / loss:.0%} of it" if len(parts) > 1 else ""
                self.say(f"WARNING: the loss spikes: {loss:.4g} in step {step}, {middle:.4g} in the middle of the "
                         f"{RECENT_STEPS} before; most of it comes from {self.names[worst * self.tp_size]}{share}")
            self.spiking[sampled] = spiking
        past.append(loss)

    def _slow(self, step: int) -> None:
        if len(self.own) < RECENT_STEPS or len(self.names) < 2:
            return
        seconds = self._seconds()
        middle = statistics.median_low(seconds)      # of two ranks: the quicker
        for rank, own in enumerate(seconds):
            slow = own > SLOW_RANK * middle and own - middle > SHARE * sum(self.steps_s)
            if slow and rank not in self.slow:
                self.say(f"WARNING: {self.names[rank]} is slow: in the {RECENT_STEPS} steps up to {step} it took {own:.3g} s "
                         f"for its data and in the loss, the median rank {middle:.3g} s")
            (self.slow.add if slow else self.slow.discard)(rank)
