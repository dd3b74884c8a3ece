# mypy: disallow-untyped-defs=False
# (a Triton function's arguments have no Python types)
"""The formulas of the objective as Triton functions of one block of columns, and their arguments.

The kernels in kernel_programs.py call them. All arithmetic is fp32, and all logarithms are in bits:
2ˣ and log₂ are one instruction each on a GPU, eˣ and log several. The twins in plain torch are
`elementwise.mixture` and `Divergence.terms`.

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
    Divergence,
    SquaredHellinger,
    TotalVariation,
)
from amid_ds.losses.objective import ORDERS, AMiD

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
DIVERGENCE_CODES: dict[type[Divergence], int] = {
    KL: DIVERGENCE_KL.value,
    AlphaBeta: DIVERGENCE_ALPHA_BETA.value,
    TotalVariation: DIVERGENCE_TOTAL_VARIATION.value,
    SquaredHellinger: DIVERGENCE_SQUARED_HELLINGER.value,
}

# |x| below which the mixture is a series in x: its sixth-order term is then below fp32's rounding.
SERIES_LIMIT = tl.constexpr(0.125)
# |c| from which no x needs the series: log₂(1 + e)/c is then exact to 2⁻²¹.
SERIES_NEEDED_BELOW = 0.5
# A λ or 1 - λ below it makes a mixture whose logarithm λp + (1-λ)q, in fp32, does not give.
LEAST_SHARE = 2.0**-20


def mixture_arguments(objective: AMiD) -> dict[str, float]:
    """The arguments of `log_mixture`."""
    c, lam = (1 - objective.alpha) / 2, objective.lam
    mixture = MIXTURE_POWER
    if lam in (0, 1):
        mixture = MIXTURE_TEACHER if lam else MIXTURE_STUDENT
    elif c == 0:
        mixture = MIXTURE_GEOMETRIC
    elif c == 1 and LEAST_SHARE <= lam <= 1 - LEAST_SHARE and not isinstance(
            objective.resolved_divergence, AlphaBeta):
        # Powers of r tell apart what is below LEAST.
        mixture = MIXTURE_ARITHMETIC
    # Finite numbers also where they are not used.
    log_lam, log_rest = (log if math.isfinite(log) else 0.0 for log in objective.log_weights)
    return {"c": c, "inverse_c": 1 / c if c else 0.0, "lam": float(lam), "log_lam": log_lam,
            "log_rest": log_rest, "MIXTURE": mixture.value,
            "SERIES": mixture is MIXTURE_POWER and abs(c) < SERIES_NEEDED_BELOW}


def order_arguments(objective: AMiD) -> dict[str, float]:
    """The weights of the orders, and in capitals True for those above 0."""
    weights = dict(objective.order_weights)
    return {**{order: weights.get(order, 0.0) for order in ORDERS},
            **{order.upper(): order in weights for order in ORDERS}}


def divergence_arguments(objective: AMiD) -> dict[str, float]:
    """The arguments x, y, DIVERGENCE and BALANCED of `objective_terms`."""
    divergence = objective.resolved_divergence
    x, y = 1.0, 1.0
    if isinstance(divergence, AlphaBeta):
        x, y = divergence.alpha, divergence.beta
    return {"x": x, "y": y, "DIVERGENCE": DIVERGENCE_CODES[type(divergence)],
            "BALANCED": is_balanced(objective)}


def is_balanced(objective: AMiD) -> bool:
    """True for κ_pr KL(p‖m) + κ_qr KL(q‖m) with m = λp + (1-λ)q and κ_pr : κ_qr = λ : 1-λ.

    The generalised Jensen-Shannon divergence, at whose m its derivative with respect to r is 0.
    """
    weights, lam = dict(objective.order_weights), objective.lam
    return (isinstance(objective.resolved_divergence, KL) and set(weights) == {"pr", "qr"}
            and mixture_arguments(objective)["MIXTURE"] == MIXTURE_ARITHMETIC.value
            and math.isclose(weights["pr"] * (1 - lam), weights["qr"] * lam, rel_tol=1e-9))


def moves_assistant(objective: AMiD) -> bool:
    """True if a gradient flows through r."""
    return not (objective.detach_assistant or objective.lam == 1 or is_balanced(objective))


def infinite_arguments(objective: AMiD) -> dict[str, bool]:
    """ONLY_P, ONLY_Q: True if KL is infinite where only the teacher, only the student says a token.

    r has no probability where neither model has any, and for α ≥ 1 where one has none.
    """
    weights, mixed = dict(objective.order_weights), objective.lam not in (0, 1)
    if not isinstance(objective.resolved_divergence, KL):
        weights = {}
    r_without_p = objective.lam == 0 or (mixed and objective.alpha < 1)
    r_without_q = objective.lam == 1 or (mixed and objective.alpha < 1)
    return {"ONLY_P": bool(("pr" in weights and not r_without_q)
                           or ("rq" in weights and r_without_q)),
            "ONLY_Q": bool(("qr" in weights and not r_without_p)
                           or ("rp" in weights and r_without_p))}


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
def log_mixture(log_p, log_q, c, inverse_c, lam, log_lam, log_rest, MIXTURE: tl.constexpr,
                SERIES: tl.constexpr, APPROXIMATE: tl.constexpr):
    """(log₂ r̃, r̃ if it is made on the way, w = ∂log r̃/∂log q); see elementwise.mixture.

    Under SERIES a series in x replaces log1p and expm1 where |x| is small.
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
    return log_r, r, w


