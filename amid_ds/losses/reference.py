"""The naive twin: the objective as the paper writes it, on whole logits, under autograd.

Slow, and several tensors of tokens × vocabulary large: it is the truth that tests and benchmarks
measure against. It shares nothing with fused.py but the AMiD object that it reads; the divergences
are written out again, in `FORMULAS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from amid_ds.losses.objective import AlphaBeta, AMiD, Divergence


def naive_loss(student_logits: Tensor, teacher_logits: Tensor, objective: AMiD) -> Tensor:
    """Per-token loss [...] of logits [..., V], in the logits' dtype (AMiD, arXiv 2510.15982).

    Give it fp64 for a truth. The gradient reaches student_logits alone.
    """
    log_p = (teacher_logits.detach() / objective.temperature).log_softmax(-1)
    log_q = (student_logits / objective.temperature).log_softmax(-1)
    log_r = naive_assistant(log_p, log_q, objective.alpha, objective.lam)
    if objective.detach_assistant:
        log_r = log_r.detach()
    log = {"p": log_p, "q": log_q, "r": log_r}
    total = torch.zeros_like(log_q[..., 0])
    for order, weight in objective.order_weights:
        total = total + weight * naive_divergence(log[order[0]], log[order[1]],
                                                  objective.resolved_divergence)
    return total


def naive_assistant(log_p: Tensor, log_q: Tensor, alpha: float, lam: float) -> Tensor:
    """log r [..., V] of the α-mixture (arXiv 2510.15982); the ends of λ are the models."""
    if lam in (0.0, 1.0):
        return log_p if lam else log_q
    c = (1 - alpha) / 2
    if c == 0:
        return (lam * log_p + (1 - lam) * log_q).log_softmax(-1)
    weighted = torch.logaddexp(math.log(lam) + c * log_p, math.log1p(-lam) + c * log_q)
    return (weighted / c).log_softmax(-1)


def naive_divergence(log_a: Tensor, log_b: Tensor, divergence: Divergence) -> Tensor:
    """D(a‖b) [...] of log-probabilities [..., V]."""
    return FORMULAS[divergence.name](log_a, log_b, divergence)


def _kl(log_a: Tensor, log_b: Tensor, _: Divergence) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _alpha_beta(log_a: Tensor, log_b: Tensor, divergence: Divergence) -> Tensor:
    assert isinstance(divergence, AlphaBeta)
    a, b, x, y = log_a.exp(), log_b.exp(), divergence.alpha, divergence.beta
    terms = a**x * b**y - x / (x + y) * a ** (x + y) - y / (x + y) * b ** (x + y)
    return -terms.sum(-1) / (x * y)


def _total_variation(log_a: Tensor, log_b: Tensor, _: Divergence) -> Tensor:
    return ((log_a.exp() - log_b.exp()).abs() / 2).sum(-1)


def _squared_hellinger(log_a: Tensor, log_b: Tensor, _: Divergence) -> Tensor:
    return ((log_a.exp().sqrt() - log_b.exp().sqrt()) ** 2 / 2).sum(-1)


# By the divergence's name.
FORMULAS: dict[str, Callable[[Tensor, Tensor, Divergence], Tensor]] = {
    "kl": _kl,
    "alpha_beta": _alpha_beta,
    "total_variation": _total_variation,
    "squared_hellinger": _squared_hellinger,
}
