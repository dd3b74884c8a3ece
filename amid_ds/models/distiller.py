"""Student and frozen teacher as one nn.Module, so that one DeepSpeed engine shards and runs both.

Both bodies end in hidden states; logits are never made, and no hidden state is kept of a token that
the loss masks. The teacher runs over the whole accumulation window before the student's first
micro-batch (`teacher_hidden_states`), so its weights are gathered once per pass and not once per
micro-batch; then `forward` turns one micro-batch into the loss through the fused head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from amid_ds.data.batch import Batch, Documents
from amid_ds.distributed.transfer import to_device
from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses import (
    AMiD,
    AnyHead,
    FirstPieces,
    LMHead,
    SparseTargets,
    grown_amid_loss,
    linear_amid_loss,
    linear_argmax,
    preset,
)
from amid_ds.models.heads import any_head_of, head_input, run_body, sharded_head_of
from amid_ds.models.router_loss import Routers
from amid_ds.monitor.step_timer import phase


@dataclass(frozen=True)
class StepObjective:
    """The loss of one optimizer step: kd_weight · divergence + ce_weight · cross entropy.

    statistics: what to tell of the tokens beside it, as `linear_amid_loss` has them.
    """

    amid: AMiD
    kd_weight: float
    ce_weight: float
    statistics: tuple[str, ...] = ()


class LossPart(NamedTuple):
    """The tokens of a micro-batch that have one objective.

    tokens: [k] int64, which of its n labelled tokens they are; None: all.
    """

    objective: StepObjective
    tokens: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        """By the values: so DeepSpeed compares what tensor-parallel peers are first called with."""
        if not isinstance(other, LossPart) or self.objective != other.objective:
            return False
        if self.tokens is None or other.tokens is None:
            return self.tokens is other.tokens
        return torch.equal(self.tokens.cpu(), other.tokens.cpu())

    def to(self, device: torch.device | str) -> LossPart:
        """A copy on `device`, which nothing waits for."""
        return self if self.tokens is None else self._replace(tokens=to_device(self.tokens, device))

    def take(self, rows: Tensor | None) -> Tensor | None:
        """The part's rows [k, ...] of [n, ...]; None of None."""
        return rows if rows is None or self.tokens is None else rows.index_select(0, self.tokens)


@dataclass(frozen=True)
class StepObjectives:
    """The losses of one optimizer step, by the origin of the tokens.

    base: of the data's; by_source: of each source of data.train, {} where all have the base's;
    sampled: of the student's own words.
    """

    base: StepObjective
    sampled: StepObjective
    by_source: Mapping[int, StepObjective] = field(default_factory=dict)

    def of_step(self, sampled: bool) -> list[StepObjective]:
        """Those that the tokens of a step may have, whatever rows it reads: on all ranks alike."""
        if sampled:
            return [self.sampled]
        return list(self.by_source.values()) or [self.base]

    def parts(self, batch: Batch, sampled: bool) -> list[LossPart]:
        """The batch's tokens by objective, one part at least. On the host, as the batch is."""
        objectives = self.of_step(sampled)
        if len(objectives) == 1 or not len(batch.valid):
            return [LossPart(objectives[0])]
        sources = batch.source_numbers.numpy()
        # Sources by the first one that is learnt from alike.
        alike: dict[int, list[int]] = {}
        for source in np.unique(sources).tolist():
            alike.setdefault(objectives.index(self.by_source[source]), []).append(source)
        if len(alike) == 1:
            return [LossPart(objectives[next(iter(alike))])]
        return [LossPart(objectives[first], torch.from_numpy(np.flatnonzero(np.isin(sources, own))))
                for first, own in alike.items()]


