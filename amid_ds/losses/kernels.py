"""The arithmetic between the matrix products in Triton: elementwise.py's twin, with fewer readings.

One program per token walks its row of both models' logits. KL reads them three times: normalisers;
the moments from which both log Σ r̃ and all sums follow, because KL is affine in log Σ r̃; the
gradient, written over the student's logits. Other divergences need log Σ r̃ before their sums,
hence a fourth reading (not for α = -1 and the ends of λ). The formulas are in kernel_math.py.
All arithmetic is fp32, so fp64 inputs stay with plain torch; addresses are int64, for a block may
hold more than 2³¹ logits. The block sizes are not tuned: the kernels have run under
TRITON_INTERPRET=1 alone so far.

What a kernel is compiled for is in capitals. α, λ and τ are not: a schedule may change them every
step.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses.block import Block, RowNormalisers, RowStatistics, needs_normaliser
from amid_ds.losses.kernel_math import (
    DIVERGENCE_CODES,
    UNBOUNDED,
    ZERO_LOG,
    add_to_logsumexp,
    at_least_log_zero,
    divergence_arguments,
    infinite_where,
    load_log_probs,
    load_logits,
    load_pair,
    log_mixture,
    mixture_arguments,
    objective_terms,
    order_arguments,
)
from amid_ds.losses.moments import MOMENT_ROWS, merge_moments, sums_from_moments
from amid_ds.losses.objective import KL, AMiD

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Columns that a program reads at once.
MIN_COLUMNS, MAX_COLUMNS = 16, 2048
NUM_WARPS = 8


def supports(objective: AMiD | None, dtypes: list[torch.dtype]) -> bool:
    """True if there are kernels for this divergence and these dtypes of logits."""
    known = objective is None or type(objective.resolved_divergence) in DIVERGENCE_CODES
    return known and set(dtypes) <= {torch.float32, torch.bfloat16, torch.float16}


def log_normalisers(block: Block) -> Tensor:
    """[k, 2, n] local log Σ exp of the logits in `block.normaliser_names`. One reading."""
    names = block.normaliser_names
    rows = torch.empty(len(names), 2, block.tokens, dtype=torch.float32, device=block.device)
    if rows.numel():
        _normalisers_kernel[(block.tokens,)](
            *_models(block), rows, HAS_TEACHER=block.teacher is not None, HAS_Z="z" in names,
            **_logit_arguments(block))
    return rows


def statistics(block: Block, norms: RowNormalisers, shard: VocabShard) -> RowStatistics:
    """log Σ r̃ and ΣD, ΣA, Σ(wA + B), Σwr over the whole vocabulary.

    One reading and one collective for KL and without log Σ r̃, two of both otherwise.
    """
    objective = block.objective
    assert objective is not None and norms.log_p is not None and norms.log_q is not None
    grid, models = (block.tokens,), (*_models(block), norms.log_p, norms.log_q)
    logits, mixture = _logit_arguments(block), mixture_arguments(objective)

    def empty(rows: int) -> Tensor:
        return torch.empty(rows, block.tokens, dtype=torch.float32, device=block.device)

    log_assistant = None
    if needs_normaliser(objective):
        if isinstance(objective.resolved_divergence, KL):
            local = empty(MOMENT_ROWS)
            _kl_moments_kernel[grid](
                *models, local, block.tokens, DETACHED=objective.detach_assistant,
                **order_arguments(objective), **mixture, **logits)
            moments = merge_moments(shard.gather(local))
            return RowStatistics(moments[:2], sums_from_moments(moments, objective))
        local = empty(2)
        _assistant_kernel[grid](*models, local, block.tokens, **mixture, **logits)
        log_assistant = shard.logsumexp(local)
    local = empty(4)
    _sums_kernel[grid](*models, _or_unread(log_assistant, block), local, block.tokens,
                       HAS_ASSISTANT=log_assistant is not None,
                       DETACHED=objective.detach_assistant, **order_arguments(objective),
                       **divergence_arguments(objective), **mixture, **logits)
    return RowStatistics(log_assistant, shard.sum(local))


def write_gradient(block: Block, norms: RowNormalisers, stats: RowStatistics | None) -> None:
    """Write ∂loss/∂raw into `block.gradient`, which may be the student's `raw`. One reading."""
    assert block.gradient is not None
    log_assistant = sums = None
    if stats is not None:
        log_assistant, sums = stats.log_assistant, stats.sums.contiguous()
    has_ce = block.ce_scale is not None
    log_z, labels = (norms.log_z, block.labels) if has_ce else (None, None)
    rows = (norms.log_p, norms.log_q, log_assistant, sums, block.kd_scale, block.ce_scale, log_z,
            labels)
    # Without a teacher its terms are compiled away, and any objective does.
    objective = block.objective or AMiD()
    _gradient_kernel[(block.tokens,)](
        *_models(block), block.gradient, block.gradient.stride(0),
        *[_or_unread(row, block) for row in rows], block.tokens,
        HAS_KD=block.kd_scale is not None, HAS_CE=has_ce, HAS_ASSISTANT=log_assistant is not None,
        DETACHED=objective.detach_assistant, **order_arguments(objective),
        **divergence_arguments(objective), **mixture_arguments(objective),
        **_logit_arguments(block))


