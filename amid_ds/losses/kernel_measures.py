# mypy: disallow-untyped-defs=False
# (a Triton function's arguments have no Python types)
"""The Triton program of a token's measures (measures.py): one reading of both models' logits.

Only what is asked for is read and summed: a teacher's entropy needs no student.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amid_ds.losses.kernel_math import LN_2
from amid_ds.losses.kernel_programs import ROWS
from amid_ds.losses.kernel_rows import (
    block_columns,
    infinite_if_apart,
    load_log_probs,
    load_pair,
    most_apart,
    total,
)


@triton.jit(do_not_specialize=ROWS)
def measures_kernel(
    student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, out, tokens, width,
    student_scale, student_unit, student_cap, teacher_scale, teacher_unit, teacher_cap,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEACHER_ENTROPY: tl.constexpr,
    STUDENT_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr, OVERLAP: tl.constexpr,
    APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):
    """out [4, n] = -Σ p log p, -Σ q log q, Σ p (log p - log q) and Σ min(p, q) over this shard's
    columns, in nats; 0 for what is not asked for."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    peak_p, rest_p = load_pair(log_p_norm, row, tokens)
    peak_q, rest_q = load_pair(log_q_norm, row, tokens)
    offsets = block_columns(BLOCK, VECTOR)
    of_p = tl.zeros((BLOCK // VECTOR, 1), tl.float32)
    of_q = of_p
    between = of_p
    common = of_p
    apart = of_p
    full = width // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(full * TAIL, full + (width - full) * TAIL, BLOCK):
            columns = start + offsets
            if TEACHER_ENTROPY or DIVERGENCE or OVERLAP:
                log_p = load_log_probs(teacher, columns, width, teacher_scale, teacher_unit,
                                       teacher_cap, peak_p, rest_p, TEACHER_CAPPED, TAIL,
                                       APPROXIMATE)
                p = tl.exp2(log_p)
            if STUDENT_ENTROPY or DIVERGENCE or OVERLAP:
                log_q = load_log_probs(student, columns, width, student_scale, student_unit,
                                       student_cap, peak_q, rest_q, STUDENT_CAPPED, TAIL,
                                       APPROXIMATE)
                q = tl.exp2(log_q)
            if TEACHER_ENTROPY:
                of_p -= total(p * log_p)
            if STUDENT_ENTROPY:
                of_q -= total(q * log_q)
            if DIVERGENCE:
                # - p + q sums to 0, and takes away the rounding of first order.
                between += total(p * (log_p - log_q) * LN_2 + (q - p))
                apart = most_apart(apart, log_p, log_q, 0.0, 0.0, True, False, False)
            if OVERLAP:
                common += total(tl.minimum(p, q, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + row, tl.sum(of_p) * LN_2)
    tl.store(out + tokens + row, tl.sum(of_q) * LN_2)
    tl.store(out + 2 * tokens + row, infinite_if_apart(tl.sum(between), apart))
    tl.store(out + 3 * tokens + row, tl.sum(common))
