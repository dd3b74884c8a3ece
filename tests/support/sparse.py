"""Sparse targets of a teacher's logits, and the loss on them, ours and the naive twin's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from amid_ds import AMiD, LMHead, SparseTargets, linear_amid_loss
from amid_ds.losses.fused import LossOutput
from amid_ds.losses.sparse_reference import naive_sparse_loss, naive_sparse_values
from support.losses import LossProblem


def topk_targets(logits: Tensor, k: int, rest: str = "ghost", labels: Tensor | None = None,
                 padding: int = 0) -> SparseTargets:
    """`topk` of a teacher's logits [n, V]; the last `padding` entries of the odd rows are none."""
    log_p = logits.detach().log_softmax(-1)
    kept, ids = log_p.topk(k, -1)
    if padding:
        ids, kept = ids.clone(), kept.clone()
        ids[1::2, k - padding:] = -1
        kept[1::2, k - padding:] = torch.nan
    outside = torch.ones_like(log_p, dtype=torch.bool)
    for row, of_row in enumerate(ids.tolist()):
        outside[row, [token for token in of_row if token >= 0]] = False
    log_rest = log_p.masked_fill(~outside, -torch.inf).logsumexp(-1)
    label_log_p = None
    if labels is not None:
        label_log_p = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return SparseTargets(ids, kept, log_rest, label_log_probabilities=label_log_p, rest=rest)


def sampled_targets(logits: Tensor, draws: int, generator: torch.Generator,
                    exponent: float = 1.0) -> SparseTargets:
    """`sample`: draws from a proposal of p^exponent, importance weighted, duplicates merged.

    Ids that were not drawn are in the row too, with a weight of 0.
    """
    log_p = logits.detach().log_softmax(-1)
    proposal = (exponent * log_p).softmax(-1)
    drawn = torch.multinomial(proposal, draws, replacement=True, generator=generator)
    counts = torch.zeros_like(log_p).scatter_add_(1, drawn, torch.ones_like(log_p[:, :1])
                                                  .expand(-1, draws))
    weights = counts / draws * log_p.exp() / proposal
    ids = torch.arange(log_p.shape[1]).expand(len(log_p), -1)
    return SparseTargets(ids.masked_fill(counts == 0, -1), log_p, weights=weights)


class SparseProblem(LossProblem):
    """A LossProblem whose teacher is written down: `topk` of its logits below the vocabulary."""

    def __init__(self, k: int, rest: str = "ghost", padding: int = 0, **options) -> None:
        super().__init__(**options)
        logits = (self.teacher @ self.teacher_weight.t())[:, :self.vocab_size]
        self.targets = topk_targets(logits, k, rest, self.labels, padding)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> SparseProblem:
        """The same numbers in another dtype, on another device."""
        other = super().to(dtype, device)
        other.__class__ = SparseProblem
        return other

    def sparse(self, objective: AMiD, softcap: float | None = None, scale: float = 1.0,
               targets: SparseTargets | None = None, **options) -> LossOutput:
        """The fused loss on the targets: 0.9 of the divergence and 0.4 of the cross entropy."""
        if objective.needs_sequences:
            options["sequences"] = self.sequences
        defaults = {"labels": self.labels, "ce_weight": 0.4, "kd_weight": 0.9,
                    "vocab_size": self.vocab_size, "token_weights": self.weights}
        return linear_amid_loss(self.student, LMHead(self.weight, self.bias, softcap, scale), None,
                                None, objective, targets=targets or self.targets,
                                **{**defaults, **options})

    def student_logits(self, softcap: float | None = None, scale: float = 1.0) -> Tensor:
        """[N, V] below the vocabulary."""
        logits = scale * F.linear(self.student, self.weight, self.bias)[:, :self.vocab_size]
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    def naive_sparse(self, objective: AMiD, softcap: float | None = None,
                     scale: float = 1.0) -> Tensor:
        """The same loss by the naive twin."""
        logits, tokens = self.student_logits(softcap, scale), (self.labels, self.sequences,
                                                               self.weights > 0)
        kd, weights = naive_sparse_loss(logits, self.targets, objective, *tokens), self.weights
        if objective.token_weight is not None:
            values = naive_sparse_values(logits, self.targets, objective, *tokens)
            weights = weights * torch.tensor(values[objective.token_weight], dtype=kd.dtype)
        ce = F.cross_entropy(logits, self.labels, reduction="none")
        return (weights * (0.9 * kd + 0.4 * ce)).sum()


def with_teacher_untempered(objective: AMiD) -> AMiD:
    """The objective with the student's temperature alone."""
    return replace(objective, temperature={"student": objective.student_temperature, "teacher": 1})
