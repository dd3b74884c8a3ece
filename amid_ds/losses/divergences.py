"""Divergences of two distributions over the vocabulary, and their registry.

A divergence is a class of three formulas, its value and its derivatives with respect to the
logarithm of each argument; all else (the chain rule through r, the softmax, blocks, shards) is
written once, in block.py and the backends. The trade-off: only divergences that are sums over the
vocabulary of a function of (log a, log b) fit. Two are known to the backends by name:
ConcreteScore, which needs sums over the vocabulary first, and SampledReverseKL, of the label alone.

To add a divergence, write its class here,

    @register
    @dataclass(frozen=True)
    class SquaredDistance(Divergence):
        # D(a‖b) = Σ (a - b)²
        name = "squared_distance"

        def terms(self, a: LogProbs, b: LogProbs) -> Terms:
            difference = a.p - b.p
            return difference.square(), 2 * a.p * difference, -2 * b.p * difference

and its formula as the paper has it in reference.py, for the naive twin:

    def _squared_distance(log_a: Tensor, log_b: Tensor, _: Divergence) -> Tensor:
        return (log_a.exp() - log_b.exp()).square().sum(-1)

    FORMULAS = {..., "squared_distance": _squared_distance}

Where a and b are both 0 all three terms are 0, and where D is infinite f is; nothing is NaN. The
tests go through every registered divergence: gradcheck and the comparison with the twin then cover
the new one. `AMiD(divergence="squared_distance")` and `divergence: squared_distance` in a recipe
take it; its dataclass fields are its parameters. backend="auto" runs it in plain torch until
kernels.py knows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from amid_ds.errors import InputError

# The logarithm of a probability that is 0, of a logit of -inf: 0 · LOG_ZERO is 0, where 0 · -inf
# would be NaN. Sums of many stay finite in fp32.
LOG_ZERO = -1e30
# Where one of two probabilities is 0 their log ratio is beyond this; finite logits' never is.
INFINITE_RATIO = 1e20
# A power of AlphaBeta's below it is taken for small: a difference divided by it is made by expm1.
NEAR_ZERO = 0.125

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
    # True for one of the label alone, which has no `terms`.
    needs_labels: ClassVar[bool] = False

    @property
    def infinite_without(self) -> tuple[bool, bool]:
        """True if D is infinite where only a, where only b has no probability."""
        return False, False

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

    @property
    def infinite_without(self) -> tuple[bool, bool]:
        return False, True

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

    x = `alpha`, y = `beta`, any two numbers; where x, y or x + y is 0 it is the limit:
        y = 0       Σ [a^x log(a^x/b^x) - a^x + b^x] / x²           (1, 0): KL(a‖b)
        x = 0       Σ [b^y log(b^y/a^y) - b^y + a^y] / y²           (0, 1): KL(b‖a)
        x + y = 0   Σ [log(b^x/a^x) + a^x/b^x - 1] / x²
        x = y = 0   ½ Σ (log a - log b)²

    With s = x + y, u = log a - log b and the three logarithms s log b, x log a + y log b, s log a,
    the value is u² times the second divided difference of exp at these three, and the derivatives
    are ±u times the first at two of them: continuous in x and y, and computed as such. All digits
    hold near a limit, but those of the value near x = y = 0, where it is off by fp32's rounding of
    u over max(|x|, |y|); the gradient is not.
    """

    alpha: float
    beta: float
    name = "alpha_beta"

    def __post_init__(self) -> None:
        finite_number("AlphaBeta's alpha", self.alpha)
        finite_number("AlphaBeta's beta", self.beta)

    @property
    def infinite_without(self) -> tuple[bool, bool]:
        of_sum = self.alpha + self.beta <= 0
        return self.alpha <= 0 or of_sum, self.beta <= 0 or of_sum

    def terms(self, a: LogProbs, b: LogProbs) -> Terms:
        x, y = self.alpha, self.beta
        s = x + y
        if s < 0:
            # Where neither has any probability, the powers are infinite and their sum is 0.
            neither = torch.maximum(a.log, b.log) < -INFINITE_RATIO
            a, b = (LogProbs(each.log.masked_fill(neither, 0.0)) for each in (a, b))
        u = a.log - b.log
        of_a, of_b = (each if s == 1 else LogProbs(s * each.log) for each in (a, b))
        both = of_a if y == 0 else of_b if x == 0 else LogProbs(x * a.log + y * b.log)
        d_a = _divided(of_a, both, u, y)
        d_b = -_divided(both, of_b, u, x)
        if abs(s) >= NEAR_ZERO:
            value = (d_a + d_b) / s
        elif x == y == 0:
            value = 0.5 * u.square()
        elif abs(x) >= abs(y):
            value = (d_a - _divided(of_a, of_b, u, s)) / x
        else:
            value = (d_b + _divided(of_a, of_b, u, s)) / y
        without_a, without_b = self.infinite_without
        if without_a:
            value = value.masked_fill(u < -INFINITE_RATIO, math.inf)
        if without_b:
            value = value.masked_fill(u > INFINITE_RATIO, math.inf)
        return value, d_a, d_b

    def as_kl(self) -> tuple[KL, bool] | None:
        """KL, and True if its arguments are in the reverse order, where this is one; else None."""
        if {self.alpha, self.beta} != {0, 1}:
            return None
        return KL(), self.beta == 1


