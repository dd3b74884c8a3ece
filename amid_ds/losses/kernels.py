"""Between the matrix products, in Triton: the same three functions as elementwise.py, reading the logits less often.

One program per token walks its row of both models' logits. KL reads them three times: normalisers; the moments from
which both log Σ r̃ and all sums follow, because KL is affine in log Σ r̃; the gradient, written over the student's
logits. Other divergences need log Σ r̃ before their sums, hence a fourth reading (not for α = -1 and the ends of λ).
All arithmetic is fp32, so fp64 inputs stay with plain torch; addresses are int64, for a block may hold more than 2³¹
logits. The block sizes are not tuned: the kernels have run under TRITON_INTERPRET=1 alone so far.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses.block import Block, needs_normaliser
from amid_ds.losses.moments import ROWS, merged, sums_of
from amid_ds.losses.objective import KL, AlphaBeta, AMiD, SquaredHellinger, TotalVariation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MEASURES = {KL: 0, AlphaBeta: 1, TotalVariation: 2, SquaredHellinger: 3}
NO_MIXTURE_STUDENT, NO_MIXTURE_TEACHER, GEOMETRIC, POWER = 0, 1, 2, 3


def supports(objective: AMiD | None, dtypes: list[torch.dtype]) -> bool:
    """Whether there are kernels for this divergence and these dtypes of logits."""
    known = objective is None or type(objective.measure) in MEASURES
    return known and all(dtype in (torch.float32, torch.bfloat16, torch.float16) for dtype in dtypes)


def log_normalisers(block: Block) -> Tensor:
    """[k, 2, n] local log Σ exp of the logits that `block.normalisers` names. One reading of the logits."""
    names = block.normalisers
    rows = torch.empty(len(names), 2, block.tokens, dtype=torch.float32, device=block.device)
    if rows.numel():
        _normalisers_kernel[(block.tokens,)](*_models(block), rows, HAS_Z="z" in names, **_constants(block))
    return rows


def statistics(block: Block, shard: VocabShard) -> Tensor:
    """[4, n] ΣD, ΣA, Σ(wA + B), Σwr over the whole vocabulary."""
    objective = block.objective
    assert objective is not None
    if needs_normaliser(objective):
        if isinstance(objective.measure, KL):
            moments = merged(shard.gather(_run(block, ROWS)))
            block.log_assistant = moments[:2]
            return sums_of(moments, objective)
        block.log_assistant = shard.logsumexp(_run(block, 2))
    return shard.sum(_run(block, 4))


def write_gradient(block: Block) -> None:
    """∂loss/∂raw logits into `block.gradient`; it may be the student's `raw`. One reading of the logits."""
    assert block.gradient is not None
    nothing = block.student.raw                 # a pointer that is not read
    with_ce = block.ce_scale is not None
    _gradient_kernel[(block.tokens,)](
        *_models(block), block.gradient, block.gradient.stride(0), *_normalisers(block), _assistant(block),
        nothing if block.sums is None else block.sums.contiguous(),
        nothing if block.kd_scale is None else block.kd_scale, nothing if block.ce_scale is None else block.ce_scale,
        block.log_z if with_ce else nothing, block.labels if with_ce else nothing, block.tokens,
        HAS_KD=block.kd_scale is not None, HAS_CE=with_ce, HAS_ASSISTANT=block.log_assistant is not None,
        DETACHED=bool(block.objective and block.objective.detach_assistant), **_mixture(block), **_constants(block))


def _run(block: Block, rows: int) -> Tensor:
    """[rows, n] statistics of this shard. One reading of both models' logits."""
    assert block.objective is not None
    out = torch.empty(rows, block.tokens, dtype=torch.float32, device=block.device)
    _statistics_kernel[(block.tokens,)](
        *_models(block), *_normalisers(block), _assistant(block), out, block.tokens, ROWS=rows,
        HAS_ASSISTANT=block.log_assistant is not None, DETACHED=block.objective.detach_assistant,
        **_mixture(block), **_constants(block))
    return out


def _models(block: Block) -> tuple[Any, ...]:
    """Pointers and row strides of both models' logits (the student's again where there is no teacher)."""
    teacher = (block.teacher or block.student).raw
    return block.student.raw, block.student.raw.stride(0), teacher, teacher.stride(0)


