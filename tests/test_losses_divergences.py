"""The divergences beyond KL against their papers' formulas, written out here."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.losses import relative_error
from torch import Tensor

from amid_ds import AlphaBeta, AMiD, amid_loss
from amid_ds.losses.divergences import KL
from amid_ds.losses.reference import naive_loss

INF = float("inf")
ORDERS = ("pr", "qr", "rp", "rq")
# A point on each line where the formula of the α-β divergence has no value, and their crossings.
LIMITS = [AlphaBeta(0, 0.7), AlphaBeta(0.4, 0), AlphaBeta(0.4, -0.4), AlphaBeta(-1.5, 1.5),
          AlphaBeta(0, 0), AlphaBeta(0, -0.6), AlphaBeta(-0.6, 0), AlphaBeta(1, 0), AlphaBeta(0, 1)]


def logits(seed: int, *shape: int, scale: float = 2.0,
           dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(dtype)


def with_zeros(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(student's, teacher's) logits [4, 37]: none is -inf; one of both; the student's; the
    teacher's."""
    student, teacher = logits(4, 4, 37, dtype=dtype), logits(5, 4, 37, dtype=dtype)
    student[1, 3] = teacher[1, 3] = student[2, 5] = teacher[3, 7] = -INF
    return student.requires_grad_(), teacher


def value_and_gradient(student: Tensor, teacher: Tensor, objective: AMiD,
                       **options) -> tuple[Tensor, Tensor]:
    """The loss per token, and the gradient of the sum of its finite ones."""
    loss = amid_loss(student, teacher, objective, **options)
    return loss.detach(), torch.autograd.grad(loss[loss.isfinite()].sum(), student)[0]


def abkd(x: float, y: float, p: Tensor, q: Tensor) -> Tensor:
    """The five formulas of ABKD (arXiv 2505.04560), from probabilities."""
    if x == y == 0:
        return ((p.log() - q.log()) ** 2).sum(-1) / 2
    if x == 0:
        return (q**y * (q**y / p**y).log() - q**y + p**y).sum(-1) / y**2
    if y == 0:
        return (p**x * (p**x / q**x).log() - p**x + q**x).sum(-1) / x**2
    if x + y == 0:
        return ((q**x / p**x).log() + p**x / q**x - 1).sum(-1) / x**2
    return -(p**x * q**y - x / (x + y) * p ** (x + y)
             - y / (x + y) * q ** (x + y)).sum(-1) / (x * y)


# --- the α-β divergence ---------------------------------------------------------------------------

@pytest.mark.parametrize("measure", [*LIMITS, AlphaBeta(0.2, 0.7), AlphaBeta(1.5, -0.5),
                                     AlphaBeta(-0.3, -0.2), AlphaBeta(0.05, -0.02)], ids=str)
def test_alpha_beta_is_abkds_formula_at_its_limits_too(measure):
    student, teacher = logits(1, 5, 17).requires_grad_(), logits(2, 5, 17)
    x, y = measure.alpha, measure.beta
    for order, pair in (("pr", lambda p, q: (p, q)), ("rp", lambda p, q: (q, p))):
        ours = amid_loss(student, teacher, AMiD(-1.0, 0.0, measure, order))
        truth = abkd(x, y, *pair(teacher.softmax(-1), student.softmax(-1)))
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
        weights = logits(3, 5).abs()
        gradients = [torch.autograd.grad((loss * weights).sum(), student)[0]
                     for loss in (ours, truth)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measure", LIMITS, ids=str)
@pytest.mark.parametrize("order", [*ORDERS, {"pr": 0.5, "qr": 0.25, "rp": 1.0, "rq": 2.0}], ids=str)
def test_the_limits_pass_gradcheck_through_the_assistant(measure, order):
    student, teacher = logits(1, 3, 7, scale=1.0).requires_grad_(), logits(2, 3, 7, scale=1.0)
    for alpha, lam in ((-5.0, 0.1), (1.0, 0.3), (-1.0, 0.5), (0.0, 1.0)):
        objective = AMiD(alpha, lam, measure, order, 1.5)
        assert torch.autograd.gradcheck(lambda s, o=objective: amid_loss(s, teacher, o), student)
        torch.testing.assert_close(amid_loss(student, teacher, objective),
                                   naive_loss(student, teacher, objective), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6, 1e-9, 1e-15])
