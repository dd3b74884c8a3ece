"""How far a command of several parts is, and what time is left on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

# Of the matrices, square and fp32, whose product measures a machine.
PRODUCT_SIZE = 2048
PRODUCT_TRIALS = 5
# So many products count as done at the measured speed before the first part.
PRIOR_PRODUCTS = 200


class PartsProgress:
    """The parts of a command, announced one by one with the time so far and the time left.

    products: what each part takes, in products of two matrices of PRODUCT_SIZE on the same cores.
    """

    def __init__(self, products: Sequence[float]) -> None:
        self.began = time.monotonic()
        self.product_seconds = measure_product()
        self.products = list(products)
        self.number = 0
        self._done, self._spent = 0.0, 0.0
        self._part_began: float | None = None

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    @property
    def left_seconds(self) -> float:
        """Of the current part and those after it, by the speed so far."""
        rate = ((self._spent + PRIOR_PRODUCTS * self.product_seconds)
                / (self._done + PRIOR_PRODUCTS))
        return rate * sum(self.products[self.number - 1:])

    def begin(self, title: str) -> None:
        """Announce the next part."""
        if self._part_began is not None:
            self._spent += time.monotonic() - self._part_began
            self._done += self.products[self.number - 1]
        self.number += 1
        self._part_began = time.monotonic()
        logger.info(f"\n[{self.number}/{len(self.products)}] {title}\n  "
                    f"{duration(self.seconds)} so far, about {duration(self.left_seconds)} left")

    def skip(self, reason: str) -> None:
        """The current part takes no time."""
        self._part_began = None
        logger.info(f"  {reason}")


def measure_product() -> float:
    """Seconds of a product of two matrices of PRODUCT_SIZE, on all of torch's threads."""
    matrix = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE)
    trials = []
    for _ in range(PRODUCT_TRIALS):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        trials.append(time.perf_counter() - began)
    return min(trials)


def duration(seconds: float) -> str:
    """Such as 45 s or 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
