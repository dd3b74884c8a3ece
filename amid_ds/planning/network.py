"""Bytes that one rank receives in a step, by the collectives that it joins, and where from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from amid_ds.planning.memory import teacher_passes
from amid_ds.planning.model_costs import ModelCosts
from amid_ds.planning.rings import Ring, Shards, Traffic
from amid_ds.planning.setting import DEFAULT_REDUCE_BUCKET, Setting

# Bytes of an element of the hidden states' gradient, which the loss sums over a tensor-parallel
# group in fp32.
HIDDEN_GRADIENT_BYTES = 4

# The models whose passes follow one another in a step.
ModelName = Literal["student", "teacher"]
Traffics = dict[ModelName, dict[str, Traffic]]


def network_per_step(setting: Setting) -> dict[str, int]:
    """Bytes that one rank receives in a step, by part; and what of it comes from other nodes.

    `student_between_nodes` and `teacher_between_nodes` are contained in the other parts, and are
    the mean of a node's ranks: what its own interfaces take in, over its number of ranks.
    """
    traffic = step_traffic(setting)
    parts: dict[str, int] = {}
    for of_model in traffic.values():
        for part, each in of_model.items():
            parts[part] = parts.get(part, 0) + int(each.received)
    return parts | {f"{model}_between_nodes": int(sum_traffic(of_model.values()).between)
                    for model, of_model in traffic.items()}


def step_traffic(setting: Setting) -> Traffics:
    """What one rank receives in a step, by the model that needs it and by part."""
    student = setting.student
    traffic: Traffics = {"student": {"student_gathers": _student_gathers(setting),
                                     "student_reductions": _student_reductions(setting)}}
    teacher = setting.teacher
    if teacher is not None:
        traffic["teacher"] = {"teacher_gathers": teacher_gathers(setting, teacher)}
    if setting.tensor_parallel > 1:
        forwards = _student_forwards(setting) / setting.micro_batches
        width = int(forwards * student.tp_forward_width) + student.tp_backward_width
        traffic["student"]["tensor_parallel"] = _tensor_parallel(
            setting, width, student, student.hidden_size * HIDDEN_GRADIENT_BYTES)
        if teacher is not None:
            traffic["teacher"]["tensor_parallel"] = _tensor_parallel(
                setting, teacher.tp_forward_width, teacher)
    if student.exchanged_rows:
        # Backward takes the gradients the same ways.
        passes = _student_forwards(setting) + setting.micro_batches
        traffic["student"]["expert_exchange"] = _expert_exchange(setting, student, passes)
    if teacher is not None and teacher.exchanged_rows:
        traffic["teacher"]["expert_exchange"] = _expert_exchange(
            setting, teacher, setting.teacher_micro_batches)
    return traffic


def _student_forwards(setting: Setting) -> int:
    """Forward passes of the student's body in a step."""
    recomputed = setting.recipe.student.activation_checkpointing
    return setting.micro_batches * (2 if recomputed else 1) + setting.ahead


def sum_traffic(traffic: Iterable[Traffic]) -> Traffic:
    """The sum."""
    return sum(traffic, Traffic())


def _student_gathers(setting: Setting) -> Traffic:
    """The student's weights: after the step at stages 1 and 2, before each use at stage 3."""
    zero, student, shards = setting.zero, setting.student, setting.student_shards
    weights = student.weights.tp_rank
    if zero.stage == 0:
        return Traffic()
    if zero.stage < 3:
        return _gather(setting, student, student.trained.tp_rank, shards)
    # With a second copy each gather but the first of a step is made from that.
    again = shards if zero.secondary_ranks == 1 else setting.secondary_shards
    first = _student_gather(setting, weights, student.head, shards)
    # A trace spans the window, so weights within the distance of their next use stay gathered from
    # pass to pass.
    if weights > zero.max_reuse_distance:
        uses = 2 * setting.micro_batches + setting.ahead
        return first + _student_gather(setting, weights, student.head, again) * (uses - 1)
    # The embedding is released at the end of each backward and needed first by the next forward, so
    # it is gathered again for each micro-batch.
    exact = student.tied_embedding
    return (first + _student_gather(setting, student.embedding, exact, again)
            * (setting.micro_batches - 1))


