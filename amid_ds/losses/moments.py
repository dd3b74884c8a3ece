"""KL reads the logits once less: what its sums need of log Σ r̃ can be put in afterwards, because they are affine in it.

With L = log Σ r̃, ℓ = log r̃ (so log r = ℓ - L) and the orders' weights κ, a row of moments is nine numbers per token:

    0, 1  L in two parts (vocab_parallel.joined)
    2-4   the means over r of w, T and wT, where T = κ_rp (ℓ - log p) + κ_rq (ℓ - log q)
    5     Σ κ_pr p (log p - ℓ) + κ_qr q (log q - ℓ)
    6     Σ κ_qr q (log q - ℓ)
    7     Σ w (κ_pr p + κ_qr q)
    8     Σ (κ_rp - κ_pr) p + (κ_rq - κ_qr) q, which is known but for the rounding that the value has to be freed of

Moments of parts of the vocabulary, tiles or shards, are put together by `merged`, in any number of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import merge_logsumexp
from amid_ds.losses.objective import AMiD

ROWS = 9


def merged(parts: Tensor) -> Tensor:
    """[m, 9, n] of m parts -> [9, n] of their union; an empty part has L = -inf and otherwise zeros."""
    total = merge_logsumexp(parts[:, :2])
    share = (parts[:, 0] - total[0] + parts[:, 1] - total[1]).exp()      # of each part in Σ r̃
    return torch.cat([total, (parts[:, 2:5] * share[:, None]).sum(0), parts[:, 5:].sum(0)])


def sums_of(moments: Tensor, objective: AMiD) -> Tensor:
    """moments [9, n] of the whole vocabulary -> [4, n] ΣD, ΣA, Σ(wA + B), Σwr."""
    kappa = {"pr": 0.0, "qr": 0.0, "rp": 0.0, "rq": 0.0, **dict(objective.weights)}
    to_r, from_r = kappa["pr"] + kappa["qr"], kappa["rp"] + kappa["rq"]
    log_sum = moments[0] + moments[1]
    w_r, t_r, wt_r, value, pull, w_models, excess = moments[2:]
    sum_a = t_r - from_r * log_sum
    sum_x = to_r * w_r - w_models + wt_r - from_r * log_sum * w_r + pull + kappa["qr"] * log_sum
    return torch.stack([value + to_r * log_sum + sum_a + (excess + (to_r - from_r)), sum_a, sum_x, w_r])