def _normalisers(block: Block) -> tuple[Tensor, Tensor]:
    nothing = block.student.raw
    return (nothing if block.log_p is None else block.log_p), (nothing if block.log_q is None else block.log_q)


def _assistant(block: Block) -> Tensor:
    return block.student.raw if block.log_assistant is None else block.log_assistant


def _constants(block: Block) -> dict[str, Any]:
    """What a kernel is compiled for; α, λ and τ are not among them, for a schedule may change them every step."""
    student, teacher, objective = block.student, block.teacher or block.student, block.objective
    width = block.student.width
    return {
        "width": width, "inverse_tau": 1.0 if objective is None else 1 / objective.temperature,
        "student_scale": student.scale, "student_cap": student.softcap or 0.0,
        "teacher_scale": teacher.scale, "teacher_cap": teacher.softcap or 0.0,
        "STUDENT_CAPPED": student.softcap is not None, "TEACHER_CAPPED": teacher.softcap is not None,
        "HAS_TEACHER": block.teacher is not None, "BLOCK": min(2048, max(16, triton.next_power_of_2(width))),
        "num_warps": 8,
    }


def _mixture(block: Block) -> dict[str, Any]:
    objective = block.objective
    if objective is None:
        return {"c": 1.0, "lam": 0.0, "log_lam": 0.0, "log_rest": 0.0, "pr": 0.0, "qr": 0.0, "rp": 0.0, "rq": 0.0,
                "x": 1.0, "y": 1.0, "MIXTURE": NO_MIXTURE_STUDENT, "MEASURE": 0, "PR": False, "QR": False, "RP": False,
                "RQ": False}
    measure, lam, weights = objective.measure, objective.lam, dict(objective.weights)
    kind = POWER if objective.alpha != 1 else GEOMETRIC
    if lam in (0, 1):
        kind = NO_MIXTURE_TEACHER if lam else NO_MIXTURE_STUDENT
    return {
        "c": (1 - objective.alpha) / 2, "lam": float(lam),
        "log_lam": math.log(lam) if lam else 0.0, "log_rest": math.log1p(-lam) if lam < 1 else 0.0,
        **{order: weights.get(order, 0.0) for order in ("pr", "qr", "rp", "rq")},
        **{order.upper(): order in weights for order in ("pr", "qr", "rp", "rq")},
        "x": getattr(measure, "alpha", 1.0), "y": getattr(measure, "beta", 1.0),
        "MIXTURE": kind, "MEASURE": MEASURES[type(measure)],
    }


@triton.jit
def _read(pointer, offsets, mask, scale, cap, CAPPED: tl.constexpr):
    """Logits in fp32, scaled and capped; 0 where masked."""
    z = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(z / cap))
        tanh = (1.0 - e) / (1.0 + e)
        z = cap * tl.where(z < 0, -tanh, tanh)
    return z


@triton.jit
def _assistant_of(log_p, log_q, c, lam, log_lam, log_rest, MIXTURE: tl.constexpr):
    """log r̃ and w; see elementwise.mixture. Where |x| is small, a series in x takes the place of log1p and expm1."""
    w = tl.zeros_like(log_q)
    log_r = log_q
    if MIXTURE == 0:
        w = w + 1.0
    elif MIXTURE == 1:
        log_r = log_p
    elif MIXTURE == 2:
        log_r = log_q + lam * (log_p - log_q)
        w = w + (1.0 - lam)
    else:
        x = c * (log_p - log_q)
        odds = log_rest - log_lam - x
        e = tl.exp(-tl.abs(odds))
        w = tl.where(odds >= 0, 1.0, e) / (1.0 + e)
        v = lam * (1.0 - lam)          # the cumulants of a coin of chance λ: log(1 + λ(eˣ - 1)) to the fifth order
        series = x * (lam + x * v * (0.5 + x * ((1.0 - 2.0 * lam) / 6.0 + x * ((1.0 - 6.0 * v) / 24.0
                      + x * (1.0 - 2.0 * lam) * (1.0 - 12.0 * v) / 120.0))))
        larger = tl.where(odds < 0, log_p + log_lam / c, log_q + log_rest / c)
        log_r = tl.where(tl.abs(x) < 0.125, log_q + series / c, larger + tl.log(1.0 + e) / c)
    return log_r, w


