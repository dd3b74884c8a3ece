# mypy: disallow-untyped-defs=False
# (a Triton function's arguments have no Python types)
"""The formulas of the objective as Triton functions of one block of columns.

The kernels in kernel_programs.py call them, with the arguments that kernel_arguments.py makes of an
objective. All arithmetic is fp32, and all logarithms are in bits: 2ˣ and log₂ are one instruction
each on a GPU, eˣ and log several. The twins in plain torch are `mixture.mixture` and
`Divergence.terms`.

APPROXIMATE takes the GPU's own log₂ and reciprocal: a tenth of the instructions, for an error of
2⁻²² (tests/test_kernels_precision.py). That error is absolute where log₂ is near 0, which none of
the formulas minds: log₂(1 + e) is added to a logarithm that has been rounded as much, and both
kernels that read log₂ m of a mixture m see the same error, so that it cancels in q (log q/m - Σ…).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from amid_ds.losses.divergences import (
    INFINITE_RATIO,
    KL,
    LOG_ZERO,
    AlphaBeta,
    ConcreteScore,
    Divergence,
    SquaredHellinger,
    TotalVariation,
)

ZERO_LOG = tl.constexpr(LOG_ZERO)
UNBOUNDED = tl.constexpr(INFINITE_RATIO)
# A nat in bits, and back.
LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))
# The least normal fp32: a GPU's fast log₂ takes anything smaller for 0.
LEAST = tl.constexpr(2.0**-126)

# The constexpr MIXTURE: r is the student, the teacher, or their mixture for α = 1, α = -1 or any α.
MIXTURE_STUDENT = tl.constexpr(0)
MIXTURE_TEACHER = tl.constexpr(1)
MIXTURE_GEOMETRIC = tl.constexpr(2)
MIXTURE_ARITHMETIC = tl.constexpr(3)
MIXTURE_POWER = tl.constexpr(4)

# The constexpr DIVERGENCE.
DIVERGENCE_KL = tl.constexpr(0)
DIVERGENCE_ALPHA_BETA = tl.constexpr(1)
DIVERGENCE_TOTAL_VARIATION = tl.constexpr(2)
DIVERGENCE_SQUARED_HELLINGER = tl.constexpr(3)
# AlphaBeta where x or y is not well above 0: its value as a difference over x + y, over x, over y,
# and for x = y = 0.
DIVERGENCE_ALPHA_BETA_BY_SUM = tl.constexpr(4)
DIVERGENCE_ALPHA_BETA_BY_X = tl.constexpr(5)
DIVERGENCE_ALPHA_BETA_BY_Y = tl.constexpr(6)
DIVERGENCE_LOG_SQUARES = tl.constexpr(7)
# It has kernels of its own (kernel_residuals.py), but for the gradient.
DIVERGENCE_CONCRETE_SCORE = tl.constexpr(8)
DIVERGENCE_CODES: dict[type[Divergence], int] = {
    KL: DIVERGENCE_KL.value,
    AlphaBeta: DIVERGENCE_ALPHA_BETA.value,
    TotalVariation: DIVERGENCE_TOTAL_VARIATION.value,
    SquaredHellinger: DIVERGENCE_SQUARED_HELLINGER.value,
    ConcreteScore: DIVERGENCE_CONCRETE_SCORE.value,
}

# |x| below which the mixture is a series in x: its sixth-order term is then below fp32's rounding.
SERIES_LIMIT = tl.constexpr(0.125)


@triton.jit
def log2_of(x, APPROXIMATE: tl.constexpr):
    """log₂ x for x ≥ LEAST."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x],
                                         dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def reciprocal_of(x, APPROXIMATE: tl.constexpr):
    """1 / x."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x],
                                         dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def log_mixture(log_p, log_q, c, inverse_c, lam, log_lam, log_rest, power, MIXTURE: tl.constexpr,
                SERIES: tl.constexpr, POWERED: tl.constexpr, APPROXIMATE: tl.constexpr):
    """(log₂ r̃, r̃ if it is made on the way, w = ∂log r̃/∂log q); see mixture.mixture.

    Under SERIES a series in x replaces log1p and expm1 where |x| is small; under POWERED all is of
    r̃ to its power.
    """
    r = tl.zeros_like(log_q)
    w = tl.zeros_like(log_q)
    log_r = log_q
    if MIXTURE == MIXTURE_STUDENT:
        w += 1.0
    elif MIXTURE == MIXTURE_TEACHER:
        log_r = log_p
    elif MIXTURE == MIXTURE_GEOMETRIC:
        log_r = log_q + lam * (log_p - log_q)
        log_r = tl.where(log_r < ZERO_LOG / UNBOUNDED, ZERO_LOG, log_r)
        w += 1.0 - lam
    elif MIXTURE == MIXTURE_ARITHMETIC:
        of_q = (1.0 - lam) * tl.exp2(log_q)
        r = lam * tl.exp2(log_p) + of_q
        # Where r is 0 any finite logarithm will do; NaN stays.
        floor = tl.maximum(r, LEAST, propagate_nan=tl.PropagateNan.ALL)
        log_r = log2_of(floor, APPROXIMATE)
        w = of_q * reciprocal_of(floor, APPROXIMATE)
    else:
        x = c * (log_p - log_q)
        odds = (log_rest - log_lam) * LOG2_E - x
        e = tl.exp2(-tl.abs(odds))
        w = tl.where(odds < 0, e, 1.0) * reciprocal_of(1.0 + e, APPROXIMATE)
        larger = tl.where(odds < 0, log_p + log_lam * LOG2_E * inverse_c,
                          log_q + log_rest * LOG2_E * inverse_c)
        log_r = larger + log2_of(1.0 + e, APPROXIMATE) * inverse_c
        if SERIES:
            # log(1 + λ(eˣ - 1)) to the fifth order: the cumulants of a coin of chance λ.
            x *= LN_2
            v = lam * (1.0 - lam)
            third = (1.0 - 2.0 * lam) / 6.0
            fourth = (1.0 - 6.0 * v) / 24.0
            fifth = x * ((1.0 - 2.0 * lam) * (1.0 - 12.0 * v) / 120.0)
            series = x * (lam + x * v * (0.5 + x * (third + x * (fourth + fifth))))
            log_r = tl.where(tl.abs(x) < SERIES_LIMIT, log_q + series * (LOG2_E * inverse_c), log_r)
    if POWERED:
        tl.static_assert(MIXTURE != MIXTURE_ARITHMETIC)
        # Twice no probability is as much: a divergence of r and p there would be infinite.
        log_r = tl.where(log_r < ZERO_LOG / UNBOUNDED, ZERO_LOG, log_r * power)
        w *= power
    return log_r, r, w


@triton.jit
def assistant(log_p, log_q, peak, rest, c, inverse_c, lam, log_lam, log_rest, power,
              MIXTURE: tl.constexpr, SERIES: tl.constexpr, POWERED: tl.constexpr,
              HAS_ASSISTANT: tl.constexpr, APPROXIMATE: tl.constexpr):
    """(log₂ r, r, w = ∂log r̃/∂log q), given log Σ r̃ in two parts."""
    log_r, r, w = log_mixture(log_p, log_q, c, inverse_c, lam, log_lam, log_rest, power, MIXTURE,
                              SERIES, POWERED, APPROXIMATE)
    if HAS_ASSISTANT:
        log_r = log_r - peak - rest
    if MIXTURE != MIXTURE_ARITHMETIC:
        r = tl.exp2(log_r)
    return log_r, r, w


@triton.jit
def divided(first, second, u, k):
    """(first - second) / k, given ln first - ln second = k u; its limit for k = 0, and nothing
    cancels near it; see divergences._divided."""
    t = tl.abs(k * u)
    # (1 - e⁻ᵗ) / t to the fifth order.
    series = 1.0 - t * (1.0 / 2 - t * (1.0 / 6 - t * (1.0 / 24 - t * (1.0 / 120 - t / 720))))
    inverse_k = 1.0 / tl.where(k == 0, 1.0, tl.abs(k))
    rise = tl.where(t < 2 * SERIES_LIMIT, tl.abs(u) * series,
                    (1.0 - tl.exp2(-t * LOG2_E)) * inverse_k)
    return tl.maximum(first, second) * tl.where(u < 0, -rise, rise)


@triton.jit
def divergence_terms(log_a, log_b, a, b, x, y, DIVERGENCE: tl.constexpr):
    """f, ∂f/∂log a and ∂f/∂log b, given also a and b; the twin of Divergence.terms, but finite
    where KL is infinite. x, y: AlphaBeta's numbers."""
    if DIVERGENCE == DIVERGENCE_KL:
        d_a = a * (log_a - log_b) * LN_2
        d_b = b - a
        value = d_a + d_b
    elif DIVERGENCE == DIVERGENCE_ALPHA_BETA:
        both = tl.exp2(x * log_a + y * log_b)
        d_a = (tl.exp2((x + y) * log_a) - both) * (1.0 / y)
        d_b = (tl.exp2((x + y) * log_b) - both) * (1.0 / x)
        value = (d_a + d_b) * (1.0 / (x + y))
    elif DIVERGENCE >= DIVERGENCE_ALPHA_BETA_BY_SUM:
        s = x + y
        # Where neither has any probability, powers below 0 are infinite and their sum is 0.
        neither = (x + y < 0) & (tl.maximum(log_a, log_b) < -UNBOUNDED)
        log_a = tl.where(neither, 0.0, log_a)
        log_b = tl.where(neither, 0.0, log_b)
        u = (log_a - log_b) * LN_2
        if DIVERGENCE == DIVERGENCE_LOG_SQUARES:
            value = 0.5 * u * u
            d_a = u
            d_b = -u
        else:
            of_a = tl.exp2(s * log_a)
            of_b = tl.exp2(s * log_b)
            both = tl.exp2(x * log_a + y * log_b)
            d_a = divided(of_a, both, u, y)
            d_b = -divided(both, of_b, u, x)
            if DIVERGENCE == DIVERGENCE_ALPHA_BETA_BY_SUM:
                value = (d_a + d_b) * (1.0 / s)
            elif DIVERGENCE == DIVERGENCE_ALPHA_BETA_BY_X:
                value = (d_a - divided(of_a, of_b, u, s)) * (1.0 / x)
            else:
                value = (d_b + divided(of_a, of_b, u, s)) * (1.0 / y)
        # Infinite rather than ∞ - ∞ (`infinite_arguments`); NaN of the logits stays.
        value = tl.where((tl.abs(u) > UNBOUNDED) & (value != value), 0.0, value)
    elif DIVERGENCE == DIVERGENCE_TOTAL_VARIATION:
        value = 0.5 * tl.abs(a - b)
        sign = tl.where(a > b, 0.5, tl.where(a < b, -0.5, 0.0))
        d_a = sign * a
        d_b = -sign * b
    else:
        tl.static_assert(DIVERGENCE == DIVERGENCE_SQUARED_HELLINGER)
        a = tl.exp2(0.5 * log_a)
        b = tl.exp2(0.5 * log_b)
        value = 0.5 * (a - b) * (a - b)
        d_a = 0.5 * a * (a - b)
        d_b = -0.5 * b * (a - b)
    return value, d_a, d_b


