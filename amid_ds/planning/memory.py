"""Bytes of one rank: model states, which stay from step to step, and a step's working memory."""

from __future__ import annotations

import torch

from amid_ds.engine.ema import mean_decays
from amid_ds.losses import default_workspace_bytes
from amid_ds.losses.blocks import row_stride
from amid_ds.losses.tiles import tiling
from amid_ds.models.sizes import default_teacher_tokens, teacher_memory_budget
from amid_ds.planning.devices import HEADROOM
from amid_ds.planning.model_costs import ModelCosts
from amid_ds.planning.setting import Setting, ZeroSettings, partitioned

# Bytes per element: Adam's two moments in fp32, and an fp32 or bf16 weight or gradient.
ADAM_BYTES = 8
FP32_BYTES = 4
BF16_BYTES = 2
# Held per token at the peak of a teacher's layer: the residual stream and its norm; gate, up and
# their product.
TEACHER_HIDDEN_TENSORS = 2
TEACHER_INTERMEDIATE_TENSORS = 3


def memory_per_rank(setting: Setting) -> dict[str, int]:
    """Bytes of one rank by part, and their `total`."""
    parts = {**state_bytes(setting), **student_step_bytes(setting)}
    if setting.teacher is not None:
        parts |= teacher_step_bytes(setting, setting.teacher, parts)
    if setting.target_bytes:
        # Of the whole window: they come to the device with its rows.
        parts["teacher_targets"] = setting.teacher_tokens * setting.target_bytes
    return {**parts, "total": sum(parts.values())}


def fits(setting: Setting, memory: dict[str, int]) -> bool:
    """True where the device holds what `memory_per_rank` counts, with room to spare."""
    return memory["total"] <= HEADROOM * setting.device.memory


def free_bytes(setting: Setting) -> float:
    """Bytes of the device beside the states, by which the teacher's passes are cut."""
    return setting.device.memory - sum(state_bytes(setting).values())


def state_bytes(setting: Setting) -> dict[str, int]:
    """Bytes by part that a rank's device holds from the first step to the last."""
    zero, student, teacher = setting.zero, setting.student, setting.teacher
    whole = student.weights.tp_rank
    weights = setting.student_partition(student.weights) if zero.stage == 3 else whole
    optimizer = _optimizer_elements(setting)
    # Without ZeRO, fp32 weights are their own masters.
    master_bytes = FP32_BYTES if zero.stage or student.element_size == BF16_BYTES else 0
    parts = {
        "student_weights": 0 if zero.offloads_weights else weights * student.element_size,
        "gradients": _gradient_bytes(setting),
        "optimizer": 0 if zero.offloads_optimizer else (
            optimizer * master_bytes
            + moment_bytes(zero, optimizer, setting.student_partition(student.muon)))}
    if means := len(mean_decays(setting.recipe)):
        parts["means"] = 0 if zero.offloads_optimizer else means * optimizer * FP32_BYTES
    if zero.secondary_ranks > 1:
        # Gathers are made from it, wherever the first copy lies.
        secondary = student.weights.partition(zero.secondary_ranks, 1)
        parts["student_secondary"] = secondary * student.element_size
    if teacher is not None:
        parts["teacher_weights"] = teacher_weight_bytes(setting, teacher)
    return parts


def _gradient_bytes(setting: Setting) -> int:
    """Bytes of the gradients that wait for the optimizer."""
    zero = setting.zero
    element_size = FP32_BYTES if zero.gradients_in_fp32 else BF16_BYTES
    # At stage 2 DeepSpeed adds fp32 gradients of a bf16 model up on the device all the same.
    on_host = zero.offloads_optimizer and not (
        zero.stage == 2 and zero.bf16 and zero.gradients_in_fp32)
    if on_host:
        return 0
    # Stage 1 adds the micro-batches' gradients up before it reduces them.
    are_split = zero.stage >= 2 or (zero.stage == 1 and setting.micro_batches == 1)
    elements = _optimizer_elements(setting) if are_split else setting.student.trained.tp_rank
    return elements * element_size


def moment_bytes(zero: ZeroSettings, elements: int, of_muon: int) -> int:
    """Bytes of the moments of `elements` weights, of which Muon steps `of_muon`.

    AdamW has two in fp32, Muon one in the dtype in which ranks exchange gradients.
    """
    return (elements - of_muon) * ADAM_BYTES + of_muon * zero.exchange_bytes


