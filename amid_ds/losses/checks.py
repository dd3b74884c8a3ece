"""Checks of the losses' arguments: an error names the value, what was expected, and the remedy.

Shapes, dtypes and numbers cost nothing to check; `check_values` looks into the tensors, for which
the host waits for a GPU once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.errors import InputError
from amid_ds.losses.lm_head import LMHead
from amid_ds.losses.measures import STATISTICS
from amid_ds.losses.objective import AMiD
from amid_ds.losses.summed_head import AnyHead, SummedHead

# The label of a token without cross entropy.
IGNORE_INDEX = -100


class VocabLayout(NamedTuple):
    """This rank's columns of the vocabulary, of which the first `valid` count."""

    shard: VocabShard
    valid: int
    # The group's widest shard: it sets every rank's block size.
    widest: int
    # Ids that count, over the group.
    vocabulary: int


def check_vocabulary(rows: dict[str, int], vocab_size: int | None, shard: VocabShard | None,
                     tokens: int, device: torch.device) -> VocabLayout:
    """The layout of the vocabulary, from the number of rows or columns of each tensor by its name.

    One collective at the first call with a shard, to check it with its peers.
    """
    if vocab_size is not None and vocab_size <= 0:
        raise InputError(f"vocab_size={vocab_size}", "a number of ids above 0",
                         "leave it out to use every column")
    if shard is not None:
        widest, end = shard.agree(rows, vocab_size, tokens, device)
        end = end if vocab_size is None else vocab_size
        valid = min(max(end - shard.start, 0), shard.width)
        return VocabLayout(shard, valid, widest, end)
    widths = sorted(set(rows.values()))
    if vocab_size is None and len(widths) > 1:
        raise InputError(f"two widths of the vocabulary, {rows}", "equal widths, or a vocab_size",
                         "pass vocab_size, the number of ids that count on both sides")
    end = widths[0] if vocab_size is None else vocab_size
    if end > widths[0] or end == 0:
        raise InputError(f"a vocabulary of {end} ids and {rows}",
                         "at least one id, and rows for all of them",
                         "lower vocab_size to the number of ids that the two models share")
    return VocabLayout(VocabShard(0, end), end, end, end)


def check_logits(student: Tensor, teacher: Tensor, objective: AMiD) -> None:
    """Raise InputError unless these are logits [..., V] of the same tokens, and an AMiD that reads
    nothing else."""
    _check_objective(objective)
    if (objective.needs_sequences or "label_probability" in objective.measures
            or objective.resolved_divergence.needs_labels):
        raise InputError("an objective that reads labels or whole sequences", "logits alone",
                         "linear_amid_loss takes labels and sequences")
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        _check_float(name, logits)
        if logits.dim() == 0:
            raise InputError(f"{name} of shape {list(logits.shape)}", "[..., V]",
                             "the vocabulary is the last dimension")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(
            f"student_logits {list(student.shape)} and teacher_logits {list(teacher.shape)}",
            "the same tokens on both sides", "all dimensions but the last must be equal")


def check_linear(student_hidden: Tensor, student_head: LMHead, teacher_hidden: Tensor | None,
                 teacher_head: AnyHead | None, objective: AMiD | None, token_weights: Tensor,
                 labels: Tensor | None, ce_weight: float, kd_weight: float,
                 has_targets: bool) -> None:
    """Raise InputError for shapes, dtypes and numbers that `linear_amid_loss` cannot work with.

    has_targets: something stands in the teacher's place.
    """
    check_head_and_hidden("student", student_hidden, student_head)
    given = [x is not None for x in (teacher_hidden, teacher_head)]
    if has_targets:
        if any(given):
            raise InputError("targets beside teacher_hidden or teacher_head", "one of the two",
                             "sparse targets stand in the teacher's place: pass None for both")
        _check_objective(objective)
    elif given[0] != given[1] or (teacher_head is None and kd_weight != 0):
        hidden, head = ("given" if x else "missing" for x in given)
        raise InputError(
            f"teacher_hidden {hidden}, teacher_head {head}, kd_weight={kd_weight}",
            "both, or neither and kd_weight=0",
            "without a teacher pass kd_weight=0 and ce_weight above 0")
    if teacher_hidden is not None and teacher_head is not None:
        _check_objective(objective)
        check_head_and_hidden("teacher", teacher_hidden, teacher_head)
        if teacher_hidden.shape[0] != student_hidden.shape[0]:
            raise InputError(
                f"{student_hidden.shape[0]} tokens of the student, {teacher_hidden.shape[0]} of "
                "teacher", "the same tokens on both sides",
                "both models must have seen the same batch")
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0 <= weight < float("inf"):
            raise InputError(f"{name}={weight}", "a finite number of at least 0",
                             f"give {name} such a value")
    if ce_weight and labels is None:
        raise InputError(f"ce_weight={ce_weight} without labels", "labels [N]",
                         "pass labels, or ce_weight=0")
    if teacher_head is None and labels is None and not has_targets:
        raise InputError("neither a teacher nor labels", "one of them",
                         "there is nothing to learn from; pass one")
    for name, tensor in (("token_weights", token_weights), ("labels", labels)):
        if tensor is not None and tensor.shape != student_hidden.shape[:1]:
            raise InputError(f"{name} of shape {list(tensor.shape)}",
                             f"[N] = [{student_hidden.shape[0]}]",
                             f"one entry of {name} per row of student_hidden")
    _check_float("token_weights", token_weights)
    if labels is not None and not _is_integer(labels):
        raise InputError(f"labels of {labels.dtype}", "an integer dtype",
                         f"labels are token ids, {IGNORE_INDEX} to ignore")