@triton.jit
def _terms_of(log_a, log_b, x, y, MEASURE: tl.constexpr):
    """f, ∂f/∂log a and ∂f/∂log b; the twin of Divergence.terms."""
    if MEASURE == 0:
        a = tl.exp(log_a)
        d_a = a * (log_a - log_b)
        d_b = tl.exp(log_b) - a
        value = d_a + d_b
    elif MEASURE == 1:
        both = tl.exp(x * log_a + y * log_b)
        d_a = (tl.exp((x + y) * log_a) - both) / y
        d_b = (tl.exp((x + y) * log_b) - both) / x
        value = (d_a + d_b) / (x + y)
    elif MEASURE == 2:
        a = tl.exp(log_a)
        b = tl.exp(log_b)
        value = 0.5 * tl.abs(a - b)
        sign = tl.where(a > b, 0.5, tl.where(a < b, -0.5, 0.0))
        d_a = sign * a
        d_b = -sign * b
    else:
        a = tl.exp(0.5 * log_a)
        b = tl.exp(0.5 * log_b)
        value = 0.5 * (a - b) * (a - b)
        d_a = 0.5 * a * (a - b)
        d_b = -0.5 * b * (a - b)
    return value, d_a, d_b


@triton.jit
def _objective_of(log_p, log_q, log_r, pr, qr, rp, rq, x, y, MEASURE: tl.constexpr, PR: tl.constexpr, QR: tl.constexpr,
                  RP: tl.constexpr, RQ: tl.constexpr):
    """D, A = ∂D/∂log r and B = ∂D/∂log q over the weighted orders."""
    value = tl.zeros_like(log_q)
    a = tl.zeros_like(log_q)
    b = tl.zeros_like(log_q)
    if PR:
        f, _, d_r = _terms_of(log_p, log_r, x, y, MEASURE)
        value += pr * f
        a += pr * d_r
    if QR:
        f, d_q, d_r = _terms_of(log_q, log_r, x, y, MEASURE)
        value += qr * f
        a += qr * d_r
        b += qr * d_q
    if RP:
        f, d_r, _ = _terms_of(log_r, log_p, x, y, MEASURE)
        value += rp * f
        a += rp * d_r
    if RQ:
        f, d_r, d_q = _terms_of(log_r, log_q, x, y, MEASURE)
        value += rq * f
        a += rq * d_r
        b += rq * d_q
    return value, a, b


