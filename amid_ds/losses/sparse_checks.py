"""What a loss on sparse targets refuses: whatever does not follow from what was written down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.errors import InputError
from amid_ds.losses import elementwise
from amid_ds.losses.block import Block, Logits, forward_backward_block
from amid_ds.losses.divergences import KL, SampledReverseKL
from amid_ds.losses.objective import AMiD
from amid_ds.losses.sparse import SparseTargets

# Statistics of a sample that are linear in p, or do not depend on the draws.
OF_A_SAMPLE = ("teacher_entropy", "divergence", "label_probability")
# What the logarithm of a probability may be above 0 by rounding.
LOG_ROUNDING = 1e-2


def check_targets(targets: SparseTargets, objective: AMiD, token_weights: Tensor, vocabulary: int,
                  statistics: Sequence[str], by_value: bool) -> None:
    """Raise InputError unless the objective and the statistics follow from these targets.

    by_value: look into those of the tokens of some weight, for which the host waits once for their
    device.
    """
    if len(targets) != len(token_weights):
        raise InputError(f"targets of {len(targets)} tokens", f"N = {len(token_weights)}",
                         "one row of targets per row of student_hidden")
    if isinstance(objective.resolved_divergence, SampledReverseKL):
        raise InputError(f"the divergence {objective.resolved_divergence.name!r} with sparse "
                         "targets", "one that is not of tokens that the student samples",
                         "preset('rkl') is its mean")
    _check_temperature(targets, objective, vocabulary)
    if targets.sampled:
        _check_linear(objective, statistics)
    elif targets.rest == "drop" and targets.ids.shape[1] < vocabulary:
        _check_finite(objective)
    if ("label_probability" in {*objective.measures, *statistics}
            and targets.label_log_probabilities is None):
        raise InputError("label_probability with targets that have no label_log_probabilities",
                         "label_log_probabilities [n]", "pass them")
    if by_value:
        _check_entries(targets, token_weights > 0, vocabulary,
                       whole=targets.rest == "ghost" and objective.teacher_temperature != 1)


def _check_temperature(targets: SparseTargets, objective: AMiD, vocabulary: int) -> None:
    """p^(1/τ), normalised, is known where each id's own p is."""
    if objective.teacher_temperature == 1:
        return
    of_each_id = targets.rest != "ghost" or targets.ids.shape[1] >= vocabulary
    if targets.sampled or not of_each_id:
        kind = "sampled weights" if targets.sampled else "rest='ghost'"
        raise InputError(f"a teacher's temperature of {objective.teacher_temperature:g} with "
                         f"{kind}", "1, of which the targets are",
                         "give the student's alone, temperature={'student': τ, 'teacher': 1}, or "
                         "take topk with rest='drop' or 'spread': a tempered sum of p is not the "
                         "sum of p tempered")


def _check_finite(objective: AMiD) -> None:
    """Under `drop` p is 0 where every student says something: one id of two that only q says."""
    if objective.per_token:
        return
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])
    block = Block(Logits(student), Logits(teacher), None, torch.float32)
    kd = forward_backward_block(block, objective, VocabShard(0, 2), elementwise).kd
    if kd is not None and kd.isinf().any():
        raise InputError(f"rest='drop' with {objective}",
                         "an objective that is finite where p is 0, as p is outside the ids",
                         "take rest='ghost': under 'drop' every token's loss would be infinite")


def _check_linear(objective: AMiD, statistics: Sequence[str]) -> None:
    """A sample is without bias only where the loss is linear in p."""
    remedy = ("preset('fkl') is forward KL, the only objective that is linear in p; for others "
              "write the teacher's topk down")
    order, = objective.order_weights[0][:1]
    ends = {"pr": objective.lam == 0 and not objective.detach_assistant, "rq": objective.lam == 1}
    if (len(objective.order_weights) > 1 or not ends.get(order) or objective.power != 1
            or not isinstance(objective.resolved_divergence, KL)):
        raise InputError(f"sampled weights for {objective}", "forward KL(p‖q): kl, with order 'pr' "
                         "at lam=0 or 'rq' at lam=1, and power 1", remedy)
    for names, allowed, use in ((objective.measures, ("label_probability",), "a number per token"),
                                (statistics, OF_A_SAMPLE, "a statistic")):
        biased = [name for name in names if name not in allowed]
        if biased:
            raise InputError(f"{use} by {', '.join(biased)} with sampled weights",
                             f"{', '.join(allowed)}", "the others are not linear in p, and biased "
                             "by a sample: leave them out, or write the teacher's topk down")


def _check_entries(targets: SparseTargets, counted: Tensor, vocabulary: int,
                   whole: bool) -> None:
    """whole: every id of the vocabulary has to be kept."""
    ids, log_p = targets.ids, targets.log_probabilities
    counts = ids >= 0
    ordered = ids.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    # A NaN is none of these.
    wrong = counts & ~(log_p <= LOG_ROUNDING)
    if targets.weights is not None:
        weights = targets.weights
        wrong |= ~((weights >= 0) & (weights < torch.inf))
        wrong |= counts & (weights > 0) & (log_p == -torch.inf)
    rest = torch.zeros_like(twice)
    if targets.log_rest is not None:
        rest = ~(targets.log_rest <= LOG_ROUNDING)
    empty = torch.zeros_like(twice)
    if targets.rest == "drop" and not targets.sampled:
        empty = ~(counts & (ids < vocabulary) & (log_p > -torch.inf)).any(1)
    missing = (counts & (ids < vocabulary)).sum(1) < (vocabulary if whole else 0)
    problems: list[tuple[str, Tensor, str]] = [
        ("an id below -1", (ids < -1).any(1), "ids of the whole vocabulary, -1 for no entry"),
        ("an id twice", twice, "each id once: add up their weights"),
        ("log_probabilities or weights that are none", wrong.any(1),
         "logarithms of probabilities, and finite weights of at least 0"),
        ("log_rest that is none", rest, "the logarithm of a probability, -inf for 0"),
        ("no id, and rest='drop'", empty, "an id of some probability below the vocabulary's end"),
        ("not every id, and the teacher a temperature", missing, "all ids, or another rest")]
    found = torch.stack([(rows & counted).any() for _, rows, _ in problems]).tolist()
    for (name, rows, expected), any_row in zip(problems, found, strict=True):
        if any_row:
            row = (rows & counted).nonzero()[0].item()
            raise InputError(f"targets whose row {row} has {name}", expected,
                             "check what wrote them down")