@triton.jit
def weighted(weight, term, DIVERGENCE: tl.constexpr, PER_TOKEN: tl.constexpr):
    """weight · term; 0 where a token's own weight is, though the term be infinite."""
    # KL's terms are finite.
    if PER_TOKEN and DIVERGENCE != DIVERGENCE_KL:
        return tl.where(weight == 0, 0.0, weight * term)
    return weight * term


@triton.jit
def scaled_slope(scale, slope, DIVERGENCE: tl.constexpr):
    """scale · slope; 0 where a token's scale is, though an AlphaBeta of a power that is not well
    above 0 have an infinite slope."""
    if (DIVERGENCE >= DIVERGENCE_ALPHA_BETA_BY_SUM) & (DIVERGENCE <= DIVERGENCE_LOG_SQUARES):
        return tl.where(scale == 0, 0.0, scale * slope)
    return scale * slope


@triton.jit
def objective_terms(log_p, log_q, log_r, r, pr, qr, rp, rq, x, y, DIVERGENCE: tl.constexpr,
                    BALANCED: tl.constexpr, PER_TOKEN: tl.constexpr, PR: tl.constexpr,
                    QR: tl.constexpr, RP: tl.constexpr, RQ: tl.constexpr):
    """D, A = ∂D/∂log r and B = ∂D/∂log q, over the orders with their weights pr, qr, rp and rq."""
    p = tl.exp2(log_p)
    q = tl.exp2(log_q)
    value = tl.zeros_like(log_q)
    a = tl.zeros_like(log_q)
    b = tl.zeros_like(log_q)
    if BALANCED:
        # ∂D/∂log r is 0, and of the terms that only sum to 0 none is left.
        b = (qr * LN_2) * q * (log_q - log_r)
        value = (pr * LN_2) * p * (log_p - log_r) + b
    else:
        if PR:
            f, _, d_r = divergence_terms(log_p, log_r, p, r, x, y, DIVERGENCE)
            value += weighted(pr, f, DIVERGENCE, PER_TOKEN)
            a += weighted(pr, d_r, DIVERGENCE, PER_TOKEN)
        if QR:
            f, d_q, d_r = divergence_terms(log_q, log_r, q, r, x, y, DIVERGENCE)
            value += weighted(qr, f, DIVERGENCE, PER_TOKEN)
            a += weighted(qr, d_r, DIVERGENCE, PER_TOKEN)
            b += weighted(qr, d_q, DIVERGENCE, PER_TOKEN)
        if RP:
            f, d_r, _ = divergence_terms(log_r, log_p, r, p, x, y, DIVERGENCE)
            value += weighted(rp, f, DIVERGENCE, PER_TOKEN)
            a += weighted(rp, d_r, DIVERGENCE, PER_TOKEN)
        if RQ:
            f, d_r, d_q = divergence_terms(log_r, log_q, r, q, x, y, DIVERGENCE)
            value += weighted(rq, f, DIVERGENCE, PER_TOKEN)
            a += weighted(rq, d_r, DIVERGENCE, PER_TOKEN)
            b += weighted(rq, d_q, DIVERGENCE, PER_TOKEN)
    return value, a, b
