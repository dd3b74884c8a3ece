"""The objective for a student whose vocabulary has grown by tokens that its teacher does not know.

The student's probability of a new token is added to that of the token's first piece in the old
vocabulary, and the divergence is taken over the old ids (Linder, "KL-based self-distillation for
large language models", arXiv 2508.15807). It cannot tell a new token from its first piece; where
the next token is one of the two, cross entropy over the student's whole vocabulary says which.
README.md has what of this is the paper's and what is ours.

In blocks, as fused.py: the student's logits are folded into the old ids by a log-sum-exp of the few
columns that have new tokens, the block is a divergence like any other, and its gradient goes back
by each member's share of its column. Beside the workspace's logits of both models a block holds the
folded ones in the arithmetic's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.errors import InputError
from amid_ds.losses import checks, elementwise
from amid_ds.losses.backends import choose_backend
from amid_ds.losses.block import (
    Backend,
    Block,
    Logits,
    arithmetic_dtype,
    forward_backward_block,
    weighted_part,
)
from amid_ds.losses.blocks import slices, tokens_per_block
from amid_ds.losses.checks import IGNORE_INDEX, VocabLayout
from amid_ds.losses.divergences import LOG_ZERO
from amid_ds.losses.fused import FusedLoss, LossOutput, gets_gradient
from amid_ds.losses.lm_head import HeadGradients, LMHead, logits_workspace
from amid_ds.losses.objective import AMiD


class FirstPieces(NamedTuple):
    """The old ids that the new ones begin with.

    pieces: [k] int64, of each new id; columns: [m] the different ones; member: [k], which of these
    a new id's is.
    """

    pieces: Tensor
    columns: Tensor
    member: Tensor

    @classmethod
    def of(cls, pieces: Tensor) -> FirstPieces:
        """Those of the new ids' first pieces [k]. The host waits for a GPU: to be made once.

        Raises InputError unless these are int64.
        """
        if pieces.dim() != 1 or pieces.dtype != torch.int64 or not len(pieces):
            raise InputError(f"first pieces {list(pieces.shape)} of {pieces.dtype}",
                             "[k] int64, the old ids that the new ones begin with",
                             "pass one old id for each new one")
        return cls(pieces, *pieces.unique(return_inverse=True))


def grown_amid_loss(
    student_hidden: Tensor,            # [N, H_s]
    student_head: Tensor | LMHead,     # weight [V + k or more, H_s]
    teacher_hidden: Tensor,            # [N, H_t]
    teacher_head: Tensor | LMHead,     # weight [V or more, H_t]
    objective: AMiD,
    first_pieces: FirstPieces,         # of the ids V to V + k - 1
    *,
    token_weights: Tensor,             # [N]; 0 masks a token
    labels: Tensor,                    # [N] int, ids of the student; -100: no cross entropy here
    vocab_size: int,                   # V + k
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    backend: str = "auto",
    workspace_bytes: int | None = None,
    checked: bool = False,
    statistics: Sequence[str] = (),
) -> LossOutput:
    """Σ_i token_weights_i · (kd_weight · kd_i + ce_weight · ce_i), fused with both heads. Replaces

        pieces = first_pieces.pieces
        V = vocab_size - len(pieces)
        z = student_hidden @ W_s.T
        q = (z / τ).softmax(-1)
        folded = q[:, :V].index_add(1, pieces, q[:, V:])
        kd = the objective of folded.log() and teacher_hidden @ W_t[:V].T
        old = torch.where(labels < V, labels, pieces[labels - V])
        ce = where(isin(old, pieces), F.cross_entropy(z, labels, reduction="none"), 0)

    The statistics are of the folded student too. All else is as in `linear_amid_loss`; a cut
    vocabulary and objectives that read whole sequences are refused. No collective. Raises
    InputError (a ValueError) for shapes, dtypes and numbers that do not fit.
    """
    student, teacher = (head if isinstance(head, LMHead) else LMHead(head)
                        for head in (student_head, teacher_head))
    checks.check_linear(student_hidden, student, teacher_hidden, teacher, objective, token_weights,
                        labels, ce_weight, kd_weight, has_targets=False)
    require_foldable(objective)
    checks.check_measures(objective, len(student_hidden), labels, None, statistics)
    leaves = (student_hidden, student.weight, student.bias)
    call = _Call(student, teacher, teacher_hidden, objective,
                 _fold(first_pieces, vocab_size, student, teacher), token_weights, labels.long(),
                 float(kd_weight), float(ce_weight), checked,
                 choose_backend(backend, objective, [student_hidden, teacher_hidden],
                                VocabShard(0, vocab_size)),
                 workspace_bytes, tuple(dict.fromkeys(statistics)),
                 tuple(map(gets_gradient, leaves)))
    if not checked:
        checks.check_values(token_weights, call.labels, vocab_size)
        _check_pieces(first_pieces.pieces, call.fold.old)
    loss, kd, ce, *measured = FusedLoss.apply(*leaves, partial(_loss_and_gradients, call=call),
                                              VocabShard(0, vocab_size))
    return LossOutput(loss, kd, ce, dict(zip(call.statistics, measured, strict=True)))


def require_foldable(objective: AMiD) -> None:
    """Raise InputError for an objective that cannot be learnt over a grown vocabulary."""
    if objective.needs_sequences or objective.resolved_divergence.needs_labels:
        raise InputError("a grown vocabulary, and an objective that reads whole sequences or the "
                         "student's own samples", "one that follows from a token's distributions",
                         "choose another divergence, token_weight or measure, or a teacher with "
                         "the student's vocabulary")


class _Fold(NamedTuple):
    """Which columns of the student's are added up: `old` ids, then the new ones."""

    old: int
    first: FirstPieces

    @property
    def new(self) -> slice:
        """The columns of the new tokens."""
        return slice(self.old, self.old + len(self.first.pieces))

    def old_labels(self, labels: Tensor) -> Tensor:
        """The labels [n] as old ids; a new token is its first piece, and below 0 stays."""
        new = (labels - self.old).clamp(min=0)
        return torch.where(labels < self.old, labels, self.first.pieces[new])

    def holds(self, old_labels: Tensor) -> Tensor:
        """[n] True for an old id that is a first piece; below 0 is none."""
        is_first = torch.zeros(self.old, dtype=torch.bool, device=old_labels.device)
        is_first.index_fill_(0, self.first.columns, True)
        return (old_labels >= 0) & is_first[old_labels.clamp(min=0)]


