# mypy: disallow-untyped-defs=False
# (a Triton function's arguments have no Python types)
"""The Triton kernels: one program per token walks its row of both models' logits.

A row is read in blocks of columns, [BLOCK / VECTOR, VECTOR] each: full ones without a mask, 16
bytes at a load where the row stride allows it, then the tail, whose missing columns nobody says.
What is summed or sought is first put together over VECTOR, which one thread holds, then once per
row over the threads; so a running maximum is that of a thread, and its rescaling costs one
exponential for VECTOR logits.

What a kernel is compiled for is in capitals. α, λ and τ are not: a schedule may change them every
step. `tokens` and the rows of numbers per token differ from call to call in divisibility and
alignment, and are not compiled for either.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amid_ds.losses.kernel_math import (
    DIVERGENCE_CONCRETE_SCORE,
    LN_2,
    LOG2_E,
    ZERO_LOG,
    assistant,
    log_mixture,
    objective_terms,
    scaled_slope,
)
from amid_ds.losses.kernel_residuals import load_centres, score_slope
from amid_ds.losses.kernel_rows import (
    add_to_logsumexp,
    block_columns,
    infinite_if_apart,
    load_assistant,
    load_directions,
    load_log_probs,
    load_logits,
    load_mixture,
    load_orders,
    load_pair,
    log2_probability,
    most_apart,
    present,
    store_logsumexp,
    store_mixture_sum,
    to_peak,
    total,
)

# Arguments that differ from call to call.
ROWS = ["tokens", "rows", "out", "log_p_norm", "log_q_norm", "log_z_norm", "log_assistant", "sums",
        "kd_scale", "ce_scale", "label_scale", "residuals", "labels", "numbers"]


@triton.jit(do_not_specialize=ROWS)
def normalisers_kernel(
    student, student_stride, teacher, teacher_stride, rows, tokens, width,
    student_scale, student_unit, student_cap, teacher_scale, teacher_unit, teacher_cap,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, HAS_TEACHER: tl.constexpr,
    HAS_Z: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):
    """rows [k, 2, n] = log Σ exp of q and p under HAS_TEACHER, then of the untempered z under
    HAS_Z; each as its peak and the logarithm of the rest."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    offsets = block_columns(BLOCK, VECTOR)
    # Above the logarithm of 0, whose exponential is then 0, also where a thread reads no other.
    peak_q = tl.full((BLOCK // VECTOR, 1), 0.5 * ZERO_LOG, tl.float32)
    peak_p = peak_q
    peak_z = peak_q
    sum_q = tl.zeros((BLOCK // VECTOR, 1), tl.float32)
    sum_p = sum_q
    sum_z = sum_q
    full = width // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(full * TAIL, full + (width - full) * TAIL, BLOCK):
            columns = start + offsets
            z = load_logits(student, columns, width, student_scale, student_cap, STUDENT_CAPPED,
                            TAIL, APPROXIMATE)
            if HAS_TEACHER:
                q = present(z * student_unit, columns, width, TAIL)
                peak_q, sum_q = add_to_logsumexp(peak_q, sum_q, q)
                p = load_logits(teacher, columns, width, teacher_scale, teacher_cap,
                                TEACHER_CAPPED, TAIL, APPROXIMATE)
                p = present(p * teacher_unit, columns, width, TAIL)
                peak_p, sum_p = add_to_logsumexp(peak_p, sum_p, p)
            if HAS_Z:
                if not STUDENT_CAPPED:
                    z *= student_scale
                z = present(z, columns, width, TAIL)
                peak_z, sum_z = add_to_logsumexp(peak_z, sum_z, z)
    if HAS_TEACHER:
        store_logsumexp(rows, row, tokens, peak_q, sum_q)
        store_logsumexp(rows + 2 * tokens, row, tokens, peak_p, sum_p)
        rows += 4 * tokens
    if HAS_Z:
        store_logsumexp(rows, row, tokens, peak_z, sum_z)


@triton.jit(do_not_specialize=ROWS)
def assistant_kernel(
    student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, numbers, out, tokens,
    width, student_scale, student_unit, student_cap, teacher_scale, teacher_unit, teacher_cap,
    c, inverse_c, lam, log_lam, log_rest, power,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, PER_TOKEN: tl.constexpr,
    MIXTURE: tl.constexpr, SERIES: tl.constexpr, POWERED: tl.constexpr, APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):
    """out [2, n] = log Σ r̃ over this shard's columns: its peak and the logarithm of the rest."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    peak_p, rest_p = load_pair(log_p_norm, row, tokens)
    peak_q, rest_q = load_pair(log_q_norm, row, tokens)
    if PER_TOKEN:
        c, inverse_c, lam, log_lam, log_rest = load_mixture(numbers, row, tokens)
    offsets = block_columns(BLOCK, VECTOR)
    peak = tl.full((BLOCK // VECTOR, 1), 0.5 * ZERO_LOG, tl.float32)
    sum_r = tl.zeros((BLOCK // VECTOR, 1), tl.float32)
    full = width // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(full * TAIL, full + (width - full) * TAIL, BLOCK):
            columns = start + offsets
            log_q = load_log_probs(student, columns, width, student_scale, student_unit,
                                   student_cap, peak_q, rest_q, STUDENT_CAPPED, TAIL, APPROXIMATE)
            log_p = load_log_probs(teacher, columns, width, teacher_scale, teacher_unit,
                                   teacher_cap, peak_p, rest_p, TEACHER_CAPPED, TAIL, APPROXIMATE)
            log_r, _, _ = log_mixture(log_p, log_q, c, inverse_c, lam, log_lam, log_rest, power,
                                      MIXTURE, SERIES, POWERED, APPROXIMATE)
            new, r, rescale = to_peak(peak, log_r)
            peak = new
            sum_r = sum_r * rescale + total(r)
    store_mixture_sum(out, row, tokens, peak, sum_r)


@triton.jit(do_not_specialize=ROWS)
def kl_moments_kernel(
    student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, numbers, out, tokens,
    width, student_scale, student_unit, student_cap, teacher_scale, teacher_unit, teacher_cap,
    c, inverse_c, lam, log_lam, log_rest, power, pr, qr, rp, rq,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, PER_TOKEN: tl.constexpr,
    MOVES: tl.constexpr, MIXTURE: tl.constexpr, SERIES: tl.constexpr, POWERED: tl.constexpr,
    PR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr, RQ: tl.constexpr, ONLY_P: tl.constexpr,
    ONLY_Q: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):
    """out [9, n] = the moments of KL (moments.py), r̃ summed against its running maximum."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    peak_p, rest_p = load_pair(log_p_norm, row, tokens)
    peak_q, rest_q = load_pair(log_q_norm, row, tokens)
    only_p, only_q = 0.0, 0.0
    if PER_TOKEN:
        c, inverse_c, lam, log_lam, log_rest = load_mixture(numbers, row, tokens)
        pr, qr, rp, rq = load_orders(numbers, row, tokens)
        only_p, only_q = load_directions(numbers, row, tokens)
    offsets = block_columns(BLOCK, VECTOR)
    peak = tl.full((BLOCK // VECTOR, 1), 0.5 * ZERO_LOG, tl.float32)
    sum_r = tl.zeros((BLOCK // VECTOR, 1), tl.float32)
    # Σ r̃w, Σ r̃T, Σ r̃wT, divided by Σ r̃ at the end.
    w_r = sum_r
    t_r = sum_r
    wt_r = sum_r
    of_p = sum_r
    of_q = sum_r
    w_models = sum_r
    excess = sum_r
    apart = sum_r
    full = width // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(full * TAIL, full + (width - full) * TAIL, BLOCK):
            columns = start + offsets
            log_q = load_log_probs(student, columns, width, student_scale, student_unit,
                                   student_cap, peak_q, rest_q, STUDENT_CAPPED, TAIL, APPROXIMATE)
            log_p = load_log_probs(teacher, columns, width, teacher_scale, teacher_unit,
                                   teacher_cap, peak_p, rest_p, TEACHER_CAPPED, TAIL, APPROXIMATE)
            log_r, _, w = log_mixture(log_p, log_q, c, inverse_c, lam, log_lam, log_rest, power,
                                      MIXTURE, SERIES, POWERED, APPROXIMATE)
            apart = most_apart(apart, log_p, log_q, only_p, only_q, ONLY_P, ONLY_Q, PER_TOKEN)
            peak, r, rescale = to_peak(peak, log_r)
            sum_r = sum_r * rescale + total(r)
            if MOVES:
                w_r = w_r * rescale + total(r * w)
            if RP or RQ:
                t = r * (rp * (log_r - log_p) + rq * (log_r - log_q))
                t_r = t_r * rescale + total(t)
                if MOVES:
                    wt_r = wt_r * rescale + total(t * w)
            if PR or RP:
                p = tl.exp2(log_p)
                excess += (rp - pr) * total(p)
                if PR:
                    of_p += total(p * (log_p - log_r))
                    if MOVES:
                        w_models += pr * total(p * w)
            if QR or RQ:
                q = tl.exp2(log_q)
                excess += (rq - qr) * total(q)
                if QR:
                    of_q += total(q * (log_q - log_r))
                    if MOVES:
                        w_models += qr * total(q * w)
    share = store_mixture_sum(out, row, tokens, peak, sum_r)
    tl.store(out + 2 * tokens + row, tl.sum(w_r * share))
    tl.store(out + 3 * tokens + row, tl.sum(t_r * share) * LN_2)
    tl.store(out + 4 * tokens + row, tl.sum(wt_r * share) * LN_2)
    pull = qr * LN_2 * tl.sum(of_q)
    value = infinite_if_apart(pr * LN_2 * tl.sum(of_p) + pull, apart)
    tl.store(out + 5 * tokens + row, value)
    tl.store(out + 6 * tokens + row, pull)
    tl.store(out + 7 * tokens + row, tl.sum(w_models))
    tl.store(out + 8 * tokens + row, tl.sum(excess))


@triton.jit(do_not_specialize=ROWS)
def sums_kernel(
    student, student_stride, teacher, teacher_stride, log_p_norm, log_q_norm, log_assistant,
    numbers, out, tokens, width, student_scale, student_unit, student_cap, teacher_scale,
    teacher_unit, teacher_cap, c, inverse_c, lam, log_lam, log_rest, power, pr, qr, rp, rq, x, y,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, PER_TOKEN: tl.constexpr,
    HAS_ASSISTANT: tl.constexpr, MOVES: tl.constexpr, MIXTURE: tl.constexpr, SERIES: tl.constexpr,
    POWERED: tl.constexpr, DIVERGENCE: tl.constexpr, BALANCED: tl.constexpr, PR: tl.constexpr,
    QR: tl.constexpr, RP: tl.constexpr, RQ: tl.constexpr, ONLY_P: tl.constexpr,
    ONLY_Q: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):
    """out [4, n] = ΣD, ΣA, Σ(wA + B), Σwr over this shard's columns; ΣA only where it is used,
    under MOVES."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    peak_p, rest_p = load_pair(log_p_norm, row, tokens)
    peak_q, rest_q = load_pair(log_q_norm, row, tokens)
    peak_r, rest_r = load_assistant(log_assistant, row, tokens, HAS_ASSISTANT)
    only_p, only_q = 0.0, 0.0
    if PER_TOKEN:
        c, inverse_c, lam, log_lam, log_rest = load_mixture(numbers, row, tokens)
        pr, qr, rp, rq = load_orders(numbers, row, tokens)
        only_p, only_q = load_directions(numbers, row, tokens)
    offsets = block_columns(BLOCK, VECTOR)
    sum_d = tl.zeros((BLOCK // VECTOR, 1), tl.float32)
    sum_a = sum_d
    sum_x = sum_d
    sum_w_r = sum_d
    apart = sum_d
    full = width // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(full * TAIL, full + (width - full) * TAIL, BLOCK):
            columns = start + offsets
            log_q = load_log_probs(student, columns, width, student_scale, student_unit,
                                   student_cap, peak_q, rest_q, STUDENT_CAPPED, TAIL, APPROXIMATE)
            log_p = load_log_probs(teacher, columns, width, teacher_scale, teacher_unit,
                                   teacher_cap, peak_p, rest_p, TEACHER_CAPPED, TAIL, APPROXIMATE)
            log_r, r, w = assistant(log_p, log_q, peak_r, rest_r, c, inverse_c, lam, log_lam,
                                    log_rest, power, MIXTURE, SERIES, POWERED, HAS_ASSISTANT,
                                    APPROXIMATE)
            d, a, b = objective_terms(log_p, log_q, log_r, r, pr, qr, rp, rq, x, y, DIVERGENCE,
                                      BALANCED, PER_TOKEN, PR, QR, RP, RQ)
            apart = most_apart(apart, log_p, log_q, only_p, only_q, ONLY_P, ONLY_Q, PER_TOKEN)
            sum_d += total(d)
            if MOVES:
                sum_a += total(a)
                sum_w_r += total(w * r)
                b += w * a
            sum_x += total(b)
    tl.store(out + row, infinite_if_apart(tl.sum(sum_d), apart))
    tl.store(out + tokens + row, tl.sum(sum_a))
    tl.store(out + 2 * tokens + row, tl.sum(sum_x))
    tl.store(out + 3 * tokens + row, tl.sum(sum_w_r))


@triton.jit(do_not_specialize=ROWS)
def gradient_kernel(
    student, student_stride, teacher, teacher_stride, gradient, gradient_stride,
    log_p_norm, log_q_norm, log_assistant, sums, residuals, kd_scale, ce_scale, label_scale,
    log_z_norm, labels, numbers, tokens, width, inverse_tau, student_scale, student_unit,
    student_cap, teacher_scale, teacher_unit, teacher_cap, c, inverse_c, lam, log_lam, log_rest,
    power, pr, qr, rp, rq, x, y,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, PER_TOKEN: tl.constexpr,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, SAMPLED: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, HAS_ASSISTANT: tl.constexpr, MOVES: tl.constexpr, MIXTURE: tl.constexpr,
    SERIES: tl.constexpr, POWERED: tl.constexpr, DIVERGENCE: tl.constexpr, BALANCED: tl.constexpr,
    PR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr, RQ: tl.constexpr,
    APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):
    """gradient [n, width] = kd_scale (wA + B - ΣA w r - q Σg)/τ + ce_scale (softmax(z) - onehot),
    under SAMPLED + label_scale (onehot - q)/τ, through cap and scale. Each element is read before
    it is written, so it may be the student's logits."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    if HAS_KD or SAMPLED:
        peak_q, rest_q = load_pair(log_q_norm, row, tokens)
    if HAS_KD:
        peak_p, rest_p = load_pair(log_p_norm, row, tokens)
        peak_r, rest_r = load_assistant(log_assistant, row, tokens, HAS_ASSISTANT)
        if DIVERGENCE == DIVERGENCE_CONCRETE_SCORE:
            inverse_first, inverse_second, centre, half = load_centres(residuals, row, tokens)
        sum_a = tl.load(sums + tokens + row)
        sum_g = tl.load(sums + 2 * tokens + row) - sum_a * tl.load(sums + 3 * tokens + row)
        of_kd = tl.load(kd_scale + row) * inverse_tau * student_scale
    if HAS_CE:
        peak_z, rest_z = load_pair(log_z_norm, row, tokens)
        of_ce = tl.load(ce_scale + row) * student_scale
    if SAMPLED:
        of_label = tl.load(label_scale + row) * inverse_tau * student_scale
    if HAS_CE or SAMPLED:
        label = tl.load(labels + row)
    if PER_TOKEN:
        c, inverse_c, lam, log_lam, log_rest = load_mixture(numbers, row, tokens)
        pr, qr, rp, rq = load_orders(numbers, row, tokens)
    offsets = block_columns(BLOCK, VECTOR)
    full = width // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(full * TAIL, full + (width - full) * TAIL, BLOCK):
            columns = start + offsets
            z = load_logits(student, columns, width, student_scale, student_cap, STUDENT_CAPPED,
                            TAIL, APPROXIMATE)
            g = tl.zeros_like(z)
            if HAS_KD:
                log_q = log2_probability(z, student_unit, peak_q, rest_q, columns, width, TAIL)
                log_p = load_log_probs(teacher, columns, width, teacher_scale, teacher_unit,
                                       teacher_cap, peak_p, rest_p, TEACHER_CAPPED, TAIL,
                                       APPROXIMATE)
                if DIVERGENCE == DIVERGENCE_CONCRETE_SCORE:
                    g += of_kd * score_slope(log_p, log_q, inverse_first, inverse_second, centre,
                                             half, FIRST, SECOND)
                else:
                    log_r, r, w = assistant(log_p, log_q, peak_r, rest_r, c, inverse_c, lam,
                                            log_lam, log_rest, power, MIXTURE, SERIES, POWERED,
                                            HAS_ASSISTANT, APPROXIMATE)
                    _, a, b = objective_terms(log_p, log_q, log_r, r, pr, qr, rp, rq, x, y,
                                              DIVERGENCE, BALANCED, PER_TOKEN, PR, QR, RP, RQ)
                    if MOVES:
                        b += w * (a - sum_a * r)
                    g += scaled_slope(of_kd, b - sum_g * tl.exp2(log_q), DIVERGENCE)
            if HAS_CE or SAMPLED:
                onehot = tl.where(columns == label, 1.0, 0.0)
            if SAMPLED:
                log_q = log2_probability(z, student_unit, peak_q, rest_q, columns, width, TAIL)
                g += of_label * (onehot - tl.exp2(log_q))
            if HAS_CE:
                unit = 1.0 if STUDENT_CAPPED else student_scale
                g += of_ce * (tl.exp2((z * unit - peak_z) * LOG2_E - rest_z) - onehot)
            if STUDENT_CAPPED:
                g *= 1.0 - (z / student_cap) * (z / student_cap)
            if TAIL:
                tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < width)
            else:
                tl.store(gradient + columns, g.to(gradient.dtype.element_ty))
