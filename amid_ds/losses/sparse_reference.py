"""The naive twin of the loss on sparse targets: from the definitions, on whole logits, under
autograd.

The truth that tests measure against: a token at a time, and nothing shared with sparse_block.py but
the values that it reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amid_ds.losses.measures import PerToken
from amid_ds.losses.objective import AMiD
from amid_ds.losses.reference import loss_of_numbers, naive_measures, values_from
from amid_ds.losses.sparse import SparseTargets


def naive_sparse_loss(student_logits: Tensor, targets: SparseTargets, objective: AMiD,
                      labels: Tensor | None = None, sequences: Tensor | None = None,
                      counts: Tensor | None = None) -> Tensor:
    """Per-token loss [N] of logits [N, V], in the logits' dtype; sequences and counts as in
    `naive_loss`. Give it fp64 for a truth."""
    log_q = (student_logits / objective.student_temperature).log_softmax(-1)
    if targets.weights is not None:
        return torch.stack([_forward_kl(of_q, targets.take(slice(row, row + 1)))
                            for row, of_q in enumerate(log_q)])
    pairs = [naive_classes(of_q, targets.take(slice(row, row + 1)), objective.teacher_temperature)
             for row, of_q in enumerate(log_q)]
    values = naive_sparse_values(student_logits, targets, objective, labels, sequences, counts)
    return torch.stack([
        loss_of_numbers(of_p, of_q, objective.resolved({each: float(of[row])
                                                        for each, of in values.items()}))
        for row, (of_p, of_q) in enumerate(pairs)])


def naive_sparse_values(student_logits: Tensor, targets: SparseTargets, objective: AMiD,
                        labels: Tensor | None = None, sequences: Tensor | None = None,
                        counts: Tensor | None = None) -> dict[PerToken, list[float]]:
    """The values of all the objective's `per_token`, one for each of N tokens."""
    measured = naive_sparse_measures(student_logits, targets, objective, labels)
    return values_from(measured, objective, sequences, counts)


def naive_sparse_measures(student_logits: Tensor, targets: SparseTargets, objective: AMiD,
                          labels: Tensor | None = None) -> dict[str, Tensor]:
    """Every statistic [N] of `topk`, at the objective's temperatures."""
    rows = []
    for row, logits in enumerate(student_logits.detach() / objective.student_temperature):
        of_row = targets.take(slice(row, row + 1))
        log_p, log_q = naive_classes(logits.log_softmax(-1), of_row, objective.teacher_temperature)
        measured = naive_measures(log_q[None], log_p[None])
        kept = of_row.log_probabilities[0].masked_fill(of_row.ids[0] < 0, -math.inf)
        best = of_row.ids[0, kept.argmax()]
        measured["agreement"] = (logits.argmax() == best)[None].to(logits.dtype)
        if labels is not None and of_row.label_log_probabilities is not None:
            p = of_row.label_log_probabilities.to(logits.dtype).exp()
            measured["label_probability"] = p if labels[row] >= 0 else 0 * p
        rows.append(measured)
    return {name: torch.cat([measured[name] for measured in rows]) for name in rows[0]}


def naive_classes(log_q: Tensor, targets: SparseTargets,
                  temperature: float) -> tuple[Tensor, Tensor]:
    """(log p, log q) of the classes of one token, from log q [V] and targets of n = 1."""
    vocabulary, ids = len(log_q), targets.ids[0].tolist()
    log_p = targets.log_probabilities[0].to(log_q.dtype)
    kept = {token: log_p[place] for place, token in enumerate(ids) if 0 <= token < vocabulary}
    others = [token for token in range(vocabulary) if token not in kept]
    rest = log_q.new_tensor(-math.inf)
    if targets.log_rest is not None and others:
        rest = targets.log_rest[0].to(log_q.dtype)
    if targets.rest == "spread":
        each = rest - math.log(max(1, len(others)))
        log_p = torch.stack([kept.get(token, each) for token in range(vocabulary)])
        return (log_p / temperature).log_softmax(-1), log_q
    if targets.rest == "drop":
        rest = log_q.new_tensor(-math.inf)
    log_p = torch.stack([*kept.values(), rest])
    of_others = log_q[others].logsumexp(-1) if others else log_q.new_tensor(-math.inf)
    log_q = torch.stack([*log_q[list(kept)], of_others])
    return (log_p / temperature).log_softmax(-1), log_q


def _forward_kl(log_q: Tensor, targets: SparseTargets) -> Tensor:
    """Σ w (log p - log q), times 1 as the objective's weights are not read; its autograd is
    -w + (Σ w) q through the softmax."""
    assert targets.weights is not None
    total = torch.zeros_like(log_q[0])
    for token, log_p, weight in zip(targets.ids[0].tolist(), targets.log_probabilities[0],
                                    targets.weights[0], strict=True):
        if 0 <= token < len(log_q) and weight > 0:
            total = total + weight * (log_p - log_q[token])
    return total