def _fold(first_pieces: FirstPieces, vocab_size: int, student: LMHead, teacher: LMHead) -> _Fold:
    old = vocab_size - len(first_pieces.pieces)
    if old <= 0:
        raise InputError(f"vocab_size={vocab_size} and {len(first_pieces.pieces)} first pieces",
                         "old ids before the new ones", "vocab_size counts the old and the new ids")
    rows = {"student_head": (len(student.weight), vocab_size),
            "teacher_head": (len(teacher.weight), old)}
    for name, (found, needed) in rows.items():
        if found < needed:
            raise InputError(f"{name} with {found} rows of the vocabulary", f"at least {needed}",
                             "the student has a row for every id, the teacher for every old one")
    return _Fold(old, first_pieces)


def _check_pieces(pieces: Tensor, old: int) -> None:
    """One synchronisation with the device."""
    least, most = torch.stack([pieces.min(), pieces.max()]).tolist()
    if least < 0 or most >= old:
        raise InputError(f"first pieces from {least} to {most}", f"old ids, below {old}",
                         "a new token begins with a token that the teacher knows")


@dataclass(frozen=True)
class _Call:
    """A call of the loss, but for the three tensors that may get a gradient."""

    student: LMHead
    teacher: LMHead
    teacher_hidden: Tensor
    objective: AMiD
    fold: _Fold
    token_weights: Tensor
    labels: Tensor
    kd_weight: float
    ce_weight: float
    every_token: bool
    backend: Backend
    workspace_bytes: int | None
    statistics: tuple[str, ...]
    # True for each of hidden, weight and bias that gets a gradient.
    wants: tuple[bool, ...]


def _loss_and_gradients(hidden: Tensor, call: _Call) -> tuple[LossOutput, list[Tensor | None]]:
    """(the loss, [∂loss/∂hidden, ∂loss/∂weight, ∂loss/∂bias]), in the arithmetic's dtype."""
    fold, dtype = call.fold, arithmetic_dtype(hidden, call.teacher_hidden)
    vocabulary = fold.new.stop
    weights = call.token_weights.to(dtype)
    kd, ce, total_weights = (torch.zeros_like(weights) for _ in range(3))
    statistics = {name: torch.zeros_like(weights) for name in call.statistics}
    index: Tensor | range = range(len(weights))
    if not call.every_token:
        index = weights.nonzero()[:, 0]
    widths = ((call.student, vocabulary), (call.teacher, fold.old))
    size = tokens_per_block(
        len(index), VocabLayout(VocabShard(0, vocabulary), vocabulary, vocabulary, vocabulary),
        hidden.shape[1], sum(head.weight.element_size() for head, _ in widths) + dtype.itemsize,
        call.workspace_bytes, hidden.device, tiled=call.backend is elementwise)
    gradients = HeadGradients(hidden, call.student, vocabulary, dtype, call.wants,
                              single_block=len(index) <= size)
    workspaces = [logits_workspace(min(size, len(index)), width, head.weight)
                  for head, width in widths]
    for rows in slices(len(index), size):
        tokens = rows if isinstance(index, range) else index[rows]
        out = _block_loss(hidden, call, tokens, weights[tokens], workspaces, dtype)
        kd[tokens], ce[tokens], total_weights[tokens] = out.kd, out.ce, out.weights
        for name in call.statistics:
            statistics[name][tokens] = out.statistics[name]
        if out.gradient is not None:
            gradients.add(out.gradient, hidden[tokens], tokens)
    loss = weights.new_zeros(())
    for weight, part in ((call.kd_weight, kd), (call.ce_weight, ce)):
        if weight:
            loss = loss + weight * weighted_part(total_weights, part).sum()
    return LossOutput(loss, kd, ce, statistics), gradients.totals()


