"""How far a command of several parts is, what time is left on this machine, and what it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Of the matrices, square and fp32, whose product measures a machine.
PRODUCT_SIZE = 2048
PRODUCT_TRIALS = 5
# So many products count as done at the measured speed before the first part.
PRIOR_PRODUCTS = 200


class PartsProgress:
    """The parts of a command, announced one by one with the time so far and the time left, and at
    the end of each what it took.

    products: what each part takes, by its name and in their order, in products of two matrices of
    PRODUCT_SIZE on the same cores. began: when the command began, by time.monotonic(); None: now.
    """

    def __init__(self, products: Mapping[str, float], began: float | None = None) -> None:
        self.began = time.monotonic() if began is None else began
        self.product_seconds = measure_product()
        self.products = dict(products)
        # Seconds of the parts that have ended, without those that were skipped.
        self.took: dict[str, float] = {}
        self._part: str | None = None
        self._part_began = 0.0
        self._number = 0

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    @property
    def left_seconds(self) -> float:
        """Of the current part and those after it, by the speed so far."""
        done = sum(self.products[part] for part in self.took) + PRIOR_PRODUCTS
        spent = sum(self.took.values()) + PRIOR_PRODUCTS * self.product_seconds
        return spent / done * sum(list(self.products.values())[self._number - 1:])

    def begin(self, part: str, title: str) -> None:
        """Announce the next part."""
        self._end_part()
        self._part, self._part_began = part, time.monotonic()
        self._number = list(self.products).index(part) + 1
        logger.info(f"\n[{self._number}/{len(self.products)}] {title}\n  "
                    f"{duration(self.seconds)} so far, about {duration(self.left_seconds)} left")

    def skip(self, reason: str) -> None:
        """The current part is none of this command's work."""
        self._part = None
        logger.info(f"  {reason}")

    def end(self) -> dict[str, Any]:
        """End the last part; what the command took, in seconds and in products, and each part."""
        self._end_part()
        return {"matrix_size": PRODUCT_SIZE, "product_seconds": self.product_seconds,
                **self._measured(self.seconds),
                "parts": {part: self._measured(seconds) for part, seconds in self.took.items()}}

    def _end_part(self) -> None:
        if self._part is not None:
            seconds = self.took[self._part] = time.monotonic() - self._part_began
            self._part = None
            logger.info(f"  took {seconds:.1f} s, {seconds / self.product_seconds:,.0f} products")

    def _measured(self, seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "matrix_products": seconds / self.product_seconds}


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
