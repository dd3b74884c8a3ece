"""Divergences of two distributions over the vocabulary, and their registry.

A divergence is a class of three formulas, its value and its derivatives with respect to the
logarithm of each argument; all else (the chain rule through r, the softmax, blocks, shards) is
written once, in block.py and the backends. The trade-off: only divergences that are sums over the
vocabulary of a function of (log a, log b) fit.

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
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
        x = finite_number("AlphaBeta's alpha", self.alpha)
        y = finite_number("AlphaBeta's beta", self.beta)
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


def finite_number(name: str, value: object) -> float:
    """`value`, if it is a finite real number; InputError otherwise."""
    if (isinstance(value, bool) or not isinstance(value, (int, float))
            or not math.isfinite(value)):
        raise InputError(f"{name}={value!r}", "a finite number",
                         f"give {name} as an int or a float")
    return value
