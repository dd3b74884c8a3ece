"""The objective: divergences of teacher p, student q and their α-mixture r, as a frozen value.

The whole family of AMiD (arXiv 2510.15982) is five numbers and a name or two, so it is data here
and nothing else: the fused loss, the naive twin and the kernels all read the same object. A
divergence is a class of three formulas, its value and its derivatives with respect to the logarithm
of each argument; all else (the chain rule through r, the softmax, blocks, shards) is written once,
in block.py and the backends. The trade-off: only divergences that are sums over the vocabulary of a
function of (log a, log b) fit.

To add a divergence, write its class here,

    @register
    @dataclass(frozen=True)
    class PearsonChi2(Divergence):
        # D(a‖b) = Σ (a - b)² / b
        name = "pearson_chi2"

        def terms(self, a: LogProbs, b: LogProbs) -> Terms:
            difference = a.p - b.p
            d_a = 2 * a.p * difference / b.p
            return difference**2 / b.p, d_a, (b.p**2 - a.p**2) / b.p

and its formula as the paper has it in reference.py, for the naive twin:

    def _pearson_chi2(log_a: Tensor, log_b: Tensor, _: Divergence) -> Tensor:
        return ((log_a.exp() - log_b.exp()) ** 2 / log_b.exp()).sum(-1)

    FORMULAS = {..., "pearson_chi2": _pearson_chi2}

The tests go through every registered divergence: gradcheck and the comparison with the twin then
cover the new one. `AMiD(divergence="pearson_chi2")` and `divergence: pearson_chi2` in a recipe take
it; its dataclass fields are its parameters. backend="auto" runs it in plain torch until kernels.py
knows it.

Note on α: the published code maps every α ≥ 1 to 1; this package follows the paper's definition for
every real α.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from amid_ds.errors import InputError

# The logarithm of a probability that is 0, of a logit of -inf: 0 · LOG_ZERO is 0, where 0 · -inf
# would be NaN. Sums of many stay finite in fp32.
LOG_ZERO = -1e30
# Where one of two probabilities is 0 their log ratio is beyond this; finite logits' never is.
INFINITE_RATIO = 1e20

Terms = tuple[Tensor, Tensor, Tensor]
ORDERS = ("pr", "qr", "rp", "rq")


class LogProbs:
    """Logarithms of probabilities [n, tile], and the probabilities, made once for all formulas.

    LOG_ZERO for a probability of 0.
    """

    def __init__(self, log: Tensor) -> None:
        self.log = log
        # functools.cached_property takes a lock, which torch.compile cannot follow.
        self._p: Tensor | None = None

    @property
    def p(self) -> Tensor:
        """exp(log) [n, tile]."""
        if self._p is None:
            self._p = self.log.exp()
        return self._p


class Divergence:
    """D(a‖b) = Σ over the vocabulary of f(log a, log b).

    A subclass is a frozen dataclass with a `name` and `terms`, decorated with `@register` (see the
    module's docstring).
    """

    name: ClassVar[str]

    def terms(self, a: LogProbs, b: LogProbs) -> Terms:
        """(f, ∂f/∂log a, ∂f/∂log b) element by element, [n, tile] in the arguments' dtype.

        f may contain anything that sums to a constant over two distributions: choose the form that
        cancels least. Must not change a and b in place.
        """
        raise NotImplementedError


DIVERGENCES: dict[str, type[Divergence]] = {}


def register(cls: type[Divergence]) -> type[Divergence]:
    """Add a divergence to the registry under its name; a class decorator."""
    DIVERGENCES[cls.name] = cls
    return cls


@register
@dataclass(frozen=True)
class KL(Divergence):
    """D_KL(a‖b) = Σ a (log a - log b).

    Summed as Σ [a (log a - log b) - a + b]: equal, and free of first-order rounding. 0·log 0 is 0;
    infinite where a has some probability and b has none.
    """

    name = "kl"

    def terms(self, a: LogProbs, b: LogProbs) -> Terms:
        ratio = a.log - b.log
        infinite = ratio > INFINITE_RATIO
        d_a = ratio.mul_(a.p)
        d_b = b.p - a.p
        return (d_a + d_b).masked_fill_(infinite, math.inf), d_a, d_b


@register
@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """D_AB(a‖b) = -1/(xy) Σ [a^x b^y - x/(x+y) a^(x+y) - y/(x+y) b^(x+y)], ABKD (arXiv 2505.04560).

    x = `alpha`, y = `beta`. Raises InputError if x, y or x + y is 0: the formula has no value then.
    """

    alpha: float
    beta: float
    name = "alpha_beta"

    def __post_init__(self) -> None:
        x, y = _number("AlphaBeta's alpha", self.alpha), _number("AlphaBeta's beta", self.beta)
        if x == 0 or y == 0 or x + y == 0:
            raise InputError(
                f"AlphaBeta(alpha={x}, beta={y})", "alpha, beta and alpha + beta different from 0",
                "take a value near the limit, or divergence='kl', which is the limit (1, 0)")

    def terms(self, a: LogProbs, b: LogProbs) -> Terms:
        x, y = self.alpha, self.beta
        if x + y < 0:
            # Where neither has any probability, the powers are infinite and their sum is 0.
            neither = torch.maximum(a.log, b.log) < -INFINITE_RATIO
            a, b = (LogProbs(each.log.masked_fill(neither, 0.0)) for each in (a, b))
        both = (x * a.log + y * b.log).exp()
        d_a = (((x + y) * a.log).exp() - both) / y
        d_b = (((x + y) * b.log).exp() - both) / x
        return (d_a + d_b) / (x + y), d_a, d_b


@register
@dataclass(frozen=True)
class TotalVariation(Divergence):
    """D_TV(a‖b) = ½ Σ |a - b|."""

    name = "total_variation"

    def terms(self, a: LogProbs, b: LogProbs) -> Terms:
        difference = a.p - b.p
        half_sign = 0.5 * torch.sign(difference)
        return half_sign * difference, half_sign * a.p, -half_sign * b.p


@register
@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """D_H²(a‖b) = ½ Σ (√a - √b)² = 1 - Σ √(ab)."""

    name = "squared_hellinger"

    def terms(self, a: LogProbs, b: LogProbs) -> Terms:
        root_a, root_b = (0.5 * a.log).exp(), (0.5 * b.log).exp()
        difference = root_a - root_b
        return 0.5 * difference.square(), 0.5 * root_a * difference, -0.5 * root_b * difference


def divergence_from(spec: Divergence | str | Mapping[str, Any]) -> Divergence:
    """The divergence of an instance, a name, or a recipe's `{name: {parameter: value}}`.

    Raises InputError for an unknown name or parameter.
    """
    if isinstance(spec, Divergence):
        return spec
    name: object = spec
    parameters: object = {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        name, parameters = next(iter(spec.items()))
    if (not isinstance(name, str) or name not in DIVERGENCES
            or not isinstance(parameters, Mapping)):
        raise InputError(f"the divergence {spec!r}", f"one of {', '.join(DIVERGENCES)}",
                         "check the spelling; parameters go as AlphaBeta(0.2, 0.7)")
    try:
        return DIVERGENCES[name](**parameters)
    except TypeError as error:
        raise InputError(f"the divergence {spec!r}: {error}",
                         "the divergence's own parameters and no others",
                         "e.g. AlphaBeta(alpha=0.2, beta=0.7), or "
                         "{alpha_beta: {alpha: 0.2, beta: 0.7}} in a recipe") from None


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
        _number("alpha", self.alpha)
        if not 0 <= _number("lam", self.lam) <= 1:
            raise InputError(f"lam={self.lam}", "the teacher's share, in [0, 1]",
                             "0 is the student alone, 1 the teacher")
        if _number("temperature", self.temperature) <= 0:
            raise InputError(f"temperature={self.temperature}", "a temperature above 0",
                             "1.0 leaves the logits alone")
        if not isinstance(self.detach_assistant, bool):
            raise InputError(f"detach_assistant={self.detach_assistant!r}", "True or False",
                             "the default is False")
        log_lam = math.log(self.lam) if self.lam > 0 else -math.inf
        log_rest = math.log1p(-self.lam) if self.lam < 1 else -math.inf
        # The dataclass is frozen: derived fields are set past its own __setattr__.
        object.__setattr__(self, "resolved_divergence", divergence_from(self.divergence))
        object.__setattr__(self, "order_weights", _order_weights(self.order))
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
    if not 0 < _number("beta", beta) < 1:
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


def _number(name: str, value: object) -> float:
    """`value`, if it is a finite real number; InputError otherwise."""
    if (isinstance(value, bool) or not isinstance(value, (int, float))
            or not math.isfinite(value)):
        raise InputError(f"{name}={value!r}", "a finite number",
                         f"give {name} as an int or a float")
    return value


def _order_weights(order: str | Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """(order, weight) of every order with a weight above 0."""
    weights = {order: 1.0} if isinstance(order, str) else order
    if (not isinstance(weights, Mapping) or not weights
            or any(key not in ORDERS for key in weights)):
        raise InputError(f"order={order!r}",
                         f"one of {', '.join(ORDERS)}, or a mapping from these to weights",
                         "e.g. order='pr', or order={'pr': 0.5, 'qr': 0.5}")
    negative = any(_number(f"order[{key!r}]", value) < 0 for key, value in weights.items())
    if negative or not any(weights.values()):
        raise InputError(f"order={order!r}", "weights of at least 0, one of them above 0",
                         "e.g. {'pr': 0.5, 'qr': 0.5}")
    return tuple((key, float(value)) for key, value in weights.items() if value)
