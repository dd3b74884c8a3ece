"""The arithmetic between the matrix products in Triton: elementwise.py's twin, with fewer readings.

KL reads the logits three times: normalisers; the moments from which both log Σ r̃ and all sums
follow, because KL is affine in log Σ r̃; the gradient, written over the student's logits. Other
divergences need log Σ r̃ before their sums, hence a fourth reading (not for α = -1 and the ends of
λ). The kernels are in kernel_programs.py, the formulas in kernel_math.py. All arithmetic is fp32,
so fp64 inputs stay with plain torch; addresses are int64, for a block may hold more than 2³¹
logits. The block sizes are not tuned: the kernels have been compiled, and run under
TRITON_INTERPRET=1, alone so far.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses import kernel_measures, kernel_programs, kernel_residuals
from amid_ds.losses.block import Block, RowNormalisers, RowStatistics, needs_normaliser, normalised
from amid_ds.losses.divergences import KL, ConcreteScore
from amid_ds.losses.kernel_arguments import (
    divergence_arguments,
    has_token_numbers,
    infinite_arguments,
    mixture_arguments,
    moves_assistant,
    order_arguments,
    score_weight,
    token_numbers,
    weight_arguments,
)
from amid_ds.losses.kernel_math import DIVERGENCE_CODES
from amid_ds.losses.moments import MOMENT_ROWS, merge_moments, sums_from_moments
from amid_ds.losses.objective import AMiD

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Columns that a program reads at once.
MIN_COLUMNS, MAX_COLUMNS = 16, 2048
THREADS = 256
# Bytes that a thread reads at once.
VECTOR_BYTES = 16
# Rows of `kernel_measures.measures_kernel`.
SUMMED_MEASURES = ("teacher_entropy", "student_entropy", "divergence", "overlap")


def supports(objective: AMiD | None, dtypes: list[torch.dtype]) -> bool:
    """True if there are kernels for this divergence and these dtypes of logits."""
    known = objective is None or _is_known(objective)
    return known and set(dtypes) <= {torch.float32, torch.bfloat16, torch.float16}


def _is_known(objective: AMiD) -> bool:
    divergence = objective.resolved_divergence
    if isinstance(divergence, ConcreteScore):
        # At λ = 0 a detached r is the student's own, as a constant: no gradient of the two models'.
        of_models = objective.lam == 1 or (objective.lam == 0 and not objective.detach_assistant)
        return of_models and objective.power == 1
    return divergence.needs_labels or type(divergence) in DIVERGENCE_CODES


def log_normalisers(block: Block) -> Tensor:
    """[k, 2, n] local log Σ exp of the logits in `block.normaliser_names`. One reading."""
    names = block.normaliser_names
    rows = torch.empty(len(names), 2, block.tokens, dtype=torch.float32, device=block.device)
    if rows.numel():
        _launch(kernel_programs.normalisers_kernel, block, *_models(block), rows, block.tokens,
                HAS_TEACHER=block.teacher is not None, HAS_Z="z" in names,
                **_logit_arguments(block))
    return rows


def measures(block: Block, norms: RowNormalisers, names: tuple[str, ...]) -> Tensor:
    """[k, n] local sums of the measures of these names (measures.py). One reading."""
    local = torch.empty(len(SUMMED_MEASURES), block.tokens, dtype=torch.float32,
                        device=block.device)
    asked = {name.upper(): name in names for name in SUMMED_MEASURES}
    if local.numel() and any(asked.values()):
        _launch(kernel_measures.measures_kernel, block, *_models(block), norms.log_p, norms.log_q,
                local, block.tokens, **asked, **_logit_arguments(block))
    rows = dict(zip(SUMMED_MEASURES, local, strict=True))
    if "label_probability" in names:
        rows["label_probability"] = _label_probability(block, norms)
    return torch.stack([rows[name] for name in names])


def _label_probability(block: Block, norms: RowNormalisers) -> Tensor:
    """[n] the teacher's probability of the label if this shard holds it, else 0."""
    assert block.teacher is not None and block.labels is not None and norms.log_p is not None
    labels, width = block.labels, block.teacher.width
    if not width:
        return torch.zeros_like(norms.log_p[0])
    raw = block.teacher.raw.gather(1, labels.clamp(0, width - 1)[:, None])
    log_p = normalised(replace(block.teacher, raw=raw).tempered(torch.float32), norms.log_p)[:, 0]
    return torch.where((labels >= 0) & (labels < width), log_p.exp(), 0.0)


