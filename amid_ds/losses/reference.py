"""The naive twin: the objective as the paper writes it, on whole logits, under autograd.

Slow, and several tensors of tokens × vocabulary large: it is the truth that tests and benchmarks
measure against. It shares nothing with fused.py but the AMiD object that it reads; the divergences
are written out again, in `FORMULAS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from amid_ds.losses.divergences import KL, AlphaBeta, ConcreteScore, Divergence, SampledReverseKL
from amid_ds.losses.measures import PerToken
from amid_ds.losses.objective import AMiD, ResolvedObjective


def naive_loss(student_logits: Tensor, teacher_logits: Tensor, objective: AMiD,
               labels: Tensor | None = None, sequences: Tensor | None = None,
               counts: Tensor | None = None) -> Tensor:
    """Per-token loss [...] of logits [..., V], in the logits' dtype (AMiD, arXiv 2510.15982).

    Give it fp64 for a truth. The gradient reaches student_logits alone. Where numbers are per
    token, the logits are [N, V], and a token is a loss of numbers; labels, sequences and counts
    (the tokens with a weight) are [N]. The objective's token_weight is not in it
    (`naive_values`).
    """
    log_p = (teacher_logits.detach() / objective.teacher_temperature).log_softmax(-1)
    log_q = (student_logits / objective.student_temperature).log_softmax(-1)
    if not objective.per_token:
        return loss_of_numbers(log_p, log_q, objective.resolved({}))
    values = naive_values(student_logits, teacher_logits, objective, labels, sequences, counts)
    return torch.stack([
        loss_of_numbers(of_p, of_q, objective.resolved({each: float(of[token])
                                                         for each, of in values.items()}))
        for token, (of_p, of_q) in enumerate(zip(log_p, log_q, strict=True))])


def loss_of_numbers(log_p: Tensor, log_q: Tensor, objective: ResolvedObjective) -> Tensor:
    """The loss [...] of log-probabilities [..., V], whose α and λ are numbers."""
    assert not isinstance(objective.alpha, Tensor) and not isinstance(objective.lam, Tensor)
    log_r = naive_assistant(log_p, log_q, objective.alpha, objective.lam, objective.power)
    if objective.detach_assistant:
        log_r = log_r.detach()
    log = {"p": log_p, "q": log_q, "r": log_r}
    total = torch.zeros_like(log_q[..., 0])
    divergence = objective.resolved_divergence
    for order, weight in objective.order_weights:
        if weight:
            first, second = log[order[0]], log[order[1]]
            value = (naive_concrete_score(first, second, log_p, log_q, divergence)
                     if isinstance(divergence, ConcreteScore)
                     else naive_divergence(first, second, divergence))
            total = total + weight * value
    return total


def naive_sampled_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor,
                       objective: AMiD) -> Tensor:
    """log q(y) - log p(y) [...] of the labels y [...] and logits [..., V], whose gradient is that
    of the policy gradient, (log q(y) - log p(y) - b) ∇log q(y); 0 for a label below 0."""
    divergence = objective.resolved_divergence
    assert isinstance(divergence, SampledReverseKL)
    log_p = (teacher_logits.detach() / objective.teacher_temperature).log_softmax(-1)
    log_q = (student_logits / objective.student_temperature).log_softmax(-1)
    chosen = labels.clamp(min=0)[..., None]
    of_q, of_p = (log.gather(-1, chosen)[..., 0] for log in (log_q, log_p))
    value = (of_q - of_p).detach()
    baseline = naive_divergence(log_q, log_p, KL()).detach() if divergence.baseline == "kl" else 0
    surrogate = (value - baseline) * of_q
    return torch.where(labels >= 0, value + surrogate - surrogate.detach(), 0)


def naive_assistant(log_p: Tensor, log_q: Tensor, alpha: float, lam: float,
                    power: float = 1.0) -> Tensor:
    """log r [..., V] of the α-mixture (arXiv 2510.15982), r ∝ r̃^power; the ends of λ are the
    models."""
    if lam in (0.0, 1.0):
        log_r = log_p if lam else log_q
        return log_r if power == 1 else (power * log_r).log_softmax(-1)
    c = (1 - alpha) / 2
    # Where r has no probability: up to the harmonic mean both models are needed for some.
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    none = no_p & no_q if c > 0 else no_p | no_q
    log_p, log_q = log_p.masked_fill(none, 0), log_q.masked_fill(none, 0)
    if c == 0:
        log_r = lam * log_p + (1 - lam) * log_q
    else:
        log_r = torch.logaddexp(math.log(lam) + c * log_p, math.log1p(-lam) + c * log_q) / c
    return (power * log_r).masked_fill(none, -math.inf).log_softmax(-1)


def naive_values(student_logits: Tensor, teacher_logits: Tensor, objective: AMiD,
                 labels: Tensor | None = None, sequences: Tensor | None = None,
                 counts: Tensor | None = None) -> dict[PerToken, list[float]]:
    """The values of all the objective's `per_token`, one for each of N tokens."""
    measured = naive_measures(student_logits / objective.student_temperature,
                              teacher_logits / objective.teacher_temperature, labels)
    return values_from(measured, objective, sequences, counts)