@triton.jit
def _normalisers_kernel(student, student_stride, teacher, teacher_stride, rows, width, inverse_tau,
                        student_scale, student_cap, teacher_scale, teacher_cap, STUDENT_CAPPED: tl.constexpr,
                        TEACHER_CAPPED: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_Z: tl.constexpr,
                        BLOCK: tl.constexpr):
    """rows [k, 2, n]: log Σ exp of q and p where there is a teacher, then of the untempered z where it is asked for;
    each as its peak and the logarithm of the rest."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.num_programs(0)
    max_q = tl.full((), -float("inf"), tl.float32)
    max_p = max_q
    max_z = max_q
    sum_q = tl.zeros((BLOCK,), tl.float32)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    sum_z = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        z = _read(student + row * student_stride, columns, mask, student_scale, student_cap, STUDENT_CAPPED)
        if HAS_TEACHER:
            q = tl.where(mask, z * inverse_tau, -float("inf"))
            new = tl.maximum(max_q, tl.max(q, 0))
            sum_q = sum_q * tl.exp(max_q - new) + tl.exp(q - new)
            max_q = new
            p = _read(teacher + row * teacher_stride, columns, mask, teacher_scale, teacher_cap, TEACHER_CAPPED)
            p = tl.where(mask, p * inverse_tau, -float("inf"))
            new = tl.maximum(max_p, tl.max(p, 0))
            sum_p = sum_p * tl.exp(max_p - new) + tl.exp(p - new)
            max_p = new
        if HAS_Z:
            z = tl.where(mask, z, -float("inf"))
            new = tl.maximum(max_z, tl.max(z, 0))
            sum_z = sum_z * tl.exp(max_z - new) + tl.exp(z - new)
            max_z = new
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
def _statistics_kernel(student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, log_assistant, out,
                       tokens, width, inverse_tau, student_scale, student_cap, teacher_scale, teacher_cap,
                       c, lam, log_lam, log_rest, pr, qr, rp, rq, x, y,
                       STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, HAS_TEACHER: tl.constexpr,
                       HAS_ASSISTANT: tl.constexpr, DETACHED: tl.constexpr, MIXTURE: tl.constexpr,
                       MEASURE: tl.constexpr, PR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr, RQ: tl.constexpr,
                       ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out [ROWS, n] over this shard's columns, r̃ summed against its running maximum.

    2: log Σ r̃, its peak and the rest.   4: ΣD, ΣA, Σ(wA + B), Σwr.   9: the moments of KL (moments.py).
    """
    row = tl.program_id(0).to(tl.int64)
    peak_p = tl.load(log_p_norm + row)
    peak_q = tl.load(log_q_norm + row)
    norm_p = tl.load(log_p_norm + tokens + row)
    norm_q = tl.load(log_q_norm + tokens + row)
    peak_r = 0.0
    norm_r = 0.0
    if HAS_ASSISTANT:
        peak_r = tl.load(log_assistant + row)
        norm_r = tl.load(log_assistant + tokens + row)
    peak = tl.full((), -float("inf"), tl.float32)
    s0 = tl.zeros((BLOCK,), tl.float32)
    s1 = tl.zeros((BLOCK,), tl.float32)
    s2 = tl.zeros((BLOCK,), tl.float32)
    s3 = tl.zeros((BLOCK,), tl.float32)
    s4 = tl.zeros((BLOCK,), tl.float32)
    s5 = tl.zeros((BLOCK,), tl.float32)
    s6 = tl.zeros((BLOCK,), tl.float32)
    s7 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        log_q = _read(student + row * student_stride, columns, mask, student_scale, student_cap,
                      STUDENT_CAPPED) * inverse_tau - peak_q - norm_q
        log_p = _read(teacher + row * teacher_stride, columns, mask, teacher_scale, teacher_cap,
                      TEACHER_CAPPED) * inverse_tau - peak_p - norm_p
        log_r, w = _assistant_of(log_p, log_q, c, lam, log_lam, log_rest, MIXTURE)
        log_r = log_r - peak_r - norm_r
        if DETACHED:
            w = tl.zeros_like(w)
        if ROWS == 4:
            d, a, b = _objective_of(log_p, log_q, log_r, pr, qr, rp, rq, x, y, MEASURE, PR, QR, RP, RQ)
            s0 += tl.where(mask, d, 0.0)
            s1 += tl.where(mask, a, 0.0)
            s2 += tl.where(mask, w * a + b, 0.0)
            s3 += tl.where(mask, w * tl.exp(log_r), 0.0)
        else:
            new = tl.maximum(peak, tl.max(tl.where(mask, log_r, -float("inf")), 0))
            rescale = tl.exp(peak - new)
            peak = new
            r = tl.where(mask, tl.exp(tl.where(mask, log_r, new) - new), 0.0)
            s0 = s0 * rescale + r
            if ROWS == 9:
                s1 = s1 * rescale + r * w
                if RP or RQ:
                    t = rp * (log_r - log_p) + rq * (log_r - log_q)
                    s2 = s2 * rescale + r * t
                    s3 = s3 * rescale + r * w * t
                if PR or RP:
                    p = tl.where(mask, tl.exp(log_p), 0.0)
                    s4 += pr * p * (log_p - log_r)
                    s6 += pr * p * w
                    s7 += (rp - pr) * p
                if QR or RQ:
                    q = tl.where(mask, tl.exp(log_q), 0.0)
                    s7 += (rq - qr) * q
                    s4 += qr * q * (log_q - log_r)
                    s5 += qr * q * (log_q - log_r)
                    s6 += qr * q * w
    if ROWS == 4:
        tl.store(out + row, tl.sum(s0, 0))
        tl.store(out + tokens + row, tl.sum(s1, 0))
        tl.store(out + 2 * tokens + row, tl.sum(s2, 0))
        tl.store(out + 3 * tokens + row, tl.sum(s3, 0))
    else:
        total = tl.sum(s0, 0)
        tl.store(out + row, peak)
        tl.store(out + tokens + row, tl.log(total))
        if ROWS == 9:
            total = tl.where(total > 0, total, 1.0)    # a shard without columns has no share in the means
            tl.store(out + 2 * tokens + row, tl.sum(s1, 0) / total)
            tl.store(out + 3 * tokens + row, tl.sum(s2, 0) / total)
            tl.store(out + 4 * tokens + row, tl.sum(s3, 0) / total)
            tl.store(out + 5 * tokens + row, tl.sum(s4, 0))
            tl.store(out + 6 * tokens + row, tl.sum(s5, 0))
            tl.store(out + 7 * tokens + row, tl.sum(s6, 0))
            tl.store(out + 8 * tokens + row, tl.sum(s7, 0))