def _student_gather(setting: Setting, elements: int, exact: int, shards: Shards) -> Traffic:
    """A gather of so many of the student's weights, of which `exact` never travel in 8 bits.

    With qwZ the others take a byte; the scales are a thousandth of them.
    """
    gather = _gather(setting, setting.student, elements, shards)
    if not setting.zero.quantizes_weights or not elements:
        return gather
    return gather.scaled((exact + (elements - exact) / setting.student.element_size) / elements)


def _student_reductions(setting: Setting) -> Traffic:
    """The student's gradients: a ring's all-reduce receives each remote byte twice, a scatter once.
    """
    student, shards, zero = setting.student, setting.student_shards, setting.zero
    as_exchanged = zero.exchange_bytes / student.element_size
    # Stage 3 scatters each micro-batch's sums, stage 2 gives them to all, and stage 3 too for Muon;
    # stages 0 and 1 do so once for the step. On CPUs torch makes a scatter of a sum for all.
    scattered = zero.stage == 3 and not student.muon.total and not setting.on_cpu
    copies = setting.micro_batches * (1 if scattered else 2) if zero.stage >= 2 else 2
    trained = student.trained
    buckets = trained.buckets(zero.reduce_bucket or DEFAULT_REDUCE_BUCKET)
    reduced = _gather(setting, replace(student, weights=trained), trained.tp_rank, shards,
                      buckets) * copies
    # Muon gathers its gradients and moments, and then what each rank made of its share of them.
    of_muon = _gather(setting, student, student.muon.total, shards) * 4
    return (reduced + of_muon).scaled(as_exchanged)


def teacher_gathers(setting: Setting, teacher: ModelCosts) -> Traffic:
    """The teacher's weights, or one of its models', gathered for each of its passes, and its head
    for the loss."""
    if not setting.teacher_is_sharded:
        return Traffic()
    shards, weights = setting.teacher_shards, teacher.weights.tp_rank
    gathers = _gather(setting, teacher, weights, shards)
    # Those within the distance of their next use stay from pass to pass; the head is gathered for
    # the loss alone.
    if weights > setting.zero.max_reuse_distance:
        body = weights - teacher.untied_head
        again = teacher_passes(setting, teacher) - 1
        gathers += _gather(setting, teacher, body, shards) * again
    if teacher.tied_embedding:
        # It is gathered twice: as the embedding for the body, then for the loss.
        gathers += _gather(setting, teacher, teacher.tied_embedding, shards)
    return gathers


def _gather(setting: Setting, model: ModelCosts, elements: int, shards: Shards,
            calls: int | None = None) -> Traffic:
    """A gather of so many of the model's weights.

    calls: the collectives that it takes; None: as many as ZeRO-3's buckets, in proportion.
    ZeRO-3 shards the weights that a tensor-parallel group shares over all ranks, the others over
    the data-parallel.
    """
    weights, zero = model.weights, setting.zero
    shared = min(weights.tp_shared, elements) if zero.stage == 3 else 0
    if calls is None:
        of_all = weights.buckets(zero.prefetch_bucket, zero.persistence_threshold)
        calls = -(-of_all * elements // max(1, weights.tp_rank))
    split = shards.split.gather((elements - shared) * model.element_size, calls)
    return split + shards.whole.gather(shared * model.element_size, 0)


def _tensor_parallel(setting: Setting, width: int, model: ModelCosts,
                     gradient_bytes: int = 0) -> Traffic:
    """The group's all-reduces of `width` elements per token of the model, in several calls.

    gradient_bytes: per token, of the hidden states' gradient. A group shares a node.
    """
    group = Ring(setting.tensor_parallel, setting.tensor_parallel)
    per_token = width * model.element_size + gradient_bytes
    once = group.gather(setting.tokens * per_token, width // model.hidden_size)
    return once * (2 * setting.micro_batches)


def _expert_exchange(setting: Setting, model: ModelCosts, passes: int) -> Traffic:
    """Tokens that travel to their experts and back, in so many passes, if experts are chosen alike.

    A group that fits a node stays there; otherwise all but a node's part of it comes from others.
    """
    group = setting.recipe.expert_parallel
    received = 2 * passes * setting.tokens * model.exchanged_rows * model.hidden_size
    inside = min(group, setting.ranks_per_node) - 1
    size = received * model.element_size
    share = inside / (group - 1)
    return Traffic(size * share, size * (1 - share))
