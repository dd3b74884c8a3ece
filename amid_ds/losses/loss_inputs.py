"""A call of the linear loss as a value, and the blocks of tokens that are made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amid_ds.losses.block import Backend, Block, Logits
from amid_ds.losses.checks import IGNORE_INDEX, VocabLayout
from amid_ds.losses.lm_head import LMHead
from amid_ds.losses.objective import AMiD
from amid_ds.losses.sparse import SparseTargets
from amid_ds.losses.sparse_block import BlockTargets, spread_logits
from amid_ds.losses.summed_head import AnyHead


@dataclass(frozen=True)
class LossInputs:
    """A call of the linear loss, but for the three tensors that may get a gradient."""

    teacher_hidden: Tensor | None
    student_head: LMHead
    teacher_head: AnyHead | None
    # What stands in the teacher's place, of all N tokens.
    targets: SparseTargets | None
    # None exactly if there is neither.
    objective: AMiD | None
    token_weights: Tensor
    labels: Tensor | None
    every_token: bool
    ce_weight: float
    kd_weight: float
    layout: VocabLayout
    backend: Backend
    workspace_bytes: int | None
    # True for each of hidden, weight and bias that gets a gradient.
    wants: tuple[bool, ...]
    sequences: Tensor | None
    statistics: tuple[str, ...]

    @property
    def spread(self) -> bool:
        """True if the teacher's logits are made of sparse targets."""
        return self.targets is not None and self.targets.rest == "spread"

    def workspaces(self, dtype: torch.dtype) -> list[Tensor]:
        """A tensor of the dtype of the logits of each model that a block has: the student's, and
        the teacher's if it has them."""
        like = [head.logit_like for head in (self.student_head, self.teacher_head)
                if head is not None]
        return like + ([self.token_weights.new_empty(0, dtype=dtype)] if self.spread else [])

    def targets_at(self, tokens: Tensor | slice) -> BlockTargets | None:
        """The sparse targets of a block of `tokens`."""
        if self.targets is None:
            return None
        labels = None
        if self.labels is not None:
            labels = self.labels[tokens]
            labels = labels.masked_fill(labels == IGNORE_INDEX, -1)
        return BlockTargets(self.targets.take(tokens), labels, self.layout)


def make_block(hidden: Tensor, inputs: LossInputs, tokens: Tensor | slice, weights: Tensor,
               workspaces: list[Tensor], dtype: torch.dtype) -> Block:
    """The block of n `tokens` of hidden [N, H_s], of these weights [n], its logits in
    `workspaces`."""
    layout, wants_gradient = inputs.layout, any(inputs.wants)
    student = inputs.student_head.logits(hidden[tokens], layout.valid, workspaces[0])
    teacher = labels = kd_scale = ce_scale = None
    if inputs.objective is not None:
        if inputs.teacher_head is not None:
            assert inputs.teacher_hidden is not None
            teacher = inputs.teacher_head.logits(inputs.teacher_hidden[tokens], layout.valid,
                                                 workspaces[1])
        elif inputs.spread:
            rows = inputs.targets_at(tokens)
            assert rows is not None
            teacher = Logits(spread_logits(rows, workspaces[1]))
        if teacher is not None:
            teacher = replace(teacher, temperature=inputs.objective.teacher_temperature)
        student = replace(student, temperature=inputs.objective.student_temperature)
        if wants_gradient and inputs.kd_weight:
            kd_scale = weights * inputs.kd_weight
    if inputs.labels is not None:
        ids = inputs.labels[tokens]
        labelled = ids != IGNORE_INDEX
        labels = torch.where(labelled, ids - layout.shard.start, -1)
        if wants_gradient and inputs.ce_weight:
            ce_scale = weights * inputs.ce_weight * labelled
    return Block(student, teacher, None, dtype, labels, kd_scale, ce_scale,
                 student.raw if wants_gradient else None)