@pytest.mark.parametrize("measure", LIMITS, ids=str)
def test_value_and_gradient_are_continuous_at_the_limits(measure, step):
    """In float64: as far from the limit as the step, and no digit is lost on the way."""
    student, teacher = logits(1, 5, 17).requires_grad_(), logits(2, 5, 17)

    def results(x: float, y: float) -> list[Tensor]:
        loss = amid_loss(student, teacher, AMiD(-5.0, 0.3, AlphaBeta(x, y), "qr"))
        return [loss.detach(), *torch.autograd.grad(loss.sum(), student)]

    value, gradient = results(measure.alpha, measure.beta)
    at_crossing = measure.alpha == measure.beta == 0
    for near in ((measure.alpha + step, measure.beta), (measure.alpha, measure.beta - step),
                 (measure.alpha - step, measure.beta + 2 * step)):
        near_value, near_gradient = results(*near)
        lost = 1e-15 / step if at_crossing else 0
        assert relative_error(near_value, value) < 100 * step + lost + 1e-13
        assert relative_error(near_gradient, gradient) < 100 * step + 1e-13


@pytest.mark.parametrize("measure", [AlphaBeta(1e-6, 1), AlphaBeta(1, 1e-6), AlphaBeta(0.3, 1e-4),
                                     AlphaBeta(1, -1 + 1e-6), AlphaBeta(0.11, -0.11), *LIMITS],
                         ids=str)
def test_fp32_keeps_its_digits_near_the_limits(measure):
    student, teacher = logits(1, 40, 997, dtype=torch.float32), logits(2, 40, 997)
    teacher = teacher.float()
    results = []
    for s, t in ((student, teacher), (student.double(), teacher.double())):
        leaf = s.clone().requires_grad_()
        loss = amid_loss(leaf, t, AMiD(-5.0, 0.1, measure, "pr"))
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaf)])
    assert relative_error(results[0][0], results[1][0]) < 1e-5
    assert relative_error(results[0][1], results[1][1]) < 1e-5


def test_alpha_beta_at_one_and_zero_is_kl_and_costs_what_kl_costs():
    forward, backward = AMiD(divergence=AlphaBeta(1, 0), order="pr"), AMiD(
        divergence=AlphaBeta(0.0, 1.0), order={"pr": 0.5, "rq": 0.25})
    assert forward.resolved_divergence == backward.resolved_divergence == KL()
    assert forward.order_weights == (("pr", 1.0),)
    assert backward.order_weights == (("rp", 0.5), ("qr", 0.25))
    student, teacher = logits(1, 5, 17), logits(2, 5, 17)
    truth = (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1)
    loss = amid_loss(student, teacher, AMiD(lam=0.0, divergence=AlphaBeta(0, 1), order="pr"))
    torch.testing.assert_close(loss, truth)


@pytest.mark.parametrize("measure", LIMITS, ids=str)
def test_the_limits_are_infinite_where_the_paper_is_and_never_nan(measure):
    student, teacher = with_zeros()
    for alpha, lam, order in itertools.product((-5.0, 3.0), (0.0, 0.3, 1.0), ORDERS):
        objective = AMiD(alpha, lam, measure, order)
        loss, gradient = value_and_gradient(student, teacher, objective)
        truth, finite = naive_loss(student, teacher, objective).detach(), loss.isfinite()
        assert torch.equal(finite, truth.isfinite()) and finite[:2].all()
        assert not loss.isnan().any() and gradient[finite].isfinite().all()
        torch.testing.assert_close(loss[finite], truth[finite], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("measure", [*LIMITS[:-2], AlphaBeta(1e-6, 1), AlphaBeta(0.05, -0.04),
                                     AlphaBeta(-0.3, -0.2), AlphaBeta(1.5, -0.5)], ids=str)
def test_the_kernels_have_the_limits(measure):
    pytest.importorskip("triton")
    for alpha, lam, order in ((-5.0, 0.3, "pr"), (1.0, 0.3, "qr"), (-1.0, 0.0, {"rp": 1.0}),
                              (3.0, 0.5, {"rq": 0.5, "pr": 0.3})):
        objective = AMiD(alpha, lam, measure, order)
        truth, of_truth = value_and_gradient(*with_zeros(), objective)
        loss, gradient = value_and_gradient(*with_zeros(torch.float32), objective,
                                            backend="triton")
        finite = truth.isfinite()
        assert torch.equal(loss.isfinite(), finite) and not loss.isnan().any()
        torch.testing.assert_close(loss[finite].double(), truth[finite], rtol=1e-5, atol=1e-6)
        assert relative_error(gradient[finite], of_truth[finite]) < 1e-5