def _divided(first: LogProbs, second: LogProbs, u: Tensor, k: float) -> Tensor:
    """(first - second) / k, given log first - log second = k u; its limit for k = 0, and nothing
    cancels near it."""
    if k == 0:
        return first.p * u
    if abs(k) >= NEAR_ZERO:
        return (first.p - second.p) / k
    rise = -torch.expm1(-(k * u).abs()) / abs(k)
    return torch.maximum(first.p, second.p) * torch.copysign(rise, u)


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


@register
@dataclass(frozen=True)
class ConcreteScore(Divergence):
    """D(a‖b) = ½ Σ_x Σ_y w₁(x) w₂(y) (δ_x - δ_y)², δ = log a - log b: concrete score distillation
    (arXiv 2509.25837, eq. 8), of residuals of logits, whose normalisers cancel.

    first, second: w₁ and w₂, constants for the gradient: the `student`'s or the `teacher`'s
        tempered probabilities, or `uniform` over the ids that either says. The paper's (S, S) is
        the default, (U, S) and (T, S) its others; their order does not matter.

    In O(V): with m₁ and m₂ the means of δ under the two weights, c = (m₁ + m₂)/2, h = (m₁ - m₂)/2
    and w = (w₁ + w₂)/2, it is Σ w [(δ - c)² + h²]; for w₁ = w₂ the variance of δ under w₁. So the
    means come first: one more reading of the logits and one more collective.
    The authors' code has half of this gradient (kd_weight 0.5), and does not divide the residuals
    by τ, only the weights' logits.
    Infinite where a or b has no probability at an id of some weight.
    """

    first: str = "student"
    second: str = "student"
    name = "concrete_score"

    def __post_init__(self) -> None:
        for field, weight in (("first", self.first), ("second", self.second)):
            if weight not in ("student", "teacher", "uniform"):
                raise InputError(f"ConcreteScore({field}={weight!r})",
                                 "student, teacher or uniform", "the paper's is student twice")

    def residual(self, a: LogProbs, b: LogProbs, p: LogProbs,
                 q: LogProbs) -> tuple[Tensor, LogProbs, LogProbs]:
        """δ, 0 where it is infinite, w₁ and w₂, not normalised, [n, tile] each, of the teacher p
        and the student q; an id that neither a nor b says has no weight."""
        neither = torch.maximum(a.log, b.log) < -INFINITE_RATIO
        log = {"teacher": p.log, "student": q.log, "uniform": torch.zeros_like(a.log)}
        first = LogProbs(log[self.first].masked_fill(neither, LOG_ZERO))
        second = first
        if self.second != self.first:
            second = LogProbs(log[self.second].masked_fill(neither, LOG_ZERO))
        delta = a.log - b.log
        return delta.masked_fill_(delta.abs() > INFINITE_RATIO, 0.0), first, second

    def residual_sums(self, a: LogProbs, b: LogProbs, p: LogProbs, q: LogProbs) -> Tensor:
        """[4, n] Σ w₁, Σ w₂, Σ w₁δ and Σ w₂δ."""
        delta, first, second = self.residual(a, b, p, q)
        return torch.stack([first.p.sum(-1), second.p.sum(-1), (first.p * delta).sum(-1),
                            (second.p * delta).sum(-1)])

    def terms(self, a: LogProbs, b: LogProbs) -> Terms:
        raise NotImplementedError("a concrete score needs sums first: `centred_terms`")

    def centred_terms(self, a: LogProbs, b: LogProbs, p: LogProbs, q: LogProbs,
                      sums: Tensor) -> Terms:
        """`terms`, given the `residual_sums` [4, n] over the whole vocabulary."""
        delta, log_first, log_second = self.residual(a, b, p, q)
        total_first, total_second, of_first, of_second = sums[..., None]
        first, second = log_first.p / total_first, log_second.p / total_second
        mean_first, mean_second = of_first / total_first, of_second / total_second
        weight, half = (first + second) / 2, (mean_first - mean_second) / 2
        delta = delta - (mean_first + mean_second) / 2
        value = weight * (delta.square() + half.square())
        infinite = (a.log - b.log).abs() > INFINITE_RATIO
        weighs = torch.maximum(log_first.log, log_second.log) > -INFINITE_RATIO
        d_a = 2 * weight * delta + (first - second) * half
        return value.masked_fill_(infinite & weighs, math.inf), d_a, -d_a


