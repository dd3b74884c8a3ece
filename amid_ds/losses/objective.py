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
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import Tensor

from amid_ds.errors import InputError
from amid_ds.losses.divergences import (
    AlphaBeta,
    ConcreteScore,
    Divergence,
    SampledReverseKL,
    divergence_from,
    finite_number,
)
from amid_ds.losses.measures import MEASURES, PerToken

ORDERS = ("pr", "qr", "rp", "rq")
SIDES = ("student", "teacher")

# Of the whole block, or [n] of its tokens.
Number: TypeAlias = "float | Tensor"


@dataclass(frozen=True)
class AMiD:
    """The objective: weighted divergences of teacher p, student q, assistant r (arXiv 2510.15982).

    With c = (1 - α)/2 the assistant is, α = 1 being the limit,
        log r̃ = (1/c)·logaddexp(log λ + c·log p, log(1-λ) + c·log q),
        log r  = power · log r̃ - logsumexp(power · log r̃).
    α = -1 is the arithmetic mixture, 1 the geometric, 3 the harmonic; every real α is allowed.

    alpha, lam, the weights in `order` and token_weight may be `PerToken`: they then follow, token
    by token, from a measure of both models, and are constants for the gradient.

    lam: the teacher's share λ in [0, 1]; 0 gives r = q, 1 gives r = p, both exact.
    divergence: the name of a registered one such as `kl`, an instance such as AlphaBeta(0.2, 0.7),
        or a mapping `{name: {parameter: value}}`.
    order: the two arguments, `pr` = D(p‖r), `qr`, `rp`, `rq`, or weights for several such as
        {"pr": 0.5, "qr": 0.5}.
    temperature: τ divides both models' logits before the softmax; {"student": τ, "teacher": τ} for
        two of them. No τ² factor is applied to the loss.
    detach_assistant: r is a fixed target, no gradient flows through it (TAID).
    power: exponents of p and q that need not sum to 1: p·q^β, normalised, is alpha=1,
        lam=1/(1+β), power=1+β. 1 is the paper's.
    token_weight: multiplies each token's weight, in the cross entropy too; the divisor of a mean is
        left alone.
    Raises InputError (a ValueError) for anything else.
    """

    alpha: float | PerToken = -1.0
    lam: float | PerToken = 0.1
    divergence: Divergence | str | Mapping[str, Any] = "kl"
    order: str | Mapping[str, float | PerToken] = "pr"
    temperature: float | Mapping[str, float] = 1.0
    detach_assistant: bool = False
    power: float = 1.0
    token_weight: PerToken | None = None
    # What the loss reads. `divergence` as an instance:
    resolved_divergence: Divergence = field(init=False, repr=False, compare=False)
    # (order, weight) of the orders with a weight above 0:
    order_weights: tuple[tuple[str, float | PerToken], ...] = field(init=False, repr=False,
                                                                    compare=False)
    student_temperature: float = field(init=False, repr=False, compare=False)
    teacher_temperature: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha)
        _check_number("lam", self.lam, 0.0, 1.0, "the teacher's share: 0 is the student alone")
        if not isinstance(self.detach_assistant, bool):
            raise InputError(f"detach_assistant={self.detach_assistant!r}", "True or False",
                             "the default is False")
        if finite_number("power", self.power) <= 0:
            raise InputError(f"power={self.power}", "a number above 0", "1.0 is the paper's")
        if self.token_weight is not None:
            if not isinstance(self.token_weight, PerToken):
                raise InputError(f"token_weight={self.token_weight!r}", "a PerToken, or None",
                                 "a constant goes into token_weights or kd_weight and ce_weight")
            _check_number("token_weight", self.token_weight, 0.0, may_choose=True)
        student, teacher = _temperatures(self.temperature)
        # The dataclass is frozen: derived fields are set past its own __setattr__.
        divergence, order_weights = divergence_from(self.divergence), _order_weights(self.order)
        if isinstance(divergence, AlphaBeta) and (as_kl := divergence.as_kl()):
            divergence, backwards = as_kl
            if backwards:
                order_weights = tuple((key[::-1], weight) for key, weight in order_weights)
        if isinstance(divergence, SampledReverseKL) and (
                (self.lam, self.power, order_weights) != (1, 1, (("qr", 1.0),))):
            raise InputError(f"the divergence {divergence.name!r} with lam={self.lam}, "
                             f"order={self.order!r} and power={self.power}",
                             "lam=1, order='qr' and power=1, which is KL(q‖p)",
                             "use preset('sampled_rkl')")
        object.__setattr__(self, "resolved_divergence", divergence)
        object.__setattr__(self, "order_weights", order_weights)
        object.__setattr__(self, "student_temperature", student)
        object.__setattr__(self, "teacher_temperature", teacher)

    @property
    def per_token(self) -> tuple[PerToken, ...]:
        """The numbers that follow from measures, each once."""
        numbers = (self.alpha, self.lam, self.token_weight, *dict(self.order_weights).values())
        return tuple(dict.fromkeys(x for x in numbers if isinstance(x, PerToken)))

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures that it reads, in the order of MEASURES."""
        read = {number.by for number in self.per_token}
        return tuple(name for name in MEASURES if name in read)

    @property
    def needs_sequences(self) -> bool:
        """True if the tokens of a sequence decide something together."""
        return any(number.needs_sequences for number in self.per_token)

    def resolved(self, values: Mapping[PerToken, Number]) -> ResolvedObjective:
        """The objective of n tokens, given the values, [n] say, of all of `per_token`."""
        def of(number: float | PerToken) -> Number:
            return values[number] if isinstance(number, PerToken) else number

        return ResolvedObjective(
            alpha=of(self.alpha), lam=of(self.lam),
            order_weights=tuple((order, of(weight)) for order, weight in self.order_weights),
            resolved_divergence=self.resolved_divergence, detach_assistant=self.detach_assistant,
            power=float(self.power))


@dataclass(frozen=True)
class ResolvedObjective:
    """AMiD for n tokens, as the backends read it: numbers, and [n] tensors where it is per token.

    Temperatures are the logits' (block.Logits), token weights the block's scales.
    """

    alpha: Number
    lam: Number
    # (order, weight) of the orders with a weight above 0 at some token.
    order_weights: tuple[tuple[str, Number], ...]
    resolved_divergence: Divergence
    detach_assistant: bool = False
    power: float = 1.0
    # log λ and log(1-λ); -inf for 0.
    log_weights: tuple[Number, Number] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.lam, Tensor):
            logs: tuple[Number, Number] = (self.lam.log(), torch.log1p(-self.lam))
        else:
            logs = (math.log(self.lam) if self.lam > 0 else -math.inf,
                    math.log1p(-self.lam) if self.lam < 1 else -math.inf)
        object.__setattr__(self, "log_weights", logs)


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
    veto(beta, order="rq"): KL(r‖q), r = p·stopgrad(q)^β normalised, or `qr`, KL(q‖r), Veto
        (arXiv 2601.07155)
    csd(first="student", second="student"): residuals of logits under these weights, concrete score
        distillation (arXiv 2509.25837)
    sampled_rkl(baseline="kl"): KL(q‖p) estimated from the labels, which the student has sampled
    amid: AMiD's own parameters

    All take `temperature`. Raises InputError for an unknown name or parameter.
    """
    if name not in PRESETS:
        raise InputError(f"the preset {name!r}", f"one of {', '.join(PRESETS)}",
                         "check the spelling")
    try:
        return PRESETS[name](**parameters)
    except TypeError as error:
        raise InputError(f"preset({name!r}) with {parameters}: {str(error).split('() ')[-1]}",
                         f"its own parameters, {', '.join(signature(PRESETS[name]).parameters)}",
                         "amid_ds/losses/README.md says what each preset is") from None


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