def check_measures(objective: AMiD | None, tokens: int, labels: Tensor | None,
                   sequences: Tensor | None, statistics: Sequence[str]) -> None:
    """Raise InputError unless what the objective and the statistics name can be measured.

    objective: None without a teacher.
    """
    unknown = [name for name in statistics if name not in STATISTICS]
    if unknown:
        raise InputError(f"statistics {unknown}", f"some of {', '.join(STATISTICS)}",
                         "check the spelling")
    if objective is None and statistics and (labels is None
                                             or {*statistics} != {"student_entropy"}):
        raise InputError(f"statistics {list(statistics)} without a teacher",
                         "both models, or labels and the student's entropy alone",
                         "leave out statistics, or pass the teacher's hidden states and head")
    names = {*statistics, *(objective.measures if objective is not None else ())}
    if "label_probability" in names and labels is None:
        raise InputError("label_probability without labels", "labels [N]", "pass labels")
    if objective is not None and objective.resolved_divergence.needs_labels and labels is None:
        raise InputError(f"the divergence {objective.resolved_divergence.name!r} without labels",
                         "labels [N], the ids that the student has sampled", "pass labels")
    if objective is not None and objective.needs_sequences and sequences is None:
        raise InputError("an objective that reads whole sequences, without sequences",
                         "sequences [N]", "pass the number of each token's sequence")
    if sequences is not None and not (isinstance(sequences, Tensor) and _is_integer(sequences)
                                      and sequences.shape == (tokens,)):
        found = (f"{list(sequences.shape)} of {sequences.dtype}" if isinstance(sequences, Tensor)
                 else f"of type {type(sequences).__name__}")
        raise InputError(f"sequences {found}",
                         f"[N] = [{tokens}] integers", "one number per row of student_hidden")


def check_head_and_hidden(side: str, hidden: Tensor, head: AnyHead) -> None:
    """Raise InputError unless hidden [N, H] and the head's weight [V, H] and bias [V] fit.

    side: whose they are, "student" or "teacher", for the message.
    """
    if isinstance(head, SummedHead):
        widths = [each.weight.shape[-1] for each in head.heads]
        if hidden.dim() != 2 or hidden.shape[1] != sum(widths):
            raise InputError(f"{side}_hidden {list(hidden.shape)} and heads of the widths {widths}",
                             "[N, H], H the sum of the widths",
                             "give the models' hidden states side by side, in the heads' order")
        for each, part in zip(head.heads, head.parts(hidden), strict=True):
            check_head_and_hidden(side, part, each)
        return
    _check_float(f"{side}_hidden", hidden)
    _check_float(f"{side}_head's weight", head.weight)
    if hidden.dim() != 2 or head.weight.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise InputError(
            f"{side}_hidden {list(hidden.shape)} and {side}_head {list(head.weight.shape)}",
            "[N, H] and [V, H] with one H",
            "flatten batch and sequence; a head that ZeRO-3 partitions must be gathered first")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise InputError(f"{side}_head's bias {list(head.bias.shape)}",
                         f"[V] = {list(head.weight.shape[:1])}",
                         "one entry of the bias per row of the weight")
    if any(x is not None and x.dtype != hidden.dtype for x in (head.weight, head.bias)):
        raise InputError(f"{side}_hidden of {hidden.dtype} and {side}_head of {head.weight.dtype}",
                         "one dtype on a side", "cast the hidden states to the head's dtype")


def check_values(token_weights: Tensor, labels: Tensor | None, vocabulary: int) -> None:
    """Raise InputError for weights that are negative or not finite, labels outside the vocabulary.

    One synchronisation with the device.
    """
    bad_weight = ~((token_weights >= 0) & (token_weights < torch.inf))
    bad_label = torch.zeros((), dtype=torch.bool, device=token_weights.device)
    if labels is not None:
        bad_label = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocabulary))
    any_weight, any_label = torch.stack([bad_weight.any(), bad_label.any()]).tolist()
    if any_weight:
        raise InputError(f"token_weights such as {token_weights[bad_weight][0].item()}",
                         "finite weights of at least 0", "0 masks a token")
    if any_label and labels is not None:
        raise InputError(f"labels such as {labels[bad_label][0].item()}",
                         f"ids below {vocabulary}, or {IGNORE_INDEX}",
                         "check that labels and vocab_size belong to the same tokenizer")


def _check_objective(objective: object) -> None:
    if not isinstance(objective, AMiD):
        raise InputError(f"an objective of type {type(objective).__name__}", "an AMiD",
                         "e.g. AMiD(alpha=-5.0, lam=0.1)")


def _check_float(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, Tensor) and tensor.is_floating_point():
        return
    kind = tensor.dtype if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
    raise InputError(f"{name} of {kind}", "a tensor of a float dtype",
                     f"check what is passed as {name}")


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
