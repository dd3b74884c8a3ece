"""Bytes that one rank receives in a step, by the collectives that it joins."""

from __future__ import annotations

from amid_ds.planning.model_costs import ModelCosts
from amid_ds.planning.setting import Setting

# Bytes of an element of the hidden states' gradient, which the loss sums over a tensor-parallel
# group in fp32.
HIDDEN_GRADIENT_BYTES = 4


def network_per_step(setting: Setting) -> dict[str, int]:
    """Bytes that one rank receives in a step, by part; `tensor_parallel` from its own node."""
    parts = {"student_gathers": _student_gather_bytes(setting),
             "student_reductions": _student_reduction_bytes(setting)}
    if setting.teacher is not None:
        parts["teacher_gathers"] = _teacher_gather_bytes(setting, setting.teacher)
    if setting.tensor_parallel > 1:
        parts["tensor_parallel"] = _tensor_parallel_bytes(setting)
    return parts


def _student_gather_bytes(setting: Setting) -> int:
    """Bytes of weights: after the step at stages 1 and 2, before each use at stage 3."""
    zero, student = setting.zero, setting.student
    weights = setting.remote_bytes(student, student.weights.tp_rank)
    if zero.stage == 0:
        return 0
    if zero.stage < 3:
        return int(weights)
    # A trace spans the window, so weights within the distance of their next use stay gathered from
    # pass to pass.
    if student.weights.tp_rank > zero.max_reuse_distance:
        return int(2 * setting.micro_batches * weights)
    # The embedding is released at the end of each backward and needed first by the next forward, so
    # it is gathered again for each micro-batch.
    embedding = (setting.micro_batches - 1) * setting.remote_bytes(student, student.embedding)
    return int(weights + embedding)


def _student_reduction_bytes(setting: Setting) -> int:
    """Bytes of gradients: a ring all-reduce receives each remote byte twice, a scatter once."""
    student = setting.student
    as_exchanged = setting.zero.exchange_bytes / student.element_size
    # Stage 3 scatters each micro-batch's sums, stage 2 gives them to all, and stage 3 too for Muon;
    # stages 0 and 1 do so once for the step.
    scattered = setting.zero.stage == 3 and not student.muon.total
    copies = setting.micro_batches * (1 if scattered else 2) if setting.zero.stage >= 2 else 2
    # Muon gathers its gradients and moments, and then what each rank made of its share of them.
    of_muon = 4 * setting.remote_bytes(student, student.muon.total)
    reduced = copies * setting.remote_bytes(student, student.weights.tp_rank)
    return int((reduced + of_muon) * as_exchanged)


def _teacher_gather_bytes(setting: Setting, teacher: ModelCosts) -> int:
    """Bytes of the teacher's weights, gathered once for the step."""
    if not setting.teacher_is_sharded:
        return 0
    # A tied head is gathered twice: as the embedding for the body, then for the loss.
    again = setting.remote_bytes(teacher, teacher.embedding) if teacher.head_is_tied else 0
    return int(setting.remote_bytes(teacher, teacher.weights.tp_rank) + again)


def _tensor_parallel_bytes(setting: Setting) -> int:
    """Bytes of the group's all-reduces: layers' outputs in forward, their inputs in backward."""
    student, teacher, tp = setting.student, setting.teacher, setting.tensor_parallel
    forwards = 2 if setting.recipe.student.activation_checkpointing else 1
    summed = forwards * student.tp_forward_width + student.tp_backward_width
    per_token = summed * student.element_size + student.hidden_size * HIDDEN_GRADIENT_BYTES
    if teacher is not None:
        per_token += teacher.tp_forward_width * teacher.element_size
    return int(setting.micro_batches * setting.tokens * per_token * 2 * (1 - 1 / tp))
