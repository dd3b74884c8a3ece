# mypy: disallow-untyped-defs=False
# (a Triton function's arguments have no Python types)
"""The formulas of the objective as Triton functions of one block of columns, and their arguments.

The kernels in kernels.py call them. All arithmetic is fp32. The twins in plain torch are
`elementwise.mixture` and `Divergence.terms`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from amid_ds.losses.objective import (
    INFINITE_RATIO,
    KL,
    LOG_ZERO,
    ORDERS,
    AlphaBeta,
    AMiD,
    Divergence,
    SquaredHellinger,
    TotalVariation,
)

ZERO_LOG = tl.constexpr(LOG_ZERO)
UNBOUNDED = tl.constexpr(INFINITE_RATIO)

# The constexpr MIXTURE: r is the student, the teacher, or their mixture for α = 1 or any other α.
MIXTURE_STUDENT = tl.constexpr(0)
MIXTURE_TEACHER = tl.constexpr(1)
MIXTURE_GEOMETRIC = tl.constexpr(2)
MIXTURE_POWER = tl.constexpr(3)

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


def mixture_arguments(objective: AMiD) -> dict[str, float]:
    """The arguments of `log_mixture`."""
    alpha, lam = objective.alpha, objective.lam
    if lam in (0, 1):
        mixture = MIXTURE_TEACHER if lam else MIXTURE_STUDENT
    elif alpha == 1:
        mixture = MIXTURE_GEOMETRIC
    else:
        mixture = MIXTURE_POWER
    # A finite logarithm at the ends of λ, where it is not used.
    return {"c": (1 - alpha) / 2, "lam": float(lam), "log_lam": math.log(lam) if lam else 0.0,
            "log_rest": math.log1p(-lam) if lam < 1 else 0.0, "MIXTURE": mixture.value}


def order_arguments(objective: AMiD) -> dict[str, float]:
    """The weights of the orders, and in capitals True for those above 0."""
    weights = dict(objective.order_weights)
    return {**{order: weights.get(order, 0.0) for order in ORDERS},
            **{order.upper(): order in weights for order in ORDERS}}


def divergence_arguments(objective: AMiD) -> dict[str, float]:
    """The arguments x, y and DIVERGENCE of `divergence_terms`."""
    divergence = objective.resolved_divergence
    x, y = 1.0, 1.0
    if isinstance(divergence, AlphaBeta):
        x, y = divergence.alpha, divergence.beta
    return {"x": x, "y": y, "DIVERGENCE": DIVERGENCE_CODES[type(divergence)]}


@triton.jit
def load_logits(pointer, offsets, mask, scale, cap, CAPPED: tl.constexpr):
    """Logits in fp32, scaled and capped; 0 where masked."""
    z = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(z / cap))
        tanh = (1.0 - e) / (1.0 + e)
        z = cap * tl.where(z < 0, -tanh, tanh)
    return z


@triton.jit
def at_least_log_zero(log):
    """ZERO_LOG for a logarithm of -inf; NaN stays."""
    return tl.where(log < ZERO_LOG, ZERO_LOG, log)


@triton.jit
def load_log_probs(pointer, offsets, mask, scale, cap, inverse_tau, peak, norm,
                   CAPPED: tl.constexpr):
    """Log-probabilities at the temperature, given their log-sum-exp in two parts."""
    z = load_logits(pointer, offsets, mask, scale, cap, CAPPED)
    return at_least_log_zero(z * inverse_tau - peak - norm)


@triton.jit
def infinite_where(value, infinite):
    """`value`, and infinity where `infinite` is true."""
    return tl.where(infinite, float("inf"), value)


@triton.jit
def add_to_logsumexp(peak, sums, x, mask):
    """Peak and Σ exp(… - peak), lane by lane, with the unmasked numbers x added."""
    x = tl.where(mask, x, -float("inf"))
    new = tl.maximum(peak, tl.max(x, 0))
    return new, sums * tl.exp(peak - new) + tl.exp(x - new)


@triton.jit
def load_pair(pointer, row, tokens):
    """A token's log-sum-exp of [2, n], in two parts: its peak and the logarithm of the rest."""
    return tl.load(pointer + row), tl.load(pointer + tokens + row)


