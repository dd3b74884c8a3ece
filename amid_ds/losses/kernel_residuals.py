# mypy: disallow-untyped-defs=False
# (a Triton function's arguments have no Python types)
"""Concrete scores as Triton kernels: the sums that centre a row's residuals, its value, its slope.

The twin of divergences.ConcreteScore for residuals of the two models themselves, δ = log q - log p:
through an assistant it runs in plain torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amid_ds.losses.kernel_math import LN_2, UNBOUNDED
from amid_ds.losses.kernel_rows import block_columns, load_log_probs, load_pair, total

RESIDUAL_ROWS = ["tokens", "out", "log_p_norm", "log_q_norm", "residuals"]
# The constexpr FIRST and SECOND.
WEIGHT_STUDENT = tl.constexpr(0)
WEIGHT_TEACHER = tl.constexpr(1)
WEIGHT_UNIFORM = tl.constexpr(2)
WEIGHT_CODES = {"student": WEIGHT_STUDENT.value, "teacher": WEIGHT_TEACHER.value,
                "uniform": WEIGHT_UNIFORM.value}


@triton.jit
def weight_of(log_p, log_q, WEIGHT: tl.constexpr):
    """(a weight w, not normalised; 1 where it is not 0, though it be too small for fp32)."""
    log = log_q
    if WEIGHT == WEIGHT_TEACHER:
        log = log_p
    elif WEIGHT == WEIGHT_UNIFORM:
        log = tl.where(tl.maximum(log_p, log_q) < -UNBOUNDED, -2 * UNBOUNDED, 0.0)
    return tl.exp2(log), tl.where(log > -UNBOUNDED, 1.0, 0.0)


@triton.jit
def residual(log_p, log_q):
    """(δ = log q - log p in nats, 0 where it is infinite; 1 there, else 0)."""
    delta = (log_q - log_p) * LN_2
    infinite = tl.where(tl.abs(delta) > UNBOUNDED, 1.0, 0.0)
    return tl.where(infinite > 0, 0.0, delta), infinite


@triton.jit
def load_centres(residuals, row, tokens):
    """(1/Σw₁, 1/Σw₂, c = (m₁ + m₂)/2, h = (m₁ - m₂)/2) of a row of the sums [4, n]."""
    inverse_first = 1.0 / tl.load(residuals + row)
    inverse_second = 1.0 / tl.load(residuals + tokens + row)
    mean_first = tl.load(residuals + 2 * tokens + row) * inverse_first
    mean_second = tl.load(residuals + 3 * tokens + row) * inverse_second
    return (inverse_first, inverse_second, 0.5 * (mean_first + mean_second),
            0.5 * (mean_first - mean_second))


@triton.jit
def score_slope(log_p, log_q, inverse_first, inverse_second, centre, half, FIRST: tl.constexpr,
                SECOND: tl.constexpr):
    """∂D/∂log q, whose sum over the vocabulary is 0."""
    delta, _ = residual(log_p, log_q)
    first = weight_of(log_p, log_q, FIRST)[0] * inverse_first
    second = weight_of(log_p, log_q, SECOND)[0] * inverse_second
    return (first + second) * (delta - centre) + (first - second) * half


@triton.jit(do_not_specialize=RESIDUAL_ROWS)
def residual_sums_kernel(
    student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, out, tokens, width,
    student_scale, student_unit, student_cap, teacher_scale, teacher_unit, teacher_cap,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):
    """out [4, n] = Σ w₁, Σ w₂, Σ w₁δ and Σ w₂δ over this shard's columns."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    peak_p, rest_p = load_pair(log_p_norm, row, tokens)
    peak_q, rest_q = load_pair(log_q_norm, row, tokens)
    offsets = block_columns(BLOCK, VECTOR)
    sum_first = tl.zeros((BLOCK // VECTOR, 1), tl.float32)
    sum_second = sum_first
    of_first = sum_first
    of_second = sum_first
    full = width // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(full * TAIL, full + (width - full) * TAIL, BLOCK):
            columns = start + offsets
            log_q = load_log_probs(student, columns, width, student_scale, student_unit,
                                   student_cap, peak_q, rest_q, STUDENT_CAPPED, TAIL, APPROXIMATE)
            log_p = load_log_probs(teacher, columns, width, teacher_scale, teacher_unit,
                                   teacher_cap, peak_p, rest_p, TEACHER_CAPPED, TAIL, APPROXIMATE)
            delta, _ = residual(log_p, log_q)
            first, _ = weight_of(log_p, log_q, FIRST)
            sum_first += total(first)
            of_first += total(first * delta)
            if SECOND != FIRST:
                second, _ = weight_of(log_p, log_q, SECOND)
                sum_second += total(second)
                of_second += total(second * delta)
    if SECOND == FIRST:
        sum_second = sum_first
        of_second = of_first
    tl.store(out + row, tl.sum(sum_first))
    tl.store(out + tokens + row, tl.sum(sum_second))
    tl.store(out + 2 * tokens + row, tl.sum(of_first))
    tl.store(out + 3 * tokens + row, tl.sum(of_second))


@triton.jit(do_not_specialize=RESIDUAL_ROWS)
def score_kernel(
    student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, residuals, out,
    tokens, width, student_scale, student_unit, student_cap, teacher_scale, teacher_unit,
    teacher_cap, STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):
    """out [n] = ΣD over this shard's columns, given the sums [4, n] of the whole vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    peak_p, rest_p = load_pair(log_p_norm, row, tokens)
    peak_q, rest_q = load_pair(log_q_norm, row, tokens)
    inverse_first, inverse_second, centre, half = load_centres(residuals, row, tokens)
    offsets = block_columns(BLOCK, VECTOR)
    sum_d = tl.zeros((BLOCK // VECTOR, 1), tl.float32)
    infinite = sum_d
    full = width // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(full * TAIL, full + (width - full) * TAIL, BLOCK):
            columns = start + offsets
            log_q = load_log_probs(student, columns, width, student_scale, student_unit,
                                   student_cap, peak_q, rest_q, STUDENT_CAPPED, TAIL, APPROXIMATE)
            log_p = load_log_probs(teacher, columns, width, teacher_scale, teacher_unit,
                                   teacher_cap, peak_p, rest_p, TEACHER_CAPPED, TAIL, APPROXIMATE)
            delta, apart = residual(log_p, log_q)
            first, first_weighs = weight_of(log_p, log_q, FIRST)
            second, second_weighs = weight_of(log_p, log_q, SECOND)
            weight = 0.5 * (first * inverse_first + second * inverse_second)
            delta -= centre
            sum_d += total(weight * (delta * delta + half * half))
            infinite += total(apart * (first_weighs + second_weighs))
    value = tl.sum(sum_d) + tl.where(tl.sum(infinite) > 0, float("inf"), 0.0)
    tl.store(out + row, value)
