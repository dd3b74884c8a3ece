"""The arguments of the Triton formulas (kernel_math.py), from an objective.

In capitals what a kernel is compiled for; the rest may change from call to call, or from token to
token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amid_ds.losses.divergences import KL, NEAR_ZERO, AlphaBeta, ConcreteScore, Divergence
from amid_ds.losses.kernel_math import (
    DIVERGENCE_ALPHA_BETA,
    DIVERGENCE_ALPHA_BETA_BY_SUM,
    DIVERGENCE_ALPHA_BETA_BY_X,
    DIVERGENCE_ALPHA_BETA_BY_Y,
    DIVERGENCE_CODES,
    DIVERGENCE_LOG_SQUARES,
    MIXTURE_ARITHMETIC,
    MIXTURE_GEOMETRIC,
    MIXTURE_POWER,
    MIXTURE_STUDENT,
    MIXTURE_TEACHER,
)
from amid_ds.losses.kernel_residuals import WEIGHT_CODES
from amid_ds.losses.objective import ORDERS, Number, ResolvedObjective

# |c| from which no x needs the series: log₂(1 + e)/c is then exact to 2⁻²¹.
SERIES_NEEDED_BELOW = 0.5
# A λ or 1 - λ below it makes a mixture whose logarithm λp + (1-λ)q, in fp32, does not give.
LEAST_SHARE = 2.0**-20
# The |c| that is 0 in `token_numbers`: a power of 2, with which c (log p - log q)/c is exact.
LEAST_C = 2.0**-60
# log λ for λ = 0: below c (log p - log q) even where one of the two is LOG_ZERO.
LOG_OF_NO_SHARE = -1e37


def has_token_numbers(objective: ResolvedObjective) -> bool:
    """True if α, λ or a weight of an order differs from token to token."""
    numbers = (objective.alpha, objective.lam, *[weight for _, weight in objective.order_weights])
    return any(isinstance(number, Tensor) for number in numbers)


def mixture_arguments(objective: ResolvedObjective) -> dict[str, float]:
    """The arguments of `log_mixture`; zeros for numbers that are read from `token_numbers`."""
    powered = {"power": objective.power, "POWERED": objective.power != 1}
    if isinstance(objective.alpha, Tensor) or isinstance(objective.lam, Tensor):
        return {**dict.fromkeys(("c", "inverse_c", "lam", "log_lam", "log_rest"), 0.0), **powered,
                "MIXTURE": MIXTURE_POWER.value, "SERIES": True}
    c, lam = (1 - objective.alpha) / 2, objective.lam
    mixture = MIXTURE_POWER
    if lam in (0, 1):
        mixture = MIXTURE_TEACHER if lam else MIXTURE_STUDENT
    elif c == 0:
        mixture = MIXTURE_GEOMETRIC
    elif (c == 1 and LEAST_SHARE <= lam <= 1 - LEAST_SHARE and objective.power == 1
          and not isinstance(objective.resolved_divergence, AlphaBeta)):
        # Powers of r tell apart what is below LEAST.
        mixture = MIXTURE_ARITHMETIC
    # Finite numbers also where they are not used.
    log_lam, log_rest = (log if math.isfinite(log) else 0.0 for log in objective.log_weights)
    return {"c": c, "inverse_c": 1 / c if c else 0.0, "lam": float(lam), "log_lam": log_lam,
            "log_rest": log_rest, **powered, "MIXTURE": mixture.value,
            "SERIES": mixture is MIXTURE_POWER and abs(c) < SERIES_NEEDED_BELOW}


def token_numbers(objective: ResolvedObjective, like: Tensor) -> Tensor | None:
    """[11, n] fp32: c, 1/c, λ, log λ, log(1-λ), the weights of the orders, only_p and only_q.

    None if no number of the objective is of one token alone. like: any fp32 tensor [n] of the
    block's device. They make MIXTURE_POWER with its series of every α and λ: at λ = 0 and 1 the
    logarithm of a share of 0 is so low that r is q or p to the last bit; at α = 1 c is so small
    that the series is λx, and below 0, so that r has no probability where one model has none.
    """
    weights = dict(objective.order_weights)
    if not has_token_numbers(objective):
        return None
    # A number is filled in: a tensor made of it would be copied, for which the host waits.
    alpha, lam, *orders = (
        number.float() if isinstance(number, Tensor) else torch.full_like(like, number)
        for number in (objective.alpha, objective.lam, *[weights.get(name, 0.0) for name in ORDERS])
    )
    c = (1 - alpha) / 2
    c = torch.where(c.abs() < LEAST_C, -LEAST_C, c)
    log_lam, log_rest = (log.clamp(min=LOG_OF_NO_SHARE) for log in (lam.log(), (-lam).log1p()))
    only = infinite_directions(objective.resolved_divergence, alpha, lam,
                               dict(zip(ORDERS, orders, strict=True)))
    directions = [torch.as_tensor(direction, dtype=torch.float32) for direction in only]
    return torch.stack([c, 1 / c, lam, log_lam, log_rest, *orders, *directions])


def order_arguments(objective: ResolvedObjective) -> dict[str, float]:
    """The weights of the orders, and in capitals True for those above 0 at some token."""
    weights = dict(objective.order_weights)
    numbers = {order: 0.0 if isinstance(weight, Tensor) else weight
               for order, weight in weights.items()}
    return {**{order: numbers.get(order, 0.0) for order in ORDERS},
            **{order.upper(): order in weights for order in ORDERS}}


def divergence_arguments(objective: ResolvedObjective) -> dict[str, float]:
    """The arguments x, y, DIVERGENCE and BALANCED of `objective_terms`."""
    divergence = objective.resolved_divergence
    x, y, code = 1.0, 1.0, DIVERGENCE_CODES[type(divergence)]
    if isinstance(divergence, AlphaBeta):
        x, y = float(divergence.alpha), float(divergence.beta)
        code = _alpha_beta_code(x, y)
    return {"x": x, "y": y, "DIVERGENCE": code, "BALANCED": is_balanced(objective)}


def weight_arguments(objective: ResolvedObjective) -> dict[str, int]:
    """FIRST and SECOND, the weights of a concrete score."""
    divergence = objective.resolved_divergence
    if not isinstance(divergence, ConcreteScore):
        return {"FIRST": 0, "SECOND": 0}
    return {"FIRST": WEIGHT_CODES[divergence.first], "SECOND": WEIGHT_CODES[divergence.second]}


def score_weight(objective: ResolvedObjective) -> Number:
    """The weight of D(p‖q), either way round, in an objective of a concrete score at an end of λ:
    there each order is that, or 0 = D(r‖r)."""
    other = "p" if objective.lam == 0 else "q"
    return sum(weight for order, weight in objective.order_weights if other in order)


def _alpha_beta_code(x: float, y: float) -> int:
    """The DIVERGENCE of AlphaBeta(x, y), whose value is divided by what is not small."""
    if min(x, y) >= NEAR_ZERO:
        return DIVERGENCE_ALPHA_BETA.value
    if x == y == 0:
        return DIVERGENCE_LOG_SQUARES.value
    if abs(x + y) >= NEAR_ZERO:
        return DIVERGENCE_ALPHA_BETA_BY_SUM.value
    return (DIVERGENCE_ALPHA_BETA_BY_X if abs(x) >= abs(y) else DIVERGENCE_ALPHA_BETA_BY_Y).value


def is_balanced(objective: ResolvedObjective) -> bool:
    """True for κ_pr KL(p‖m) + κ_qr KL(q‖m) with m = λp + (1-λ)q and κ_pr : κ_qr = λ : 1-λ.

    The generalised Jensen-Shannon divergence, at whose m its derivative with respect to r is 0.
    """
    weights, lam = dict(objective.order_weights), objective.lam
    return (not has_token_numbers(objective)
            and isinstance(objective.resolved_divergence, KL) and set(weights) == {"pr", "qr"}
            and mixture_arguments(objective)["MIXTURE"] == MIXTURE_ARITHMETIC.value
            and math.isclose(weights["pr"] * (1 - lam), weights["qr"] * lam, rel_tol=1e-9))


def moves_assistant(objective: ResolvedObjective) -> bool:
    """True if a gradient flows through r."""
    fixed = not isinstance(objective.lam, Tensor) and objective.lam == 1
    return not (objective.detach_assistant or fixed or is_balanced(objective))


def infinite_arguments(objective: ResolvedObjective) -> dict[str, bool]:
    """ONLY_P, ONLY_Q: True if D is infinite where only the teacher, only the student says a token;
    with numbers per token, True if it may be at some token."""
    if has_token_numbers(objective):
        possible = any(objective.resolved_divergence.infinite_without)
        return {"ONLY_P": possible, "ONLY_Q": possible}
    only_p, only_q = infinite_directions(objective.resolved_divergence, objective.alpha,
                                         objective.lam, dict(objective.order_weights))
    return {"ONLY_P": bool(only_p), "ONLY_Q": bool(only_q)}


def infinite_directions(divergence: Divergence, alpha: Number, lam: Number,
                        weights: dict[str, Number]) -> tuple[Number, Number]:
    """(True if D is infinite where only the teacher says a token, the same of the student).

    Of numbers or of tensors [n]. r has no probability where neither model has any, and for α ≥ 1
    where one has none.
    """
    without_first, without_second = divergence.infinite_without
    mixed = (lam > 0) & (lam < 1)
    weighs = {order: weights.get(order, 0.0) > 0 for order in ORDERS}

    def infinite(said: str, other: str, end: int) -> Number:
        """Where `said` alone has some probability; r is `said` at this end of λ."""
        r_has, r_lacks = ((lam == end) | (mixed & (alpha < 1)),
                          (lam == 1 - end) | (mixed & (alpha >= 1)))
        found = mixed & False
        if without_second:
            found = found | (r_lacks & weighs[said + "r"]) | (r_has & weighs["r" + other])
        if without_first:
            found = found | (r_has & weighs[other + "r"]) | (r_lacks & weighs["r" + said])
        return found

    return infinite("p", "q", 1), infinite("q", "p", 0)
