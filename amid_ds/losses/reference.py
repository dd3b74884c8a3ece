"""The naive twin: the objective as the paper writes it, on whole logits, differentiated by autograd.

Slow, and several tensors of tokens × vocabulary large: it is the truth that tests and benchmarks measure against. It
shares nothing with fused.py but the AMiD object that it reads; the divergences are written out again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amid_ds.losses.objective import AlphaBeta, AMiD


def naive_loss(student_logits: Tensor, teacher_logits: Tensor, objective: AMiD) -> Tensor:
    """logits [..., V] -> per-token loss [...], in the logits' dtype; fp64 where a truth is wanted."""
    log_p = (teacher_logits.detach() / objective.temperature).log_softmax(-1)
    log_q = (student_logits / objective.temperature).log_softmax(-1)
    log = {"p": log_p, "q": log_q, "r": naive_assistant(log_p, log_q, objective.alpha, objective.lam)}
    if objective.detach_assistant:
        log["r"] = log["r"].detach()
    total = torch.zeros_like(log_q[..., 0])
    for order, weight in objective.weights:
        total = total + weight * naive_divergence(log[order[0]], log[order[1]], objective.measure)
    return total


def naive_assistant(log_p: Tensor, log_q: Tensor, alpha: float, lam: float) -> Tensor:
    """log r [..., V], arXiv 2510.15982; the ends of λ are the models themselves."""
    if lam in (0.0, 1.0):
        return log_p if lam else log_q
    c = (1 - alpha) / 2
    if c == 0:
        return (lam * log_p + (1 - lam) * log_q).log_softmax(-1)
    return (torch.logaddexp(math.log(lam) + c * log_p, math.log1p(-lam) + c * log_q) / c).log_softmax(-1)


def naive_divergence(log_a: Tensor, log_b: Tensor, measure: object) -> Tensor:
    a, b = log_a.exp(), log_b.exp()
    if isinstance(measure, AlphaBeta):
        x, y = measure.alpha, measure.beta
        return -(a**x * b**y - x / (x + y) * a ** (x + y) - y / (x + y) * b ** (x + y)).sum(-1) / (x * y)
    formulas = {"kl": lambda: a * (log_a - log_b), "total_variation": lambda: (a - b).abs() / 2,
                "squared_hellinger": lambda: (a.sqrt() - b.sqrt()) ** 2 / 2}
    return formulas[measure.name]().sum(-1)   # type: ignore[attr-defined]