def _models(block: Block) -> tuple[Tensor, int, Tensor, int]:
    """Both models' logits and row strides (the student's twice without a teacher)."""
    student, teacher = block.student.raw, (block.teacher or block.student).raw
    return student, student.stride(0), teacher, teacher.stride(0)


def _or_unread(tensor: Tensor | None, block: Block) -> Tensor:
    """`tensor`, or for None any pointer: the kernel does not read it."""
    return block.student.raw if tensor is None else tensor


def _logit_arguments(block: Block) -> dict[str, float]:
    student, teacher, objective = block.student, block.teacher or block.student, block.objective
    columns = triton.next_power_of_2(student.width)
    return {
        "width": student.width,
        "inverse_tau": 1.0 if objective is None else 1 / objective.temperature,
        "student_scale": student.scale, "student_cap": student.softcap or 0.0,
        "teacher_scale": teacher.scale, "teacher_cap": teacher.softcap or 0.0,
        "STUDENT_CAPPED": student.softcap is not None,
        "TEACHER_CAPPED": teacher.softcap is not None,
        "BLOCK": min(MAX_COLUMNS, max(MIN_COLUMNS, columns)), "num_warps": NUM_WARPS,
    }


@triton.jit
def _normalisers_kernel(
    student, student_stride, teacher, teacher_stride, rows,
    width, inverse_tau, student_scale, student_cap, teacher_scale, teacher_cap,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, HAS_TEACHER: tl.constexpr,
    HAS_Z: tl.constexpr, BLOCK: tl.constexpr,
):
    """rows [k, 2, n] = log Σ exp of q and p under HAS_TEACHER, then of the untempered z under
    HAS_Z; each as its peak and the logarithm of the rest."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.num_programs(0)
    # No -inf: a block of columns may hold nothing else.
    max_q = tl.full((), ZERO_LOG, tl.float32)
    max_p = max_q
    max_z = max_q
    sum_q = tl.zeros((BLOCK,), tl.float32)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    sum_z = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        z = load_logits(student + row * student_stride, columns, mask, student_scale, student_cap,
                        STUDENT_CAPPED)
        if HAS_TEACHER:
            max_q, sum_q = add_to_logsumexp(max_q, sum_q, z * inverse_tau, mask)
            p = load_logits(teacher + row * teacher_stride, columns, mask, teacher_scale,
                            teacher_cap, TEACHER_CAPPED)
            max_p, sum_p = add_to_logsumexp(max_p, sum_p, p * inverse_tau, mask)
        if HAS_Z:
            max_z, sum_z = add_to_logsumexp(max_z, sum_z, z, mask)
    if HAS_TEACHER:
        tl.store(rows + row, max_q)
        tl.store(rows + tokens + row, tl.log(tl.sum(sum_q, 0)))
        tl.store(rows + 2 * tokens + row, max_p)
        tl.store(rows + 3 * tokens + row, tl.log(tl.sum(sum_p, 0)))
        rows += 4 * tokens
    if HAS_Z:
        tl.store(rows + row, max_z)
        tl.store(rows + tokens + row, tl.log(tl.sum(sum_z, 0)))


@triton.jit
def _assistant_kernel(
    student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, out, tokens,
    width, inverse_tau, student_scale, student_cap, teacher_scale, teacher_cap,
    c, lam, log_lam, log_rest,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, MIXTURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [2, n] = log Σ r̃ over this shard's columns: its peak and the logarithm of the rest."""
    row = tl.program_id(0).to(tl.int64)
    peak_p, norm_p = load_pair(log_p_norm, row, tokens)
    peak_q, norm_q = load_pair(log_q_norm, row, tokens)
    peak = tl.full((), -float("inf"), tl.float32)
    sum_r = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        log_q = load_log_probs(student + row * student_stride, columns, mask, student_scale,
                               student_cap, inverse_tau, peak_q, norm_q, STUDENT_CAPPED)
        log_p = load_log_probs(teacher + row * teacher_stride, columns, mask, teacher_scale,
                               teacher_cap, inverse_tau, peak_p, norm_p, TEACHER_CAPPED)
        log_r, _ = log_mixture(log_p, log_q, c, lam, log_lam, log_rest, MIXTURE)
        new = tl.maximum(peak, tl.max(tl.where(mask, log_r, -float("inf")), 0))
        r = tl.where(mask, tl.exp(tl.where(mask, log_r, new) - new), 0.0)
        sum_r = sum_r * tl.exp(peak - new) + r
        peak = new
    tl.store(out + row, peak)
    tl.store(out + tokens + row, tl.log(tl.sum(sum_r, 0)))