def _optimizer_elements(setting: Setting) -> int:
    """Elements that this rank's optimizer updates."""
    weights = setting.student.trained
    if setting.zero.stage == 3:
        return setting.student_partition(weights)
    if setting.zero.stage:
        return -(-weights.tp_rank // setting.data_parallel)
    return weights.tp_rank


def teacher_weight_bytes(setting: Setting, teacher: ModelCosts) -> int:
    """Bytes of the weights of `teacher`, or of one of its models, on this rank's device."""
    if not setting.teacher_is_sharded:
        return teacher.weights.tp_rank * teacher.element_size
    if setting.zero.offloads_weights:
        return 0
    elements = teacher.weights.partition(setting.teacher_groups, setting.group)
    return elements * teacher.element_size


def student_step_bytes(setting: Setting) -> dict[str, int]:
    """Bytes by part that the student's forward, loss and backward need."""
    kept, recomputed = setting.activation_bytes
    gathered = _gathered_bytes(setting)
    # Weights that a pass ahead has left gathered are there before anything is kept for backward.
    stays = setting.ahead and setting.student.weights.tp_rank <= setting.zero.max_reuse_distance
    return {
        "activations": kept,
        "recomputed_layer": recomputed,
        "gathered": gathered,
        # A gather fills a buffer first.
        "gather_buffers": 0 if stays else gathered,
        "reduce_bucket": _reduce_bucket_bytes(setting),
        "loss_workspace": _loss_bytes(setting)}


def _gathered_bytes(setting: Setting) -> int:
    """Bytes of the student's weights that ZeRO-3 has gathered at once."""
    if setting.zero.stage != 3:
        return 0
    student = setting.student
    most = setting.zero.max_live + student.largest_gather
    return min(partitioned(student, setting.student_shards), most) * student.element_size


def _reduce_bucket_bytes(setting: Setting) -> int:
    zero, student = setting.zero, setting.student
    elements = zero.reduce_bucket
    # With contiguous gradients DeepSpeed allocates the whole bucket for the smallest model too.
    if not zero.contiguous_gradients:
        elements = min(elements, student.trained.tp_rank)
    elif zero.stage in (1, 2) and zero.overlaps_communication:
        elements *= 2
    return elements * (FP32_BYTES if zero.stage == 1 else student.element_size)


def _loss_bytes(setting: Setting) -> int:
    """Bytes of the fused loss: its workspace, the gradients of the head and the hidden states."""
    student, teacher, tokens = setting.student, setting.teacher, setting.tokens
    logit_bytes = student.element_size + (teacher.logit_size if teacher is not None else 0)
    on_cpu = setting.on_cpu
    row = row_stride(student.head // student.hidden_size, "cpu" if on_cpu else "cuda")
    logits = tokens * row * logit_bytes
    # On a GPU the kernels need nothing beside the logits.
    tile_bytes = tiling(torch.device("cpu"))[0] if on_cpu else 0
    most = default_workspace_bytes(None if on_cpu else setting.device.memory)
    workspace = min(most, logits + tile_bytes)
    # Both gradients are made in fp32, then given in the weights' dtype; the head's is bf16 from the
    # start if there is one block.
    in_bf16 = student.element_size == BF16_BYTES
    gradient_bytes = FP32_BYTES + (BF16_BYTES if in_bf16 else 0)
    in_one_block = logits + tile_bytes <= most
    head_bytes = BF16_BYTES if in_bf16 and in_one_block else gradient_bytes
    of_head = student.head * head_bytes * setting.losses_at_once if student.head_is_trained else 0
    if student.head_is_copied:
        of_head += student.head * student.element_size
    of_hidden = tokens * student.hidden_size * gradient_bytes if student.body_is_trained else 0
    return workspace + of_head + of_hidden


def teacher_step_bytes(setting: Setting, teacher: ModelCosts,
                       student_parts: dict[str, int]) -> dict[str, int]:
    """Bytes by part that the teacher's pass needs in addition to `student_parts`.

    The teacher's pass and the student's do not overlap, so `teacher_pass` is the excess of the
    teacher's over the student's, or 0.
    """
    zero, student = setting.zero, setting.student
    parts = {"teacher_hidden": _teacher_hidden_bytes(setting, teacher)}
    of_teacher = _teacher_activation_bytes(setting, teacher)
    of_student = sum(student_parts[part] for part in (
        "activations", "recomputed_layer", "gathered", "gather_buffers", "loss_workspace"))
    if setting.teacher_is_sharded:
        # Each module that runs prefetches a bucket more, up to what may live: all of the teacher,
        # then the student.
        body = teacher.weights.tp_rank - teacher.untied_head
        spread = partitioned(teacher, setting.teacher_shards)
        live = min(body, spread, zero.max_live + teacher.largest_gather)
        prefetched = min(partitioned(student, setting.student_shards), max(0, zero.max_live - live))
        of_teacher += 2 * live * teacher.element_size + prefetched * student.element_size
        parts["teacher_head"] = min(teacher.head, spread) * teacher.element_size
        of_student += parts["teacher_head"]
    parts["teacher_pass"] = max(0, of_teacher - of_student)
    return parts


def _teacher_hidden_bytes(setting: Setting, teacher: ModelCosts) -> int:
    """Bytes on the device of the hidden states that wait for the loss."""
    per_token = teacher.hidden_size * teacher.element_size
    of_window = setting.teacher_tokens * per_token
    if setting.on_cpu or of_window <= teacher_memory_budget(free_bytes(setting)):
        return of_window
    # They wait in host memory, and those of one micro-batch come back at a time.
    return setting.tokens * per_token


def _teacher_pass_tokens(setting: Setting, teacher: ModelCosts) -> int:
    """Tokens that share a forward call of the teacher: whole micro-batches, at least one."""
    live = setting.recipe.live_teacher
    tokens = (live and live.max_tokens_per_pass) or default_teacher_tokens(
        free_bytes(setting), teacher.bytes_per_teacher_token)
    micro_batches = max(1, tokens // setting.tokens)
    return min(micro_batches * setting.tokens, setting.teacher_tokens)


def teacher_passes(setting: Setting, teacher: ModelCosts) -> int:
    """Forward calls of the teacher in a step."""
    return -(-setting.teacher_tokens // _teacher_pass_tokens(setting, teacher))


def _teacher_activation_bytes(setting: Setting, teacher: ModelCosts) -> int:
    """Bytes at the peak of one forward call of the teacher. Nothing is kept for backward."""
    of_block = max(TEACHER_INTERMEDIATE_TENSORS * teacher.intermediate_size * teacher.element_size,
                   teacher.score_bytes_per_teacher_token)
    per_token = TEACHER_HIDDEN_TENSORS * teacher.hidden_size * teacher.element_size + of_block
    return _teacher_pass_tokens(setting, teacher) * per_token
