"""Student and frozen teacher as one nn.Module, so that one DeepSpeed engine shards, gathers and runs both.

Both bodies leave hidden states; logits are never made, and of tokens that the loss masks no hidden state is kept. The
teacher runs over the whole accumulation window before the student's first micro-batch (`teach`), so its weights are
gathered once per pass and not once per micro-batch; then `forward` turns one micro-batch into the loss through the
fused head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amid_ds.data import Batch
from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses import AMiD, LMHead, linear_amid_loss, linear_argmax, preset
from amid_ds.losses.fused import IGNORE_INDEX
from amid_ds.models.heads import (
    run_body,
    sharded_head_of,
)
from amid_ds.monitor.step_timer import phase


class FusedHead(nn.Module):
    """The student's head and the loss in one forward.

    It is a module because ZeRO-3 gathers by module: the student's head is registered with it (engine.py), so the hooks
    gather the weight when the loss reads it, in forward, and when its gradient arrives, in backward. The heads belong
    to the two models; held in a plain function they appear in no state dict twice.
    """

    def __init__(self, heads: Callable[[], tuple[LMHead, LMHead | None]], objective: AMiD, kd_weight: float,
                 ce_weight: float, vocab_size: int, shard: VocabShard | None) -> None:
        super().__init__()
        self.heads, self.objective, self.vocab_size, self.shard = heads, objective, vocab_size, shard
        self.kd_weight, self.ce_weight = kd_weight, ce_weight

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor, token_weights: Tensor,
                ce_weight: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        student_head, teacher_head = self.heads()
        taught = teacher_hidden is not None      # else plain cross entropy, and there is no divergence to report
        with phase("loss"):
            out = linear_amid_loss(student_hidden, student_head, teacher_hidden, teacher_head if taught else None,
                                   self.objective, token_weights=token_weights, labels=labels,
                                   kd_weight=self.kd_weight if taught else 0.0,
                                   ce_weight=self.ce_weight if ce_weight is None else ce_weight,
                                   vocab_size=self.vocab_size, shard=self.shard)
        kd, ce = (out.loss.new_zeros(()) if part is None else (token_weights * part).sum() for part in (out.kd, out.ce))
        return out.loss, kd, ce


class Distiller(nn.Module):
    """{student, teacher}. Only the student trains; the teacher stays in eval mode whatever `train()` says.

    `apart`: every rank holds the teacher whole. It is then an attribute and no submodule, so that the engine neither
    shards, casts nor saves it.
    """

    teacher: nn.Module | None

    def __init__(self, student: nn.Module, teacher: nn.Module | None, objective: AMiD, *, kd_weight: float,
                 ce_weight: float, vocab_size: int, shard: VocabShard | None = None, apart: bool = False) -> None:
        super().__init__()
        self.student = student
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        if apart:
            self.__dict__["teacher"] = teacher
        else:
            self.teacher = teacher
        self.wait_on_host = False      # hidden states between `teach` and the loss: in pinned memory, or on the device
        self.head = FusedHead(
            lambda: (sharded_head_of(student, shard), sharded_head_of(teacher, shard) if teacher is not None else None),
            objective, kd_weight, ce_weight, vocab_size, shard)

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def pursue(self, objective: AMiD, kd_weight: float, ce_weight: float) -> None:
        """From now on this is what is minimised; the same on every rank."""
        self.head.kd_weight = kd_weight
        self.head.objective, self.head.ce_weight = objective, ce_weight

    @property
    def has_lesson(self) -> bool:
        """Whether a step needs the teacher at all."""
        return self.teacher is not None and self.head.kd_weight > 0

    @torch.no_grad()
    def teach(self, batches: Sequence[Batch], rows_per_pass: int) -> list[Tensor | None]:
        """The teacher's hidden states [n_i, H_t] at the n_i valid tokens of every micro-batch of the window.

        `rows_per_pass` micro-batches share a forward call. It must be the same on every rank: each call gathers the
        teacher's weights, and lengths differ between ranks.
        """
        if self.teacher is None or not self.has_lesson:
            return [None] * len(batches)
        hidden: list[Tensor | None] = []
        for start in range(0, len(batches), rows_per_pass):
            group = batches[start:start + rows_per_pass]
            inputs = [batch.input_ids for batch in group]
            longest = max(ids.shape[1] for ids in inputs)
            # Padding on the right: a causal model's earlier positions never see it.
            padded = torch.cat([nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids in inputs])
            states = run_body(self.teacher, padded, _padded_positions([batch.positions for batch in group], inputs))
            for batch, part in zip(group, states.split([len(ids) for ids in inputs]), strict=True):
                hidden.append(self._put_aside(part[:, :batch.labels.shape[1]][batch.labels != IGNORE_INDEX]))
        return hidden

    def _put_aside(self, states: Tensor) -> Tensor:
        """Where `states` wait. Copies follow in the order of the device's stream, so nothing waits for them here."""
        if not self.wait_on_host:
            return states
        return torch.empty_like(states, device="cpu", pin_memory=True).copy_(states, non_blocking=True)

    def forward(self, input_ids: Tensor, labels: Tensor, token_weights: Tensor, teacher_hidden: Tensor | None,
                positions: Tensor | None = None, ce_weight: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One micro-batch: input_ids, labels [B, L] (shifted, -100 ignored), token_weights [B, L] fp32, `teach`'s part
        of it, positions as `run_body` has them, another weight of the cross entropy than the run's.

        Returns three scalars: the weighted loss (with gradient), the weighted divergence and cross entropy.
        """
        hidden = run_body(self.student, input_ids, positions)
        keep = labels != IGNORE_INDEX
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden.to(hidden.device, non_blocking=True)
        return self.head(hidden[keep], teacher_hidden, labels[keep], token_weights[keep], ce_weight)

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both models' hidden states [B · L, H_s] and [B · L, H_t] of one batch, to be scored."""
        teacher = None if self.teacher is None else run_body(self.teacher, input_ids, positions).flatten(0, 1)
        return run_body(self.student, input_ids, positions).flatten(0, 1), teacher

    @torch.no_grad()
    def score(self, student_hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor) -> Tensor:
        """[4] float64 sums over the labelled tokens: negative log-likelihood, KL(teacher ‖ student), tokens where both
        have the same first choice, tokens. Both heads must be gathered. labels [B, L]."""
        keep = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
        student, target = student_hidden[keep], labels.flatten()[keep]
        teacher = None if teacher_hidden is None else teacher_hidden[keep]
        student_head, teacher_head = self.head.heads()
        common: Any = {"vocab_size": self.head.vocab_size, "shard": self.head.shard}
        out = linear_amid_loss(student, student_head, teacher, teacher_head, preset("fkl"), labels=target,
                               token_weights=torch.ones(len(keep), device=student.device), ce_weight=1.0,
                               kd_weight=0.0 if teacher is None else 1.0, **common)
        assert out.ce is not None
        sums = torch.zeros(4, dtype=torch.float64, device=student.device)
        sums[0], sums[3] = out.ce.double().sum(), len(keep)
        if out.kd is not None and teacher is not None and teacher_head is not None:
            same = linear_argmax(student, student_head, **common) == linear_argmax(teacher, teacher_head, **common)
            sums[1], sums[2] = out.kd.double().sum(), same.sum()
        return sums


def _padded_positions(positions: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
    """The positions of micro-batches [B_i, L_i] on top of one another, padded on the right like their inputs."""
    if all(places is None for places in positions):
        return None
    every = torch.arange(max(ids.shape[1] for ids in inputs), device=inputs[0].device)
    padded = [every.expand(len(ids), -1).clone() for ids in inputs]
    for rows, places in zip(padded, positions, strict=True):
        if places is not None:
            rows[:, :places.shape[1]] = places
    return torch.cat(padded)