@triton.jit
def _gradient_kernel(student, student_stride, teacher, teacher_stride, gradient, gradient_stride,
                     log_p_norm, log_q_norm, log_assistant, sums, kd_scale, ce_scale, log_z_norm, labels,
                     tokens, width, inverse_tau, student_scale, student_cap, teacher_scale, teacher_cap,
                     c, lam, log_lam, log_rest, pr, qr, rp, rq, x, y,
                     STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, HAS_TEACHER: tl.constexpr,
                     HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_ASSISTANT: tl.constexpr, DETACHED: tl.constexpr,
                     MIXTURE: tl.constexpr, MEASURE: tl.constexpr, PR: tl.constexpr, QR: tl.constexpr,
                     RP: tl.constexpr, RQ: tl.constexpr, BLOCK: tl.constexpr):
    """gradient [n, width] = kd_scale (wA + B - ΣA w r - q Σg)/τ + ce_scale (softmax(z) - onehot), through cap and
    scale. Each element is read before it is written, so it may be the student's logits."""
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
        peak_p = tl.load(log_p_norm + row)
        peak_q = tl.load(log_q_norm + row)
        norm_p = tl.load(log_p_norm + tokens + row)
        norm_q = tl.load(log_q_norm + tokens + row)
        if HAS_ASSISTANT:
            peak_r = tl.load(log_assistant + row)
            norm_r = tl.load(log_assistant + tokens + row)
        sum_a = tl.load(sums + tokens + row)
        sum_g = tl.load(sums + 2 * tokens + row) - sum_a * tl.load(sums + 3 * tokens + row)
        of_kd = tl.load(kd_scale + row) * inverse_tau
    if HAS_CE:
        peak_z = tl.load(log_z_norm + row)
        norm_z = tl.load(log_z_norm + tokens + row)
        of_ce = tl.load(ce_scale + row)
        label = tl.load(labels + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        z = _read(student + row * student_stride, columns, mask, student_scale, student_cap, STUDENT_CAPPED)
        g = tl.zeros_like(z)
        if HAS_KD:
            log_q = z * inverse_tau - peak_q - norm_q
            log_p = _read(teacher + row * teacher_stride, columns, mask, teacher_scale, teacher_cap,
                          TEACHER_CAPPED) * inverse_tau - peak_p - norm_p
            log_r, w = _assistant_of(log_p, log_q, c, lam, log_lam, log_rest, MIXTURE)
            log_r = log_r - peak_r - norm_r
            if DETACHED:
                w = tl.zeros_like(w)
            _, a, b = _objective_of(log_p, log_q, log_r, pr, qr, rp, rq, x, y, MEASURE, PR, QR, RP, RQ)
            g += of_kd * (w * (a - sum_a * tl.exp(log_r)) + b - sum_g * tl.exp(log_q))
        if HAS_CE:
            g += of_ce * (tl.exp(z - peak_z - norm_z) - tl.where(columns == label, 1.0, 0.0))
        if STUDENT_CAPPED:
            g = g * (1.0 - (z / student_cap) * (z / student_cap))
        g = g * student_scale
        tl.store(gradient + row * gradient_stride + columns, g.to(gradient.dtype.element_ty), mask=mask)
