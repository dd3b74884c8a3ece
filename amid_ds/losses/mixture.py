"""The α-mixture of two models in plain torch: log r̃ and its derivative, element by element.

Functions of a tile's log-probabilities [n, tile], with no loop over data (elementwise.py). Numbers
of the whole block and numbers per token have a form each: with numbers the right one of several
formulas is known, with tensors all are computed. `kernel_math.log_mixture` is the twin in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amid_ds.losses.divergences import INFINITE_RATIO, LOG_ZERO
from amid_ds.losses.objective import Number, ResolvedObjective


def mixture(log_p: Tensor, log_q: Tensor,
            objective: ResolvedObjective) -> tuple[Tensor, Tensor | float]:
    """log r̃ and w = ∂log r̃/∂log q = (1-λ) q^c / (λ p^c + (1-λ) q^c), for every real α; both times
    the objective's power."""
    w: Tensor | float
    if isinstance(objective.alpha, Tensor) or isinstance(objective.lam, Tensor):
        log_r, w = _mixture_per_token(log_p, log_q, objective)
    else:
        log_r, w = _mixture_of_numbers(log_p, log_q, objective.alpha, objective.lam,
                                       objective.log_weights)
    if objective.power == 1:
        return log_r, w
    return _log_zero_kept(log_r * objective.power), w * objective.power


def _mixture_of_numbers(log_p: Tensor, log_q: Tensor, alpha: float, lam: float,
                        log_weights: tuple[Number, Number]) -> tuple[Tensor, Tensor | float]:
    """The mixture for one α and one λ.

    With x = c (log p - log q) both follow from the student's log-odds o = log((1-λ)/λ) - x:
    w = σ(o), and log r̃ is the dominant one of log p + log(λ)/c and log q + log(1-λ)/c, plus
    log(1 + e^-|o|)/c: nothing cancels. For small c there is cancellation, between log(λ)/c and the
    rest; log q + log1p(λ expm1(x))/c has none, but overflows for large x. It is used element by
    element if |x| < 1.
    """
    if lam in (0, 1):
        return (log_p, 0.0) if lam else (log_q, 1.0)
    if alpha == 1:
        return _log_zero_kept(torch.lerp(log_q, log_p, lam)), 1.0 - lam
    c = (1 - alpha) / 2
    x = (log_p - log_q).mul_(c)
    log_lam, log_rest = log_weights
    odds = log_rest - log_lam - x
    dominant = torch.maximum if c > 0 else torch.minimum
    log_r = log_p + log_lam / c
    dominant(log_r, log_q + log_rest / c, out=log_r)
    log_r.add_(odds.abs().neg_().exp_().log1p_().div_(c))
    if abs(c) < 0.5:
        near = x.clamp(-1, 1).expm1_().mul_(lam).log1p_().div_(c).add_(log_q)
        log_r = torch.where(x.abs() < 1, near, log_r)
    return log_r, odds.sigmoid_()


def _mixture_per_token(log_p: Tensor, log_q: Tensor,
                       objective: ResolvedObjective) -> tuple[Tensor, Tensor]:
    """The same where α or λ is [n]: every form at once, and one taken by torch.where.

    The ends of λ are exact: there a logarithm is -inf, hence o = ±inf, and the other model is left.
    """
    alpha, lam, log_lam, log_rest = (
        number[:, None] if isinstance(number, Tensor) else torch.full_like(log_p[:, :1], number)
        for number in (objective.alpha, objective.lam, *objective.log_weights))
    geometric = alpha == 1
    c = torch.where(geometric, 1.0, (1 - alpha) / 2)
    x = (log_p - log_q).mul_(c)
    odds = log_rest - log_lam - x
    log_r = torch.where(odds > 0, log_q + log_rest / c, log_p + log_lam / c)
    log_r.add_(odds.abs().neg_().exp_().log1p_().div_(c))
    near = x.clamp(-1, 1).expm1_().mul_(lam).log1p_().div_(c).add_(log_q)
    log_r = torch.where((c.abs() < 0.5) & (lam < 1) & (x.abs() < 1), near, log_r)
    log_r = torch.where(geometric, _log_zero_kept(torch.lerp(log_q, log_p, lam)), log_r)
    return log_r, torch.where(geometric, 1 - lam, odds.sigmoid_())


def _log_zero_kept(log_r: Tensor) -> Tensor:
    """In place: a multiple of LOG_ZERO is LOG_ZERO."""
    return log_r.masked_fill_(log_r < LOG_ZERO / INFINITE_RATIO, LOG_ZERO)