def statistics(block: Block, norms: RowNormalisers, shard: VocabShard) -> RowStatistics:
    """log Σ r̃ and ΣD, ΣA, Σ(wA + B), Σwr over the whole vocabulary; ΣA is 0 where unread.

    One reading and one collective for KL and without log Σ r̃, two of both otherwise.
    """
    objective = block.objective
    assert objective is not None and norms.log_p is not None and norms.log_q is not None
    if isinstance(objective.resolved_divergence, ConcreteScore):
        return _score_statistics(block, norms, shard)
    numbers = _or_unread(token_numbers(objective, norms.log_q[0]), block)
    models = (*_models(block), norms.log_p, norms.log_q)
    logits = {**_logit_arguments(block), "PER_TOKEN": has_token_numbers(objective)}
    mixture = mixture_arguments(objective)
    orders = {**order_arguments(objective), **infinite_arguments(objective),
              "MOVES": moves_assistant(objective)}

    def empty(rows: int) -> Tensor:
        return torch.empty(rows, block.tokens, dtype=torch.float32, device=block.device)

    log_assistant = None
    if needs_normaliser(objective):
        if isinstance(objective.resolved_divergence, KL):
            local = empty(MOMENT_ROWS)
            _launch(kernel_programs.kl_moments_kernel, block, *models, numbers, local,
                    block.tokens, **orders, **mixture, **logits)
            moments = merge_moments(shard.gather(local))
            return RowStatistics(moments[:2], sums_from_moments(moments, objective))
        local = empty(2)
        _launch(kernel_programs.assistant_kernel, block, *models, numbers, local, block.tokens,
                **mixture, **logits)
        log_assistant = shard.logsumexp(local)
    local = empty(4)
    _launch(
        kernel_programs.sums_kernel, block, *models, _or_unread(log_assistant, block),
        numbers, local, block.tokens, HAS_ASSISTANT=log_assistant is not None, **orders,
        **divergence_arguments(objective), **mixture, **logits)
    return RowStatistics(log_assistant, shard.sum(local))


def _score_statistics(block: Block, norms: RowNormalisers, shard: VocabShard) -> RowStatistics:
    """`statistics` of a concrete score of the two models. Two readings and two collectives."""
    objective = block.objective
    assert objective is not None
    models = (*_models(block), norms.log_p, norms.log_q)
    options = {**weight_arguments(objective), **_logit_arguments(block)}
    local = torch.empty(4, block.tokens, dtype=torch.float32, device=block.device)
    _launch(kernel_residuals.residual_sums_kernel, block, *models, local, block.tokens, **options)
    residuals = shard.sum(local)
    value = torch.empty_like(local[0])
    _launch(kernel_residuals.score_kernel, block, *models, residuals, value, block.tokens,
            **options)
    sums = torch.zeros_like(local)
    weight, value = score_weight(objective), shard.sum(value)
    sums[0] = value * weight
    if isinstance(weight, Tensor):
        # A token's weight may be 0 where its value is infinite.
        sums[0].masked_fill_((weight == 0) & value.isinf(), 0.0)
    return RowStatistics(None, sums, residuals[None])