@register
@dataclass(frozen=True)
class SampledReverseKL(Divergence):
    """KL(q‖p) estimated from the label y that the student has sampled: log q(y) - log p(y).

    A policy gradient: with b a constant, a token's gradient is (log q(y) - log p(y) - b) ∇log q(y)
    and not the derivative of its value (whose mean over y ~ q is 0). Its mean over y ~ q is the
    gradient of KL(q‖p) at that token, whatever b: Σ q ∇log q = 0. As with the exact divergence,
    what a token does to those after it counts for nothing (a discount of 0).

    baseline: b.
        `kl`, the default, is KL(q‖p) of the token itself, the mean of what it is taken from, as in
            arXiv 2605.07865: less variance as a rule, though not the least of all constants'. It
            costs what the exact KL(q‖p) costs, one reading of the logits and one collective; 0
            where it is infinite.
        `none` is b = 0, what on-policy distillation began with (Thinking Machines' post of October
            2025: the advantage is log p(y) - log q(y) as it is): no sum over the vocabulary beyond
            both models' normalisers.

    The exact KL(q‖p) (`rkl`) is this estimator's mean over y, without its variance, and here not
    dearer than `kl`: take this one to repeat what was published with it.
    The labels have to be samples of the tempered student; a token without one counts 0.
    """

    baseline: str = "kl"
    name = "sampled_reverse_kl"
    needs_labels = True

    def __post_init__(self) -> None:
        if self.baseline not in ("kl", "none"):
            raise InputError(f"SampledReverseKL(baseline={self.baseline!r})", "kl or none",
                             "kl is the default")

    def terms(self, a: LogProbs, b: LogProbs) -> Terms:
        raise NotImplementedError("it is a function of the label alone (block.py)")


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
        own = ", ".join(signature(DIVERGENCES[name]).parameters) or "none"
        raise InputError(f"the divergence {spec!r}: {str(error).split('() ')[-1]}",
                         f"its own parameters, {own}",
                         "e.g. AlphaBeta(alpha=0.2, beta=0.7), or "
                         "{alpha_beta: {alpha: 0.2, beta: 0.7}} in a recipe") from None


def finite_number(name: str, value: object) -> float:
    """`value`, if it is a finite real number; InputError otherwise."""
    if (isinstance(value, bool) or not isinstance(value, (int, float))
            or not math.isfinite(value)):
        raise InputError(f"{name}={value!r}", "a finite number",
                         f"give {name} as an int or a float")
    return value