@triton.jit
def log_mixture(log_p, log_q, c, lam, log_lam, log_rest, MIXTURE: tl.constexpr):
    """log r̃ and w = ∂log r̃/∂log q; see elementwise.mixture.

    Where |x| is small, a series in x replaces log1p and expm1.
    """
    w = tl.zeros_like(log_q)
    log_r = log_q
    if MIXTURE == MIXTURE_STUDENT:
        w = w + 1.0
    elif MIXTURE == MIXTURE_TEACHER:
        log_r = log_p
    elif MIXTURE == MIXTURE_GEOMETRIC:
        log_r = log_q + lam * (log_p - log_q)
        log_r = tl.where(log_r < ZERO_LOG / UNBOUNDED, ZERO_LOG, log_r)
        w = w + (1.0 - lam)
    else:
        x = c * (log_p - log_q)
        odds = log_rest - log_lam - x
        e = tl.exp(-tl.abs(odds))
        w = tl.where(odds >= 0, 1.0, e) / (1.0 + e)
        # log(1 + λ(eˣ - 1)) to the fifth order: the cumulants of a coin of chance λ.
        v = lam * (1.0 - lam)
        third = (1.0 - 2.0 * lam) / 6.0
        fourth = (1.0 - 6.0 * v) / 24.0
        fifth = x * (1.0 - 2.0 * lam) * (1.0 - 12.0 * v) / 120.0
        series = x * (lam + x * v * (0.5 + x * (third + x * (fourth + fifth))))
        larger = tl.where(odds < 0, log_p + log_lam / c, log_q + log_rest / c)
        far = larger + tl.log(1.0 + e) / c
        log_r = tl.where(tl.abs(x) < SERIES_LIMIT, log_q + series / c, far)
    return log_r, w


@triton.jit
def divergence_terms(log_a, log_b, x, y, DIVERGENCE: tl.constexpr):
    """f, ∂f/∂log a and ∂f/∂log b; the twin of Divergence.terms. x, y: AlphaBeta's numbers."""
    if DIVERGENCE == DIVERGENCE_KL:
        a = tl.exp(log_a)
        d_a = a * (log_a - log_b)
        d_b = tl.exp(log_b) - a
        value = infinite_where(d_a + d_b, log_a - log_b > UNBOUNDED)
    elif DIVERGENCE == DIVERGENCE_ALPHA_BETA:
        # Where neither has any probability, powers below 0 are infinite and their sum is 0.
        neither = (x + y < 0) & (tl.maximum(log_a, log_b) < -UNBOUNDED)
        log_a = tl.where(neither, 0.0, log_a)
        log_b = tl.where(neither, 0.0, log_b)
        both = tl.exp(x * log_a + y * log_b)
        d_a = (tl.exp((x + y) * log_a) - both) / y
        d_b = (tl.exp((x + y) * log_b) - both) / x
        value = (d_a + d_b) / (x + y)
    elif DIVERGENCE == DIVERGENCE_TOTAL_VARIATION:
        a = tl.exp(log_a)
        b = tl.exp(log_b)
        value = 0.5 * tl.abs(a - b)
        sign = tl.where(a > b, 0.5, tl.where(a < b, -0.5, 0.0))
        d_a = sign * a
        d_b = -sign * b
    else:
        tl.static_assert(DIVERGENCE == DIVERGENCE_SQUARED_HELLINGER)
        a = tl.exp(0.5 * log_a)
        b = tl.exp(0.5 * log_b)
        value = 0.5 * (a - b) * (a - b)
        d_a = 0.5 * a * (a - b)
        d_b = -0.5 * b * (a - b)
    return value, d_a, d_b


@triton.jit
def objective_terms(log_p, log_q, log_r, pr, qr, rp, rq, x, y, DIVERGENCE: tl.constexpr,
                    PR: tl.constexpr, QR: tl.constexpr, RP: tl.constexpr, RQ: tl.constexpr):
    """D, A = ∂D/∂log r and B = ∂D/∂log q, over the orders with their weights pr, qr, rp and rq."""
    value = tl.zeros_like(log_q)
    a = tl.zeros_like(log_q)
    b = tl.zeros_like(log_q)
    if PR:
        f, _, d_r = divergence_terms(log_p, log_r, x, y, DIVERGENCE)
        value += pr * f
        a += pr * d_r
    if QR:
        f, d_q, d_r = divergence_terms(log_q, log_r, x, y, DIVERGENCE)
        value += qr * f
        a += qr * d_r
        b += qr * d_q
    if RP:
        f, d_r, _ = divergence_terms(log_r, log_p, x, y, DIVERGENCE)
        value += rp * f
        a += rp * d_r
    if RQ:
        f, d_r, d_q = divergence_terms(log_r, log_q, x, y, DIVERGENCE)
        value += rq * f
        a += rq * d_r
        b += rq * d_q
    return value, a, b