class MicroBatchLoss(NamedTuple):
    """Scalars of one micro-batch: weighted loss (with gradient), divergence and cross entropy.

    tokens: [n, 2], the divergence and cross entropy of each token, as far as they count.
    statistics: [m], weighted sums of the objective's; 0 of what needs the teacher, without it.
    routers: [2] float64, of a mixture its part of the load-balancing and the z-loss, without their
    weights, with which the loss has them.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    tokens: Tensor
    statistics: Tensor
    routers: Tensor | None = None


class FusedHead(nn.Module):
    """The student's head and the loss in one forward.

    It is a module because ZeRO-3 gathers by module: the student's head is registered with it
    (engine/build.py), so the hooks gather the weight when the loss reads it, in forward, and when
    its gradient arrives, in backward. The heads belong to the two models; held in a plain function
    they appear in no state dict twice. first_pieces: [k] of a student whose last k ids the teacher
    does not know, their first old ids (losses/grown.py).
    """

    def __init__(self, heads: Callable[[], tuple[LMHead, AnyHead | None]], vocab_size: int,
                 shard: VocabShard | None, first_pieces: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.vocab_size, self.shard = heads, vocab_size, shard
        self.grown = first_pieces is not None
        if first_pieces is not None:
            for name, tensor in FirstPieces.of(first_pieces)._asdict().items():
                self.register_buffer(name, tensor, persistent=False)

    @property
    def first_pieces(self) -> FirstPieces | None:
        """Of the new ids, on the head's device; None where the vocabulary has not grown."""
        if not self.grown:
            return None
        return FirstPieces(*(self.get_buffer(name) for name in FirstPieces._fields))

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor,
                token_weights: Tensor, sequences: Tensor | None = None, *,
                parts: Sequence[LossPart], targets: SparseTargets | None = None) -> MicroBatchLoss:
        """The loss of n tokens, each of which is in one of the `parts`.

        student_hidden [n, H_s], teacher_hidden [n, H_t] or, from a cache, `targets` of n tokens
        (neither: cross entropy alone), labels [n] below `vocab_size`, token_weights [n] above 0,
        sequences [n], where an objective asks for them. None is looked at: the host does not wait
        for a GPU. The collectives are those of `linear_amid_loss` for each part; the heads are
        gathered once, whatever the parts.
        """
        heads = self.heads()
        with phase("loss"):
            losses = [self._part_loss(part, heads, targets, student_hidden, teacher_hidden,
                                      labels, token_weights, sequences) for part in parts]
        if len(losses) == 1:
            return losses[0]
        tokens = losses[0].tokens.new_empty(len(labels), 2)
        for part, own in zip(parts, losses, strict=True):
            assert part.tokens is not None
            tokens.index_copy_(0, part.tokens, own.tokens)
        loss, kd, ce = (torch.stack(same).sum() for same in
                        zip(*((own.loss, own.kd, own.ce) for own in losses), strict=True))
        return MicroBatchLoss(loss, kd, ce, tokens,
                              torch.stack([own.statistics for own in losses]).sum(0))

    def _part_loss(self, part: LossPart, heads: tuple[LMHead, AnyHead | None],
                   targets: SparseTargets | None, *rows: Tensor | None) -> MicroBatchLoss:
        """The loss of the part's tokens. targets, rows: of all n, in the order of `forward`."""
        student_hidden, teacher_hidden, labels, token_weights, sequences = map(part.take, rows)
        assert student_hidden is not None and token_weights is not None
        objective, (student_head, teacher_head) = part.objective, heads
        if teacher_hidden is None:
            teacher_head = None
        if targets is not None and part.tokens is not None:
            targets = targets.take(part.tokens)
        has_teacher = teacher_hidden is not None or targets is not None
        weights = (objective.kd_weight if has_teacher else 0.0, objective.ce_weight)
        statistics = [name for name in objective.statistics
                      if has_teacher or name == "student_entropy"]
        first_pieces = self.first_pieces
        if first_pieces is not None and teacher_hidden is not None:
            assert isinstance(teacher_head, LMHead) and labels is not None
            out = grown_amid_loss(
                student_hidden, student_head, teacher_hidden, teacher_head, objective.amid,
                first_pieces, token_weights=token_weights, labels=labels,
                kd_weight=weights[0], ce_weight=weights[1], vocab_size=self.vocab_size,
                checked=True, statistics=statistics)
        else:
            out = linear_amid_loss(
                student_hidden, student_head, teacher_hidden, teacher_head, objective.amid,
                token_weights=token_weights, labels=labels, kd_weight=weights[0],
                ce_weight=weights[1], vocab_size=self.vocab_size, shard=self.shard, checked=True,
                sequences=sequences, statistics=statistics, targets=targets)
        kd, ce = (out.loss.new_zeros(()) if values is None else (token_weights * values).sum()
                  for values in (out.kd, out.ce))
        tokens = [torch.zeros_like(token_weights) if values is None or not weight else values
                  for values, weight in zip((out.kd, out.ce), weights, strict=True)]
        sums = out.loss.new_zeros(len(objective.statistics))
        for name in statistics:
            sums[objective.statistics.index(name)] = (token_weights * out.statistics[name]).sum()
        return MicroBatchLoss(out.loss, kd, ce, torch.stack(tokens, -1), sums)


