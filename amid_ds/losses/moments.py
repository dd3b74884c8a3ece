"""One-pass statistics for KL.

KL's sums are affine in log Σ r̃, so one reading of the logits yields nine moments from which both
log Σ r̃ and the sums follow; other divergences read the logits once for each.

With L = log Σ r̃, ℓ = log r̃ (so log r = ℓ - L) and the orders' weights κ, a token's moments are

    0, 1  L in two parts (vocab_parallel.py)
    2-4   the means over r of w, T and wT, where T = κ_rp (ℓ - log p) + κ_rq (ℓ - log q)
    5     Σ κ_pr p (log p - ℓ) + κ_qr q (log q - ℓ)
    6     Σ κ_qr q (log q - ℓ)
    7     Σ w (κ_pr p + κ_qr q)
    8     Σ (κ_rp - κ_pr) p + (κ_rq - κ_qr) q, which equals from_r - to_r in exact arithmetic
          (from_r = κ_rp + κ_rq, to_r = κ_pr + κ_qr); the difference cancels rounding in the value

Moments of parts of the vocabulary, tiles or shards, are united by `merge_moments`, in any number of
steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import merge_logsumexp
from amid_ds.losses.objective import Number, ResolvedObjective

MOMENT_ROWS = 9


def merge_moments(parts: Tensor) -> Tensor:
    """[m, 9, n] of m parts -> [9, n] of their union.

    An empty part has L = -inf and zeros otherwise.
    """
    total = merge_logsumexp(parts[:, :2])
    # Each part's share of Σ r̃, the weight of its means.
    share = (parts[:, 0] - total[0] + parts[:, 1] - total[1]).exp()
    return torch.cat([total, (parts[:, 2:5] * share[:, None]).sum(0), parts[:, 5:].sum(0)])


def sums_from_moments(moments: Tensor, objective: ResolvedObjective) -> Tensor:
    """moments [9, n] of the whole vocabulary -> [4, n] ΣD, ΣA, Σ(wA + B), Σwr (block.py)."""
    kappa: dict[str, Number] = {"pr": 0.0, "qr": 0.0, "rp": 0.0, "rq": 0.0}
    kappa.update(objective.order_weights)
    to_r, from_r = kappa["pr"] + kappa["qr"], kappa["rp"] + kappa["rq"]
    log_sum = moments[0] + moments[1]
    w_r, t_r, wt_r, value, pull, w_models, excess = moments[2:]
    sum_a = t_r - from_r * log_sum
    sum_x = (to_r * w_r - w_models + wt_r - from_r * log_sum * w_r + pull
             + kappa["qr"] * log_sum)
    sum_d = value + to_r * log_sum + sum_a + (excess + (to_r - from_r))
    return torch.stack([sum_d, sum_a, sum_x, w_r])