def _veto(beta: float, order: str = "rq", temperature: float = 1.0) -> AMiD:
    _check_number("beta", finite_number("beta", beta), 0.0)
    return AMiD(alpha=1.0, lam=1 / (1 + beta), power=1 + beta, order=order, temperature=temperature,
                detach_assistant=True)


def _csd(first: str = "student", second: str = "student", temperature: float = 1.0) -> AMiD:
    return AMiD(alpha=-1.0, lam=0.0, divergence=ConcreteScore(first, second), order="pr",
                temperature=temperature)


def _sampled_rkl(baseline: str = "kl", temperature: float = 1.0) -> AMiD:
    return AMiD(alpha=-1.0, lam=1.0, divergence=SampledReverseKL(baseline), order="qr",
                temperature=temperature)


PRESETS: dict[str, Callable[..., AMiD]] = {
    "fkl": _fkl, "rkl": _rkl, "skl": _skl, "srkl": _srkl, "gkd": _gkd, "taid": _taid,
    "abkd": _abkd, "csd": _csd, "sampled_rkl": _sampled_rkl, "veto": _veto, "amid": AMiD,
}


def _check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf,
                  meaning: str = "", may_choose: bool = False) -> None:
    """Raise InputError unless `value`, or both ends of a PerToken, are numbers from low to high.

    may_choose: a PerToken may have a `top`.
    """
    if isinstance(value, PerToken):
        if value.top is not None and not may_choose:
            raise InputError(f"{name}={value}", "linear and at", "top is for token_weight alone")
        ends = value.linear
    else:
        ends = (finite_number(name, value),) * 2
    if not all(low <= end <= high for end in ends):
        allowed = f"from {low:g}" + ("" if high == math.inf else f" to {high:g}")
        both = ", at both ends" if isinstance(value, PerToken) else ""
        raise InputError(f"{name}={value}", f"a number {allowed}{both}",
                         meaning or f"give {name} such numbers")


def _temperatures(temperature: object) -> tuple[float, float]:
    """The student's and the teacher's."""
    both: Mapping[str, Any] = (temperature if isinstance(temperature, Mapping)
                               else dict.fromkeys(SIDES, temperature))
    if set(both) != set(SIDES):
        raise InputError(f"temperature={temperature!r}", "a number, or one of each side",
                         'e.g. {"student": 2.0, "teacher": 1.0}')
    for value in both.values():
        if finite_number("temperature", value) <= 0:
            raise InputError(f"temperature={temperature}", "a temperature above 0",
                             "1.0 leaves the logits alone")
    return float(both["student"]), float(both["teacher"])


def _order_weights(order: str | Mapping[str, float | PerToken],
                   ) -> tuple[tuple[str, float | PerToken], ...]:
    """(order, weight) of every order with a weight above 0."""
    weights = {order: 1.0} if isinstance(order, str) else order
    if (not isinstance(weights, Mapping) or not weights
            or any(key not in ORDERS for key in weights)):
        raise InputError(f"order={order!r}",
                         f"one of {', '.join(ORDERS)}, or a mapping from these to weights",
                         "e.g. order='pr', or order={'pr': 0.5, 'qr': 0.5}")
    for key, value in weights.items():
        _check_number(f"order[{key!r}]", value, 0.0)
    used = tuple((key, value if isinstance(value, PerToken) else float(value))
                 for key, value in weights.items()
                 if (any(value.linear) if isinstance(value, PerToken) else value))
    if not used:
        raise InputError(f"order={order!r}", "weights of at least 0, one of them above 0",
                         "e.g. {'pr': 0.5, 'qr': 0.5}")
    return used