@triton.jit
def assistant(log_p, log_q, peak, rest, c, inverse_c, lam, log_lam, log_rest,
              MIXTURE: tl.constexpr, SERIES: tl.constexpr, HAS_ASSISTANT: tl.constexpr,
              APPROXIMATE: tl.constexpr):
    """(log₂ r, r, w = ∂log r̃/∂log q), given log Σ r̃ in two parts."""
    log_r, r, w = log_mixture(log_p, log_q, c, inverse_c, lam, log_lam, log_rest, MIXTURE, SERIES,
                              APPROXIMATE)
    if HAS_ASSISTANT:
        log_r = log_r - peak - rest
    if MIXTURE != MIXTURE_ARITHMETIC:
        r = tl.exp2(log_r)
    return log_r, r, w


@triton.jit
def divergence_terms(log_a, log_b, a, b, x, y, DIVERGENCE: tl.constexpr):
    """f, ∂f/∂log a and ∂f/∂log b, given also a and b; the twin of Divergence.terms, but finite
    where KL is infinite. x, y: AlphaBeta's numbers."""
    if DIVERGENCE == DIVERGENCE_KL:
        d_a = a * (log_a - log_b) * LN_2
        d_b = b - a
        value = d_a + d_b
    elif DIVERGENCE == DIVERGENCE_ALPHA_BETA:
        # Where neither has any probability, powers below 0 are infinite and their sum is 0.
        neither = (x + y < 0) & (tl.maximum(log_a, log_b) < -UNBOUNDED)
        log_a = tl.where(neither, 0.0, log_a)
        log_b = tl.where(neither, 0.0, log_b)
        both = tl.exp2(x * log_a + y * log_b)
        d_a = (tl.exp2((x + y) * log_a) - both) * (1.0 / y)
        d_b = (tl.exp2((x + y) * log_b) - both) * (1.0 / x)
        value = (d_a + d_b) * (1.0 / (x + y))
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
def objective_terms(log_p, log_q, log_r, r, pr, qr, rp, rq, x, y, DIVERGENCE: tl.constexpr,
                    BALANCED: tl.constexpr, PR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr,
                    RQ: tl.constexpr):
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
            value += pr * f
            a += pr * d_r
        if QR:
            f, d_q, d_r = divergence_terms(log_q, log_r, q, r, x, y, DIVERGENCE)
            value += qr * f
            a += qr * d_r
            b += qr * d_q
        if RP:
            f, d_r, _ = divergence_terms(log_r, log_p, r, p, x, y, DIVERGENCE)
            value += rp * f
            a += rp * d_r
        if RQ:
            f, d_r, d_q = divergence_terms(log_r, log_q, r, q, x, y, DIVERGENCE)
            value += rq * f
            a += rq * d_r
            b += rq * d_q
    return value, a, b