class _BlockResult(NamedTuple):
    """Of n tokens [n]; gradient: [n, vocabulary] of the student's logits as the product left them.
    """

    kd: Tensor
    ce: Tensor
    weights: Tensor
    statistics: dict[str, Tensor]
    gradient: Tensor | None


def _block_loss(hidden: Tensor, call: _Call, tokens: Tensor | slice, weights: Tensor,
                workspaces: list[Tensor], dtype: torch.dtype) -> _BlockResult:
    """The loss of n `tokens` of hidden [N, H_s], of these weights [n]."""
    fold, wants, shard = call.fold, any(call.wants), VocabShard(0, call.fold.old)
    student = call.student.logits(hidden[tokens], fold.new.stop, workspaces[0])
    teacher = call.teacher.logits(call.teacher_hidden[tokens], fold.old, workspaces[1])
    teacher = Logits(teacher.raw, teacher.scale, teacher.softcap,
                     call.objective.teacher_temperature)
    tempered = Logits(student.raw, student.scale, student.softcap,
                      call.objective.student_temperature)
    folded, shares = _folded(tempered, fold, dtype)
    labels = call.labels[tokens]
    old_labels = torch.where(labels == IGNORE_INDEX, -1, fold.old_labels(labels))
    block = Block(Logits(folded), teacher, None, dtype, old_labels,
                  kd_scale=weights * call.kd_weight if wants and call.kd_weight else None,
                  gradient=folded if wants and call.kd_weight else None)
    out = forward_backward_block(block, call.objective, shard, call.backend, call.statistics)
    assert out.kd is not None
    if out.factor is not None:
        weights = weights * out.factor
    of_kd = None
    if block.gradient is not None:
        of_kd = _unfolded(block.gradient, shares, tempered, fold)
    # The divergence takes a new token and its first piece for one.
    is_blind = fold.holds(old_labels)
    with_ce = wants and call.ce_weight > 0
    # Over the whole vocabulary of the student, untempered.
    alone = Block(student, None, None, dtype, torch.where(is_blind, labels, -1),
                  ce_scale=weights * call.ce_weight * is_blind if with_ce else None,
                  gradient=student.raw if with_ce else None)
    ce = forward_backward_block(alone, None, VocabShard(0, fold.new.stop), call.backend).ce
    assert ce is not None
    if not wants:
        return _BlockResult(out.kd, ce, weights, out.statistics, None)
    gradient = student.raw
    if not with_ce:
        gradient.zero_()
    if of_kd is not None:
        gradient[:, :fold.old] += of_kd[0]
        gradient[:, fold.new] += of_kd[1]
    return _BlockResult(out.kd, ce, weights, out.statistics, gradient)


def _folded(student: Logits, fold: _Fold, dtype: torch.dtype
            ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(log of the student's unnormalised mass of each old id [n, V], shares of their columns).

    The shares are those of the first pieces [n, m], and of the new tokens [n, k].
    """
    old = student.columns(slice(0, fold.old)).tempered(dtype)
    # A tensor of its own: the logits may be in the workspace.
    old = old.clone() if old.data_ptr() == student.raw.data_ptr() else old
    columns, member = fold.first.columns, fold.first.member
    first, new = old[:, columns], student.columns(fold.new).tempered(dtype)
    members = member.expand(len(new), -1)
    peak = first.scatter_reduce(1, members, new, "amax").clamp_(min=LOG_ZERO)
    total = (first - peak).exp_().scatter_add_(1, members, (new - peak[:, member]).exp_())
    total = peak + total.log_()
    old[:, columns] = total
    # Where no member has any probability, there is none to share.
    total = total.clamp(min=LOG_ZERO)
    return old, ((first - total).exp_(), (new - total[:, member]).exp_())


def _unfolded(gradient: Tensor, shares: tuple[Tensor, Tensor], student: Logits, fold: _Fold
              ) -> tuple[Tensor, Tensor]:
    """The gradient [n, V] by the folded logits, in place, as those by the student's old [n, V] and
    new [n, k] ones, as the product left them."""
    new = gradient[:, fold.first.pieces] * shares[1]
    gradient[:, fold.first.columns] *= shares[0]
    for part, columns in ((gradient, slice(0, fold.old)), (new, fold.new)):
        own = student.columns(columns)
        if student.temperature != 1:
            part /= student.temperature
        # Without a cap the logits are not looked at.
        own.chain(part, own.read(part.dtype) if own.softcap is not None else part)
    return gradient, new
