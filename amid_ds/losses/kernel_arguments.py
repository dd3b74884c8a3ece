"""The arguments of the Triton formulas (kernel_math.py), from an objective.

In capitals what a kernel is compiled for; the rest may change from call to call.
"""

from __future__ import annotations

import math

from amid_ds.losses.divergences import KL, NEAR_ZERO, AlphaBeta
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
from amid_ds.losses.objective import ORDERS, AMiD

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
    x, y, code = 1.0, 1.0, DIVERGENCE_CODES[type(divergence)]
    if isinstance(divergence, AlphaBeta):
        x, y = float(divergence.alpha), float(divergence.beta)
        code = _alpha_beta_code(x, y)
    return {"x": x, "y": y, "DIVERGENCE": code, "BALANCED": is_balanced(objective)}


def _alpha_beta_code(x: float, y: float) -> int:
    """The DIVERGENCE of AlphaBeta(x, y), whose value is divided by what is not small."""
    if min(x, y) >= NEAR_ZERO:
        return DIVERGENCE_ALPHA_BETA.value
    if x == y == 0:
        return DIVERGENCE_LOG_SQUARES.value
    if abs(x + y) >= NEAR_ZERO:
        return DIVERGENCE_ALPHA_BETA_BY_SUM.value
    return (DIVERGENCE_ALPHA_BETA_BY_X if abs(x) >= abs(y) else DIVERGENCE_ALPHA_BETA_BY_Y).value


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
    """ONLY_P, ONLY_Q: True if D is infinite where only the teacher, only the student says a token.

    r has no probability where neither model has any, and for α ≥ 1 where one has none.
    """
    lam, mixed = objective.lam, objective.lam not in (0, 1) and objective.alpha < 1
    without_first, without_second = objective.resolved_divergence.infinite_without

    def infinite(said: set[str]) -> bool:
        """True if an order is infinite where exactly these of p, q and r have some probability."""
        return any(without_first if order[1] in said else without_second
                   for order, _ in objective.order_weights
                   if (order[0] in said) != (order[1] in said))

    return {"ONLY_P": infinite({"p", "r"} if mixed or lam == 1 else {"p"}),
            "ONLY_Q": infinite({"q", "r"} if mixed or lam == 0 else {"q"})}