class Distiller(nn.Module):
    """{student, teacher}. Only the student trains; the teacher always stays in eval mode.

    replicated: every rank holds the teacher whole. It is then an attribute and no submodule, so
    that the engine neither shards, casts nor saves it. cached: there is no teacher here, and each
    micro-batch brings what a cache holds of one. first_pieces: see FusedHead. routers: of a student
    that is a mixture.
    """

    teacher: nn.Module | None

    def __init__(self, student: nn.Module, teacher: nn.Module | None, *, vocab_size: int,
                 shard: VocabShard | None = None, replicated: bool = False,
                 cached: bool = False, first_pieces: Tensor | None = None,
                 routers: Routers | None = None) -> None:
        super().__init__()
        assert teacher is None or not cached
        self.student, self.cached, self.routers = student, cached, routers
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        if replicated:
            self.__dict__["teacher"] = teacher
        else:
            self.teacher = teacher
        self.head = FusedHead(
            lambda: (sharded_head_of(student, shard),
                     any_head_of(teacher, shard) if teacher is not None else None),
            vocab_size, shard, first_pieces)

    def train(self, mode: bool = True) -> Distiller:
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def uses_teacher(self, objectives: Iterable[StepObjective]) -> bool:
        """True where a step with these objectives learns from the teacher, here or cached."""
        return (self.teacher is not None or self.cached) and any(
            own.kd_weight > 0 or own.amid.token_weight is not None for own in objectives)

    @torch.no_grad()
    def teacher_hidden_states(self, batches: Sequence[Batch], micro_batches_per_pass: int,
                              on_host: bool = False) -> list[Tensor]:
        """The teacher's hidden states [n_i, H_t] at the n_i valid tokens of every micro-batch.

        `micro_batches_per_pass` of them share a forward call. It must be the same on every rank:
        each call gathers the teacher's weights, and lengths differ between ranks. on_host: the
        states wait in pinned host memory instead of on the device.
        """
        assert self.teacher is not None
        hidden: list[Tensor] = []
        for start in range(0, len(batches), micro_batches_per_pass):
            group = [batch.as_teacher_reads
                     for batch in batches[start:start + micro_batches_per_pass]]
            inputs = [batch.input_ids for batch in group]
            longest = max(ids.shape[1] for ids in inputs)
            # Padding on the right: a causal model's earlier positions never see it.
            padded = torch.cat(
                [nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids in inputs])
            positions = _padded_positions([batch.positions for batch in group], inputs)
            states = run_body(self.teacher, padded, positions, _all_documents(group))
            for batch, part in zip(group, states.split([len(ids) for ids in inputs]), strict=True):
                valid = _rows(part[:, :batch.labels.shape[1]], batch.valid)
                hidden.append(_to_pinned_host(valid) if on_host else valid)
        return hidden

    def forward(self, input_ids: Tensor, valid: Tensor, labels: Tensor, token_weights: Tensor,
                teacher_hidden: Tensor | None, positions: Tensor | None = None,
                sequences: Tensor | None = None, *, parts: Sequence[LossPart],
                documents: Documents | None = None, targets: SparseTargets | None = None,
                real: Tensor | None = None) -> MicroBatchLoss:
        """One micro-batch's loss.

        input_ids [B, L]; valid [n], the places of its labelled tokens in B · L; their labels and
        token_weights [n] (fp32); teacher_hidden: its part of `teacher_hidden_states`; positions
        [B, L] and documents as `run_body` has them; sequences [n], parts and targets as the head
        has them. Without teacher_hidden and targets: cross entropy alone. real: of the routers, see
        `Routers.watched`; None: they count for nothing.
        """
        watched = (contextlib.nullcontext(()) if self.routers is None or real is None
                   else self.routers.watched(self.student, real))
        with watched as of_routers:
            states = run_body(self.student, input_ids, positions, documents)
        hidden = head_input(self.student, _rows(states, valid))
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden.to(hidden.device, non_blocking=True)
        loss: MicroBatchLoss = self.head(hidden, teacher_hidden, labels, token_weights, sequences,
                                         parts=parts, targets=targets)
        if of_routers:
            loss = loss._replace(loss=loss.loss + of_routers[0], routers=of_routers[1])
        return loss

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Both models' hidden states [n, H_s] and [n, H_t] at the n labelled tokens of a batch, as
        their heads take them."""
        teacher, student = (
            None if model is None else
            _rows(run_body(model, rows.input_ids, rows.positions, rows.documents), rows.valid)
            for model, rows in ((self.teacher, batch.as_teacher_reads), (self.student, batch)))
        assert student is not None
        return head_input(self.student, student), teacher

    @torch.no_grad()
    def score(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """Sums [4] float64 over n tokens with these labels [n] and `hidden_states`.

        They are: negative log-likelihood, KL(teacher ‖ student), tokens where both have the same
        first choice, tokens. Both heads must be gathered.
        """
        student_head, teacher_head = self.head.heads()
        vocab_size, shard = self.head.vocab_size, self.head.shard
        options: Any = {"labels": labels, "vocab_size": vocab_size, "checked": True,
                        "token_weights": torch.ones(len(labels), device=student.device)}
        first_pieces = self.head.first_pieces
        teaches = teacher is not None and first_pieces is None
        out = linear_amid_loss(student, student_head, *((teacher, teacher_head) if teaches else
                                                        (None, None)), preset("fkl"), shard=shard,
                               ce_weight=1.0, kd_weight=1.0 if teaches else 0.0, **options)
        assert out.ce is not None
        sums = torch.zeros(4, dtype=torch.float64, device=student.device)
        sums[0], sums[3] = out.ce.double().sum(), len(labels)
        if teacher is None or teacher_head is None:
            return sums
        kd, known = out.kd, vocab_size
        if first_pieces is not None:
            assert isinstance(teacher_head, LMHead), "a delta has one vocabulary"
            known = vocab_size - len(first_pieces.pieces)
            kd = grown_amid_loss(student, student_head, teacher, teacher_head, preset("fkl"),
                                 first_pieces, **options).kd
        first, second = (linear_argmax(hidden, head, vocab_size=size, shard=shard)
                         for hidden, head, size in ((student, student_head, vocab_size),
                                                    (teacher, teacher_head, known)))
        if first_pieces is not None:
            # A new token is its first piece.
            first = torch.where(first < known, first,
                                first_pieces.pieces[(first - known).clamp(min=0)])
        assert kd is not None
        sums[1], sums[2] = kd.double().sum(), (first == second).sum()
        return sums


def _rows(states: Tensor, valid: Tensor) -> Tensor:
    """states [B, L, H] -> [n, H], at the places `valid` [n] of B · L.

    By an index that the host has made, not by a mask: a GPU would have to be waited for to know n.
    Its backward adds each row once to zeros, so it is exact in any order.
    """
    return states.flatten(0, 1).index_select(0, valid)


def _to_pinned_host(states: Tensor) -> Tensor:
    """A copy in pinned host memory, made in the device's stream: nothing waits for it."""
    return torch.empty_like(states, device="cpu", pin_memory=True).copy_(states, non_blocking=True)


def _padded_positions(positions: Sequence[Tensor | None],
                      inputs: Sequence[Tensor]) -> Tensor | None:
    """The positions of micro-batches [B_i, L_i] stacked, padded on the right like their inputs."""
    if all(own is None for own in positions):
        return None
    every = torch.arange(max(ids.shape[1] for ids in inputs), device=inputs[0].device)
    padded = [every.expand(len(ids), -1).clone() for ids in inputs]
    for rows, own in zip(padded, positions, strict=True):
        if own is not None:
            rows[:, :own.shape[1]] = own
    return torch.cat(padded)


def _all_documents(batches: Sequence[Batch]) -> Documents | None:
    """The documents of the micro-batches' rows together; None where one batch does not know them.
    """
    known = [batch.documents for batch in batches if batch.documents is not None]
    if len(known) < len(batches):
        return None
    return Documents(tuple(starts for documents in known for starts in documents.starts))