def write_gradient(block: Block, norms: RowNormalisers, stats: RowStatistics | None) -> None:
    """Write ∂loss/∂raw into `block.gradient`, which may be the student's `raw`. One reading."""
    assert block.gradient is not None
    log_assistant = sums = residuals = None
    kd_scale = block.kd_scale
    if stats is not None:
        log_assistant, residuals = stats.log_assistant, stats.residuals
        sums = stats.sums.contiguous()
    if residuals is not None and kd_scale is not None:
        assert block.objective is not None
        kd_scale = kd_scale * score_weight(block.objective)
    has_ce, sampled = block.ce_scale is not None, block.label_scale is not None
    log_z = norms.log_z if has_ce else None
    labels = block.labels if has_ce or sampled else None
    # Without a teacher its terms are compiled away, and any objective does.
    objective = block.objective or AMiD().resolved({})
    numbers = None if norms.log_q is None else token_numbers(objective, norms.log_q[0])
    rows = (norms.log_p, norms.log_q, log_assistant, sums, residuals, kd_scale, block.ce_scale,
            block.label_scale, log_z, labels, numbers)
    _launch(
        kernel_programs.gradient_kernel, block, *_models(block), block.gradient,
        block.gradient.stride(0), *[_or_unread(row, block) for row in rows], block.tokens,
        inverse_tau=1 / block.student.temperature,
        PER_TOKEN=numbers is not None, HAS_KD=block.kd_scale is not None, HAS_CE=has_ce,
        SAMPLED=sampled, HAS_ASSISTANT=log_assistant is not None, **weight_arguments(objective),
        MOVES=moves_assistant(objective), **order_arguments(objective),
        **divergence_arguments(objective), **mixture_arguments(objective),
        **_logit_arguments(block))


def _launch(kernel: Any, block: Block, *arguments: object, **options: object) -> None:
    """Run a program for each token of the block, on its device: Triton takes the current one."""
    with torch.cuda.device_of(block.student.raw):
        kernel[(block.tokens,)](*arguments, **options)


def _models(block: Block) -> tuple[Tensor, int, Tensor, int]:
    """Both models' logits and row strides (the student's twice without a teacher)."""
    # The kernels take the columns of a row to lie side by side.
    student, teacher = (raw if raw.stride(1) == 1 else raw.contiguous() for raw in
                        (block.student.raw, (block.teacher or block.student).raw))
    return student, student.stride(0), teacher, teacher.stride(0)


def _or_unread(tensor: Tensor | None, block: Block) -> Tensor:
    """`tensor`, or for None any pointer: the kernel does not read it."""
    return block.student.raw if tensor is None else tensor


def _logit_arguments(block: Block) -> dict[str, float]:
    """How the kernels read logits: what is read, under a cap capped, is tempered by `unit`."""
    student, teacher = block.student, block.teacher or block.student
    columns = triton.next_power_of_2(student.width)
    narrowest = min(student.raw.element_size(), teacher.raw.element_size())
    arguments = {"width": student.width, "BLOCK": min(MAX_COLUMNS, max(MIN_COLUMNS, columns)),
                 "VECTOR": VECTOR_BYTES // narrowest, **_machine_arguments()}
    for name, model in (("student", student), ("teacher", teacher)):
        capped, inverse_tau = model.softcap is not None, 1 / model.temperature
        arguments |= {f"{name}_scale": model.scale, f"{name}_cap": model.softcap or 0.0,
                      f"{name}_unit": inverse_tau if capped else model.scale * inverse_tau,
                      f"{name.upper()}_CAPPED": capped}
    return arguments


def _machine_arguments() -> dict[str, float]:
    """What depends on the GPU alone; APPROXIMATE is NVIDIA's instructions for log₂ and 1/x."""
    if INTERPRETED:
        return {"APPROXIMATE": False}
    target = driver.active.get_current_target()
    # Fusion: a product and a sum are one instruction.
    return {"APPROXIMATE": target.backend == "cuda", "num_warps": THREADS // target.warp_size,
            "enable_fp_fusion": True}
