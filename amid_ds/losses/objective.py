"""The objective: divergences of teacher p, student q and their α-mixture r, as a frozen value.

The whole family of AMiD (arXiv 2510.15982) is five numbers and a name or two, so it is data here
and nothing else: the fused loss, the naive twin and the kernels all read the same object. The
divergences are in divergences.py.

Note on α: the published code maps every α ≥ 1 to 1; this package follows the paper's definition for
every real α.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from amid_ds.errors import InputError
from amid_ds.losses.divergences import AlphaBeta, Divergence, divergence_from, finite_number

ORDERS = ("pr", "qr", "rp", "rq")


@dataclass(frozen=True)
class AMiD:
    """The objective: weighted divergences of teacher p, student q, assistant r (arXiv 2510.15982).

    With c = (1 - α)/2 the assistant is, α = 1 being the limit,
        log r̃ = (1/c)·logaddexp(log λ + c·log p, log(1-λ) + c·log q),
        log r  = log r̃ - logsumexp(log r̃).
    α = -1 is the arithmetic mixture, 1 the geometric, 3 the harmonic; every real α is allowed.

    lam: the teacher's share λ in [0, 1]; 0 gives r = q, 1 gives r = p, both exact.
    divergence: `kl`, `total_variation`, `squared_hellinger`, an instance such as
        AlphaBeta(0.2, 0.7), or a mapping `{name: {parameter: value}}`.
    order: the two arguments, `pr` = D(p‖r), `qr`, `rp`, `rq`, or weights for several such as
        {"pr": 0.5, "qr": 0.5}.
    temperature: τ divides both models' logits before the softmax. No τ² factor is applied to the
        loss.
    detach_assistant: r is a fixed target, no gradient flows through it (TAID).
    Raises InputError (a ValueError) for anything else.
    """

    alpha: float = -1.0
    lam: float = 0.1
    divergence: Divergence | str | Mapping[str, Any] = "kl"
    order: str | Mapping[str, float] = "pr"
    temperature: float = 1.0
    detach_assistant: bool = False
    # What the backends read. `divergence` as an instance:
    resolved_divergence: Divergence = field(init=False, repr=False, compare=False)
    # (order, weight) of the orders with a weight above 0:
    order_weights: tuple[tuple[str, float], ...] = field(init=False, repr=False, compare=False)
    # log λ and log(1-λ):
    log_weights: tuple[float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        finite_number("alpha", self.alpha)
        if not 0 <= finite_number("lam", self.lam) <= 1:
            raise InputError(f"lam={self.lam}", "the teacher's share, in [0, 1]",
                             "0 is the student alone, 1 the teacher")
        if finite_number("temperature", self.temperature) <= 0:
            raise InputError(f"temperature={self.temperature}", "a temperature above 0",
                             "1.0 leaves the logits alone")
        if not isinstance(self.detach_assistant, bool):
            raise InputError(f"detach_assistant={self.detach_assistant!r}", "True or False",
                             "the default is False")
        log_lam = math.log(self.lam) if self.lam > 0 else -math.inf
        log_rest = math.log1p(-self.lam) if self.lam < 1 else -math.inf
        # The dataclass is frozen: derived fields are set past its own __setattr__.
        divergence, order_weights = divergence_from(self.divergence), _order_weights(self.order)
        if isinstance(divergence, AlphaBeta) and (as_kl := divergence.as_kl()):
            divergence, backwards = as_kl
            if backwards:
                order_weights = tuple((key[::-1], weight) for key, weight in order_weights)
        object.__setattr__(self, "resolved_divergence", divergence)
        object.__setattr__(self, "order_weights", order_weights)
        object.__setattr__(self, "log_weights", (log_lam, log_rest))


def preset(name: str, **parameters: Any) -> AMiD:
    """A published special case as a point of the family; `lam` is always the teacher's share.

    fkl: KL(p‖q)
    rkl: KL(q‖p)
    skl(lam=0.1): KL(p‖λp+(1-λ)q), DistiLLM (arXiv 2402.03898)
    srkl(lam=0.9): KL(q‖λp+(1-λ)q), DistiLLM, whose SRKL 0.1 is lam=0.9
    gkd(beta=0.5): β KL(p‖m) + (1-β) KL(q‖m), m = βp+(1-β)q, GKD (arXiv 2306.13649)
    taid(t): KL(r‖q), r = softmax(t·teacher + (1-t)·stopgrad(student)) of the logits, TAID
        (arXiv 2501.16937)
    abkd(alpha, beta): D_AB(p‖q), ABKD (arXiv 2505.04560)
    amid: AMiD's own parameters

    All take `temperature`. Raises InputError for an unknown name or parameter.
    """
    if name not in PRESETS:
        raise InputError(f"the preset {name!r}", f"one of {', '.join(PRESETS)}",
                         "check the spelling")
    try:
        return PRESETS[name](**parameters)
    except TypeError as error:
        raise InputError(f"preset({name!r}) with {parameters}: {error}",
                         "the preset's own parameters and no others",
                         "see the docstring of amid_ds.preset") from None


def _fkl(temperature: float = 1.0) -> AMiD:
    return AMiD(alpha=-1.0, lam=0.0, order="pr", temperature=temperature)


def _rkl(temperature: float = 1.0) -> AMiD:
    return AMiD(alpha=-1.0, lam=1.0, order="qr", temperature=temperature)


def _skl(lam: float = 0.1, temperature: float = 1.0) -> AMiD:
    return AMiD(alpha=-1.0, lam=lam, order="pr", temperature=temperature)


def _srkl(lam: float = 0.9, temperature: float = 1.0) -> AMiD:
    return AMiD(alpha=-1.0, lam=lam, order="qr", temperature=temperature)


def _gkd(beta: float = 0.5, temperature: float = 1.0) -> AMiD:
    if not 0 < finite_number("beta", beta) < 1:
        raise InputError(f"gkd with beta={beta}",
                         "beta strictly between 0 and 1: at the ends the divergence is 0",
                         "use preset('fkl') or preset('rkl'), the limits of the divergence divided "
                         "by beta or 1 - beta")
    return AMiD(alpha=-1.0, lam=beta, order={"pr": beta, "qr": 1 - beta}, temperature=temperature)


def _taid(t: float, temperature: float = 1.0) -> AMiD:
    return AMiD(alpha=1.0, lam=t, order="rq", temperature=temperature, detach_assistant=True)


def _abkd(alpha: float, beta: float, temperature: float = 1.0) -> AMiD:
    return AMiD(alpha=-1.0, lam=0.0, divergence=AlphaBeta(alpha, beta), order="pr",
                temperature=temperature)


PRESETS: dict[str, Callable[..., AMiD]] = {
    "fkl": _fkl, "rkl": _rkl, "skl": _skl, "srkl": _srkl, "gkd": _gkd, "taid": _taid,
    "abkd": _abkd, "amid": AMiD,
}


def _order_weights(order: str | Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """(order, weight) of every order with a weight above 0."""
    weights = {order: 1.0} if isinstance(order, str) else order
    if (not isinstance(weights, Mapping) or not weights
            or any(key not in ORDERS for key in weights)):
        raise InputError(f"order={order!r}",
                         f"one of {', '.join(ORDERS)}, or a mapping from these to weights",
                         "e.g. order='pr', or order={'pr': 0.5, 'qr': 0.5}")
    negative = any(finite_number(f"order[{key!r}]", value) < 0 for key, value in weights.items())
    if negative or not any(weights.values()):
        raise InputError(f"order={order!r}", "weights of at least 0, one of them above 0",
                         "e.g. {'pr': 0.5, 'qr': 0.5}")
    return tuple((key, float(value)) for key, value in weights.items() if value)
