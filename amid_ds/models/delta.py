"""Delta-KD: what a teacher learnt since its base, added to the student's base, as one teacher.

The student is distilled from

    p ∝ exp(z_student_base + scale · (z_teacher - z_base))

of the three frozen models' logits z: the shift of the teacher's log-probabilities since its base,
carried over. (Delta Knowledge Distillation, arXiv 2509.14526: the shift Δ that the teacher's
fine-tuning introduced is preserved, by its abstract and section 1. Its equation could not be read
here; this form is that of proxy tuning, arXiv 2401.08565. Log-probabilities in the place of the
teacher's logits give the same p: they differ by a number per token.)

So it is one teacher of three bodies and a sum of three heads (losses/summed_head.py); objectives,
blocks, placements and shards know no other. Its price is three forward passes, the hidden states
of three models, and three products a block.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from amid_ds.config.recipe import Teacher


class DeltaTeacher(nn.Module):
    """Three frozen causal LMs as one teacher. Its hidden states are theirs, side by side.

    parts: teacher, its base, the student's base; factors: of their logits, in that order. The shift
    comes first, so that a teacher that is its own base leaves the student's base to the last digit.
    """

    def __init__(self, teacher: nn.Module, base: nn.Module, student_base: nn.Module,
                 scale: float) -> None:
        super().__init__()
        self.parts = nn.ModuleList([teacher, base, student_base])
        self.factors = (scale, -scale, 1.0)


def parts_of(model: nn.Module | None) -> list[nn.Module]:
    """The causal LMs that a student or teacher is made of: itself, of a delta three, of None none.
    """
    if model is None:
        return []
    return list(model.parts) if isinstance(model, DeltaTeacher) else [model]


def joined_teacher(models: Mapping[str, nn.Module], teacher: Teacher | None) -> nn.Module | None:
    """The recipe's `teacher` as one module, from `frozen_models` as modules by their keys."""
    if teacher is None or teacher.delta is None:
        return models.get("teacher")
    return DeltaTeacher(models["teacher"], models["teacher.delta.base"],
                        models["teacher.delta.student_base"], teacher.delta.scale)