@triton.jit
def _kl_moments_kernel(
    student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, out, tokens,
    width, inverse_tau, student_scale, student_cap, teacher_scale, teacher_cap,
    c, lam, log_lam, log_rest, pr, qr, rp, rq,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, DETACHED: tl.constexpr,
    MIXTURE: tl.constexpr, PR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr, RQ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [9, n] = the moments of KL (moments.py), r̃ summed against its running maximum."""
    row = tl.program_id(0).to(tl.int64)
    peak_p, norm_p = load_pair(log_p_norm, row, tokens)
    peak_q, norm_q = load_pair(log_q_norm, row, tokens)
    peak = tl.full((), -float("inf"), tl.float32)
    sum_r = tl.zeros((BLOCK,), tl.float32)
    # Σ r̃w, Σ r̃T, Σ r̃wT, divided by Σ r̃ at the end.
    w_r = tl.zeros((BLOCK,), tl.float32)
    t_r = tl.zeros((BLOCK,), tl.float32)
    wt_r = tl.zeros((BLOCK,), tl.float32)
    value = tl.zeros((BLOCK,), tl.float32)
    pull = tl.zeros((BLOCK,), tl.float32)
    w_models = tl.zeros((BLOCK,), tl.float32)
    excess = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        log_q = load_log_probs(student + row * student_stride, columns, mask, student_scale,
                               student_cap, inverse_tau, peak_q, norm_q, STUDENT_CAPPED)
        log_p = load_log_probs(teacher + row * teacher_stride, columns, mask, teacher_scale,
                               teacher_cap, inverse_tau, peak_p, norm_p, TEACHER_CAPPED)
        log_r, w = log_mixture(log_p, log_q, c, lam, log_lam, log_rest, MIXTURE)
        if DETACHED:
            w = tl.zeros_like(w)
        new = tl.maximum(peak, tl.max(tl.where(mask, log_r, -float("inf")), 0))
        rescale = tl.exp(peak - new)
        peak = new
        r = tl.where(mask, tl.exp(tl.where(mask, log_r, new) - new), 0.0)
        sum_r = sum_r * rescale + r
        w_r = w_r * rescale + r * w
        if RP or RQ:
            t = rp * (log_r - log_p) + rq * (log_r - log_q)
            t_r = t_r * rescale + r * t
            wt_r = wt_r * rescale + r * w * t
            value = infinite_where(value, mask & (t > UNBOUNDED))
        if PR or RP:
            p = tl.where(mask, tl.exp(log_p), 0.0)
            excess += (rp - pr) * p
            if PR:
                fall = tl.where(mask, log_p - log_r, 0.0)
                value += infinite_where(pr * p * fall, fall > UNBOUNDED)
                w_models += pr * p * w
        if QR or RQ:
            q = tl.where(mask, tl.exp(log_q), 0.0)
            excess += (rq - qr) * q
            if QR:
                fall = tl.where(mask, log_q - log_r, 0.0)
                value += infinite_where(qr * q * fall, fall > UNBOUNDED)
                pull += qr * q * fall
                w_models += qr * q * w
    total = tl.sum(sum_r, 0)
    tl.store(out + row, peak)
    tl.store(out + tokens + row, tl.log(total))
    # A shard without columns has no share in the means.
    total = tl.where(total > 0, total, 1.0)
    tl.store(out + 2 * tokens + row, tl.sum(w_r, 0) / total)
    tl.store(out + 3 * tokens + row, tl.sum(t_r, 0) / total)
    tl.store(out + 4 * tokens + row, tl.sum(wt_r, 0) / total)
    tl.store(out + 5 * tokens + row, tl.sum(value, 0))
    tl.store(out + 6 * tokens + row, tl.sum(pull, 0))
    tl.store(out + 7 * tokens + row, tl.sum(w_models, 0))
    tl.store(out + 8 * tokens + row, tl.sum(excess, 0))


@triton.jit
def _sums_kernel(
    student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, log_assistant, out,
    tokens, width, inverse_tau, student_scale, student_cap, teacher_scale, teacher_cap,
    c, lam, log_lam, log_rest, pr, qr, rp, rq, x, y,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, HAS_ASSISTANT: tl.constexpr,
    DETACHED: tl.constexpr, MIXTURE: tl.constexpr, DIVERGENCE: tl.constexpr, PR: tl.constexpr,
    QR: tl.constexpr, RP: tl.constexpr, RQ: tl.constexpr, BLOCK: tl.constexpr,
):
    """out [4, n] = ΣD, ΣA, Σ(wA + B), Σwr over this shard's columns."""
    row = tl.program_id(0).to(tl.int64)
    peak_p, norm_p = load_pair(log_p_norm, row, tokens)
    peak_q, norm_q = load_pair(log_q_norm, row, tokens)
    peak_r = 0.0
    norm_r = 0.0
    if HAS_ASSISTANT:
        peak_r, norm_r = load_pair(log_assistant, row, tokens)
    sum_d = tl.zeros((BLOCK,), tl.float32)
    sum_a = tl.zeros((BLOCK,), tl.float32)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    sum_w_r = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        log_q = load_log_probs(student + row * student_stride, columns, mask, student_scale,
                               student_cap, inverse_tau, peak_q, norm_q, STUDENT_CAPPED)
        log_p = load_log_probs(teacher + row * teacher_stride, columns, mask, teacher_scale,
                               teacher_cap, inverse_tau, peak_p, norm_p, TEACHER_CAPPED)
        log_r, w = log_mixture(log_p, log_q, c, lam, log_lam, log_rest, MIXTURE)
        log_r = log_r - peak_r - norm_r
        if DETACHED:
            w = tl.zeros_like(w)
        d, a, b = objective_terms(log_p, log_q, log_r, pr, qr, rp, rq, x, y, DIVERGENCE,
                                  PR, QR, RP, RQ)
        sum_d += tl.where(mask, d, 0.0)
        sum_a += tl.where(mask, a, 0.0)
        sum_x += tl.where(mask, w * a + b, 0.0)
        sum_w_r += tl.where(mask, w * tl.exp(log_r), 0.0)
    tl.store(out + row, tl.sum(sum_d, 0))
    tl.store(out + tokens + row, tl.sum(sum_a, 0))
    tl.store(out + 2 * tokens + row, tl.sum(sum_x, 0))
    tl.store(out + 3 * tokens + row, tl.sum(sum_w_r, 0))


@triton.jit
def _gradient_kernel(
    student, student_stride, teacher, teacher_stride, gradient, gradient_stride,
    log_p_norm, log_q_norm, log_assistant, sums, kd_scale, ce_scale, log_z_norm, labels, tokens,
    width, inverse_tau, student_scale, student_cap, teacher_scale, teacher_cap,
    c, lam, log_lam, log_rest, pr, qr, rp, rq, x, y,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, HAS_KD: tl.constexpr,
    HAS_CE: tl.constexpr, HAS_ASSISTANT: tl.constexpr, DETACHED: tl.constexpr,
    MIXTURE: tl.constexpr, DIVERGENCE: tl.constexpr, PR: tl.constexpr, QR: tl.constexpr,
    RP: tl.constexpr, RQ: tl.constexpr, BLOCK: tl.constexpr,
):
    """gradient [n, width] = kd_scale (wA + B - ΣA w r - q Σg)/τ + ce_scale (softmax(z) - onehot),
    through cap and scale. Each element is read before it is written, so it may be the student's
    logits."""
    row = tl.program_id(0).to(tl.int64)
    peak_p = 0.0
    peak_q = 0.0
    peak_r = 0.0
    peak_z = 0.0
    norm_p = 0.0
    norm_q = 0.0
    norm_r = 0.0
    norm_z = 0.0
    sum_a = 0.0
    sum_g = 0.0
    of_kd = 0.0
    of_ce = 0.0
    label = tl.full((), -1, tl.int64)
    if HAS_KD:
        peak_p, norm_p = load_pair(log_p_norm, row, tokens)
        peak_q, norm_q = load_pair(log_q_norm, row, tokens)
        if HAS_ASSISTANT:
            peak_r, norm_r = load_pair(log_assistant, row, tokens)
        sum_a = tl.load(sums + tokens + row)
        sum_g = tl.load(sums + 2 * tokens + row) - sum_a * tl.load(sums + 3 * tokens + row)
        of_kd = tl.load(kd_scale + row) * inverse_tau
    if HAS_CE:
        peak_z, norm_z = load_pair(log_z_norm, row, tokens)
        of_ce = tl.load(ce_scale + row)
        label = tl.load(labels + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        z = load_logits(student + row * student_stride, columns, mask, student_scale, student_cap,
                        STUDENT_CAPPED)
        g = tl.zeros_like(z)
        if HAS_KD:
            log_q = at_least_log_zero(z * inverse_tau - peak_q - norm_q)
            log_p = load_log_probs(teacher + row * teacher_stride, columns, mask, teacher_scale,
                                   teacher_cap, inverse_tau, peak_p, norm_p, TEACHER_CAPPED)
            log_r, w = log_mixture(log_p, log_q, c, lam, log_lam, log_rest, MIXTURE)
            log_r = log_r - peak_r - norm_r
            if DETACHED:
                w = tl.zeros_like(w)
            _, a, b = objective_terms(log_p, log_q, log_r, pr, qr, rp, rq, x, y, DIVERGENCE,
                                      PR, QR, RP, RQ)
            g += of_kd * (w * (a - sum_a * tl.exp(log_r)) + b - sum_g * tl.exp(log_q))
        if HAS_CE:
            onehot = tl.where(columns == label, 1.0, 0.0)
            g += of_ce * (tl.exp(z - peak_z - norm_z) - onehot)
        if STUDENT_CAPPED:
            g = g * (1.0 - (z / student_cap) * (z / student_cap))
        g = g * student_scale
        tl.store(gradient + row * gradient_stride + columns, g.to(gradient.dtype.element_ty),
                 mask=mask)