def values_from(measured: dict[str, Tensor], objective: AMiD, sequences: Tensor | None = None,
                counts: Tensor | None = None) -> dict[PerToken, list[float]]:
    """The same, from the measures [N] of N tokens."""
    return {each: _values(each, measured[each.by].tolist(), sequences, counts)
            for each in objective.per_token}


def naive_measures(student_logits: Tensor, teacher_logits: Tensor,
                   labels: Tensor | None = None) -> dict[str, Tensor]:
    """Every statistic [N] of tempered logits [N, V]; a label of -100 has the probability 0."""
    p, q = teacher_logits.detach().softmax(-1), student_logits.detach().softmax(-1)
    measured = {"teacher_entropy": torch.special.entr(p).sum(-1),
                "student_entropy": torch.special.entr(q).sum(-1),
                "divergence": (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1),
                "overlap": 1 - (p - q).abs().sum(-1) / 2,
                "agreement": (p.argmax(-1) == q.argmax(-1)).to(p.dtype)}
    if labels is not None:
        measured["label_probability"] = torch.stack(
            [row[label] if label >= 0 else row.new_zeros(())
             for row, label in zip(p, labels.tolist(), strict=True)])
    return measured


def _values(number: PerToken, measure: list[float], sequences: Tensor | None,
            counts: Tensor | None) -> list[float]:
    tokens = range(len(measure))
    if not number.needs_sequences:
        return [_interpolated(number, each) for each in measure]
    assert sequences is not None
    of, counted = sequences.tolist(), [True] * len(measure) if counts is None else counts.tolist()
    values = [0.0] * len(measure)
    for sequence in set(of):
        mine = [token for token in tokens if of[token] == sequence and counted[token]]
        if number.top is None:
            mean = sum(measure[token] for token in mine) / max(1, len(mine))
            for token in mine:
                values[token] = _interpolated(number, mean)
        else:
            # sorted() leaves equal ones in their order.
            wanted = math.ceil(Fraction(str(number.top)) * len(mine))
            for token in sorted(mine, key=lambda token: -measure[token])[:wanted]:
                values[token] = 1.0
    return values


def _interpolated(number: PerToken, measure: float) -> float:
    (start, end), (low, high) = number.linear, number.at
    share = min(1.0, max(0.0, (measure - low) / (high - low)))
    return (1 - share) * start + share * end


def naive_divergence(log_a: Tensor, log_b: Tensor, divergence: Divergence) -> Tensor:
    """D(a‖b) [...] of log-probabilities [..., V], -inf for a probability of 0."""
    # Where both are 0 they add nothing, like any two equal probabilities: two of 1, say.
    none = (log_a == -math.inf) & (log_b == -math.inf)
    return FORMULAS[divergence.name](log_a.masked_fill(none, 0), log_b.masked_fill(none, 0),
                                     divergence)


def naive_concrete_score(log_a: Tensor, log_b: Tensor, log_p: Tensor, log_q: Tensor,
                         divergence: ConcreteScore) -> Tensor:
    """½ Σ_x Σ_y w₁(x) w₂(y) (δ_x - δ_y)² [...] of log-probabilities [..., V], δ = log a - log b
    (arXiv 2509.25837, eq. 8), the square multiplied out."""
    said = (log_a > -math.inf) | (log_b > -math.inf)
    named = {"teacher": log_p.exp(), "student": log_q.exp(), "uniform": torch.ones_like(log_p)}
    first, second = (named[name].detach() * said for name in (divergence.first, divergence.second))
    first, second = first / first.sum(-1, keepdim=True), second / second.sum(-1, keepdim=True)
    infinite = (log_a == -math.inf) ^ (log_b == -math.inf)
    # Before the difference, so that autograd meets no infinity.
    delta = (log_a.masked_fill(infinite | ~said, 0) - log_b.masked_fill(infinite | ~said, 0))
    squares = ((first + second) * delta.square()).sum(-1)
    value = squares / 2 - (first * delta).sum(-1) * (second * delta).sum(-1)
    return value.masked_fill((infinite & ((first > 0) | (second > 0))).any(-1), math.inf)


def _kl(log_a: Tensor, log_b: Tensor, _: Divergence) -> Tensor:
    # 0·log 0 = 0.
    return (log_a.exp() * (log_a - log_b).masked_fill(log_a == -math.inf, 0)).sum(-1)


def _alpha_beta(log_a: Tensor, log_b: Tensor, divergence: Divergence) -> Tensor:
    assert isinstance(divergence, AlphaBeta)
    x, y = divergence.alpha, divergence.beta
    if x == y == 0:
        return (log_a - log_b).square().sum(-1) / 2
    if x + y == 0:
        log_ratio = x * (log_a - log_b)
        return (log_ratio.exp() - log_ratio - 1).sum(-1) / x**2
    if x == 0:
        return _alpha_beta(log_b, log_a, AlphaBeta(y, 0))
    if y == 0:
        # 0·log 0 = 0.
        log_a, log_b = x * log_a, x * log_b
        cross = log_a.exp() * (log_a - log_b).masked_fill(log_a == -math.inf, 0)
        return (cross - log_a.exp() + log_b.exp()).sum(-1) / x**2
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
