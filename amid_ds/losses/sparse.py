"""A teacher's distributions where only a part of each is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """Placeholder of the sparse targets' module: the fields that a folder of targets fills."""

    ids: Tensor
    log_probabilities: Tensor
    log_rest: Tensor | None = None
    weights: Tensor | None = None
    label_log_probabilities: Tensor | None = None
    rest: Literal["ghost", "spread", "drop"] = "ghost"
