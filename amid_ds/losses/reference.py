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

from amid_ds.losses.divergences import AlphaBeta, Divergence
from amid_ds.losses.objective import AMiD


def naive_loss(student_logits: Tensor, teacher_logits: Tensor, objective: AMiD) -> Tensor:
    """Per-token loss [...] of logits [..., V], in the logits' dtype (AMiD, arXiv 2510.15982).

    Give it fp64 for a truth. The gradient reaches student_logits alone.
    """
    log_p = (teacher_logits.detach() / objective.teacher_temperature).log_softmax(-1)
    log_q = (student_logits / objective.student_temperature).log_softmax(-1)
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
    # Where r has no probability: up to the harmonic mean both models are needed for some.
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    none = no_p & no_q if c > 0 else no_p | no_q
    log_p, log_q = log_p.masked_fill(none, 0), log_q.masked_fill(none, 0)
    if c == 0:
        log_r = lam * log_p + (1 - lam) * log_q
    else:
        log_r = torch.logaddexp(math.log(lam) + c * log_p, math.log1p(-lam) + c * log_q) / c
    return log_r.masked_fill(none, -math.inf).log_softmax(-1)


def naive_divergence(log_a: Tensor, log_b: Tensor, divergence: Divergence) -> Tensor:
    """D(a‖b) [...] of log-probabilities [..., V], -inf for a probability of 0."""
    # Where both are 0 they add nothing, like any two equal probabilities: two of 1, say.
    none = (log_a == -math.inf) & (log_b == -math.inf)
    return FORMULAS[divergence.name](log_a.masked_fill(none, 0), log_b.masked_fill(none, 0),
                                     divergence)


def _kl(log_a: Tensor, log_b: Tensor, _: Divergence) -> Tensor:
    # 0·log 0 = 0.
    return (log_a.exp() * (log_a - log_b).masked_fill(log_a == -math.inf, 0)).sum(-1)


def _alpha_beta(log_a: Tensor, log_b: Tensor, divergence: Divergence) -> Tensor:
    assert isinstance(divergence, AlphaBeta)
    x, y = divergence.alpha, divergence.beta
    # a^x b^y and so on, in logarithms: the derivative of a^x at 0 is infinite.
    both, a, b = x * log_a + y * log_b, (x + y) * log_a, (x + y) * log_b
    terms = both.exp() - x / (x + y) * a.exp() - y / (x + y) * b.exp()
    return -terms.sum(-1) / (x * y)


def _total_variation(log_a: Tensor, log_b: Tensor, _: Divergence) -> Tensor:
    return ((log_a.exp() - log_b.exp()).abs() / 2).sum(-1)


def _squared_hellinger(log_a: Tensor, log_b: Tensor, _: Divergence) -> Tensor:
    return (((log_a / 2).exp() - (log_b / 2).exp()) ** 2 / 2).sum(-1)


# By the divergence's name.
FORMULAS: dict[str, Callable[[Tensor, Tensor, Divergence], Tensor]] = {
    "kl": _kl,
    "alpha_beta": _alpha_beta,
    "total_variation": _total_variation,
    "squared_hellinger": _squared_hellinger,
}
