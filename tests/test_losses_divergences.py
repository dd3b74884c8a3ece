"""Divergences at their limits, of residuals and of samples, against their papers' formulas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.losses import LossProblem, relative_error, value_and_gradient, with_zeros
from support.ranks import RankPool
from torch import Tensor
from torch.nn import functional as F

from amid_ds import (
    AlphaBeta,
    AMiD,
    ConcreteScore,
    LMHead,
    SampledReverseKL,
    VocabShard,
    amid_loss,
    linear_amid_loss,
    preset,
)
from amid_ds.errors import InputError
from amid_ds.losses.divergences import KL, divergence_from
from amid_ds.losses.reference import naive_loss, naive_sampled_loss

INF = float("inf")
ORDERS = ("pr", "qr", "rp", "rq")
# A point on each line where the formula of the α-β divergence has no value, and their crossings.
LIMITS = [AlphaBeta(0, 0.7), AlphaBeta(0.4, 0), AlphaBeta(0.4, -0.4), AlphaBeta(-1.5, 1.5),
          AlphaBeta(0, 0), AlphaBeta(0, -0.6), AlphaBeta(-0.6, 0), AlphaBeta(1, 0), AlphaBeta(0, 1)]


def logits(seed: int, *shape: int, scale: float = 2.0,
           dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(dtype)


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
@pytest.mark.parametrize("order", [
    {"pr": 0.5, "qr": 0.25, "rp": 1.0, "rq": 2.0},
    *(pytest.param(each, marks=pytest.mark.slow) for each in ORDERS)], ids=str)
def test_the_limits_pass_gradcheck_through_the_assistant(measure, order):
    student, teacher = logits(1, 3, 7, scale=1.0).requires_grad_(), logits(2, 3, 7, scale=1.0)
    for alpha, lam in ((-5.0, 0.1), (1.0, 0.3), (-1.0, 0.5), (0.0, 1.0)):
        objective = AMiD(alpha, lam, measure, order, 1.5)
        assert torch.autograd.gradcheck(lambda s, o=objective: amid_loss(s, teacher, o), student)
        torch.testing.assert_close(amid_loss(student, teacher, objective),
                                   naive_loss(student, teacher, objective), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("step", [1e-2, 1e-6, 1e-15])
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


# --- concrete score distillation ------------------------------------------------------------------

WEIGHTS = [("student", "student"), ("uniform", "student"), ("teacher", "student"),
           ("teacher", "teacher"), ("uniform", "uniform")]


def concrete_score(first: str, second: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Equation 8 of arXiv 2509.25837, from logits, as a sum over pairs of ids."""
    named = {"student": student.softmax(-1), "teacher": teacher.softmax(-1),
             "uniform": torch.full_like(student, 1 / student.shape[-1])}
    w1, w2 = named[first].detach(), named[second].detach()
    total = torch.zeros_like(student[..., 0])
    for y, x in itertools.product(range(student.shape[-1]), repeat=2):
        residual = (student[..., x] - student[..., y]) - (teacher[..., x] - teacher[..., y])
        total = total + w1[..., y] * w2[..., x] * residual**2 / 2
    return total


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_concrete_score_is_the_papers_sum_over_pairs(weights):
    student, teacher = logits(1, 3, 11).requires_grad_(), logits(2, 3, 11)
    for objective in (preset("csd", first=weights[0], second=weights[1]),
                      AMiD(-1.0, 1.0, ConcreteScore(*weights[::-1]), "qr")):
        ours = amid_loss(student, teacher + 5.0, objective)
        truth = concrete_score(*weights, student, teacher)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
        gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, truth)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_the_authors_code_has_half_of_the_gradient():
    """Their loss of (U, S): the mean of both centred residuals times the other weight, detached."""
    student, teacher = logits(1, 3, 11).requires_grad_(), logits(2, 3, 11)
    d, s, u = (student - teacher).detach(), student.softmax(-1).detach(), torch.tensor(1 / 11)
    theirs = ((d - (u * d).sum(-1, keepdim=True)) * s
              + (d - (s * d).sum(-1, keepdim=True)) * u) / 2 * student
    ours = amid_loss(student, teacher, preset("csd", first="uniform"))
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours / 2, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_concrete_score_is_the_naive_twin_through_the_assistant_and_with_zeros(weights):
    student, teacher = with_zeros()
    for alpha, lam, order, tau in (
            (-5.0, 0.3, "pr", {"student": 2.0, "teacher": 1.0}), (-1.0, 0.0, "pr", 1.0),
            (1.0, 0.3, {"qr": 0.5, "rp": 0.3}, 1.5), (3.0, 0.5, "rq", 1.0)):
        objective = AMiD(alpha, lam, ConcreteScore(*weights), order, tau)
        loss, gradient = value_and_gradient(student, teacher, objective)
        truth = naive_loss(student, teacher, objective)
        finite = truth.isfinite()
        assert torch.equal(loss.isfinite(), finite) and finite[:2].all()
        assert not loss.isnan().any()
        of_truth = torch.autograd.grad(truth[finite].sum(), student)[0]
        torch.testing.assert_close(loss[finite], truth[finite].detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient[finite], of_truth[finite], rtol=1e-9, atol=1e-12)


def test_weights_of_a_concrete_score_are_checked():
    with pytest.raises(InputError, match="first='assistant'"):
        ConcreteScore("assistant")
    assert divergence_from({"concrete_score": {"first": "uniform"}}) == ConcreteScore("uniform")


# --- sampled tokens -------------------------------------------------------------------------------

TEMPERATURES = [1.0, 2.0, {"student": 2.0, "teacher": 1.0}]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("baseline", ["kl", "none"])
@pytest.mark.parametrize("temperature", TEMPERATURES, ids=str)
def test_the_mean_over_samples_is_the_exact_reverse_kl_and_its_gradient(temperature, baseline,
                                                                       backend):
    """Over every label, each with the probability that the student samples it."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    problem, vocabulary = LossProblem(3, 13, dtype=dtype), 13
    objective = preset("sampled_rkl", baseline=baseline, temperature=temperature)
    head = LMHead(problem.weight, problem.bias, 3.0, 0.8)
    hidden = problem.student.repeat_interleave(vocabulary, 0)
    labels = torch.arange(vocabulary).repeat(3)
    student = 0.8 * F.linear(hidden, problem.weight, problem.bias)[:, :vocabulary]
    q = (3 * (student / 3).tanh() / objective.student_temperature).softmax(-1)
    sampled = linear_amid_loss(
        hidden, head, problem.teacher.repeat_interleave(vocabulary, 0), problem.teacher_weight,
        objective, token_weights=q.gather(1, labels[:, None])[:, 0].detach(), labels=labels,
        vocab_size=vocabulary, backend=backend)
    exact = linear_amid_loss(
        problem.student, head, problem.teacher, problem.teacher_weight,
        AMiD(lam=1.0, order="qr", temperature=temperature), token_weights=torch.ones(3).to(dtype),
        vocab_size=vocabulary)
    tolerance = 1e-12 if backend == "torch" else 2e-5
    torch.testing.assert_close(sampled.loss, exact.loss, rtol=tolerance, atol=tolerance)
    for actual, expected in zip(problem.gradients(sampled.loss), problem.gradients(exact.loss),
                                strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_kl_baseline_lowers_the_variance_of_the_gradient():
    student, teacher = logits(1, 1, 13).requires_grad_(), logits(2, 1, 13)
    q, spread = student.softmax(-1).detach()[0], {}
    for baseline in ("kl", "none"):
        rows = student.detach().repeat(13, 1).requires_grad_()
        loss = naive_sampled_loss(rows, teacher.expand(13, 13), torch.arange(13),
                                  preset("sampled_rkl", baseline=baseline))
        gradient, = torch.autograd.grad(loss.sum(), rows)
        mean = (q[:, None] * gradient).sum(0)
        spread[baseline] = (q * (gradient - mean).square().sum(-1)).sum().item()
    assert spread["kl"] < 0.7 * spread["none"]


@pytest.mark.parametrize(("backend", "temperature"), [
    *(("torch", each) for each in TEMPERATURES), ("triton", TEMPERATURES[2]),
    pytest.param("triton", 1.0, marks=pytest.mark.slow)], ids=str)
def test_sampled_tokens_are_the_naive_twin_beside_cross_entropy_and_weights(backend, temperature):
    problem = LossProblem(dtype=torch.float64 if backend == "torch" else torch.float32)
    tolerance = 1e-9 if backend == "torch" else 2e-5
    for baseline in ("kl", "none"):
        objective = preset("sampled_rkl", baseline=baseline, temperature=temperature)
        out = problem.fused(objective, 3.0, 0.8, backend=backend)
        student = 0.8 * F.linear(problem.student, problem.weight, problem.bias)
        student = (3 * (student / 3).tanh())[:, :problem.vocab_size]
        teacher = (problem.teacher @ problem.teacher_weight.t())[:, :problem.vocab_size]
        kd = naive_sampled_loss(student, teacher, problem.labels, objective)
        ce = F.cross_entropy(student, problem.labels, reduction="none")
        truth = (problem.weights * (0.9 * kd + 0.4 * ce)).sum()
        torch.testing.assert_close(out.loss, truth.to(out.loss.dtype), rtol=tolerance,
                                   atol=tolerance)
        assert (out.kd[problem.labels == -100] == 0).all()
        for actual, expected in zip(problem.gradients(out.loss), problem.gradients(truth),
                                    strict=True):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_that_one_model_never_says_is_infinite_at_its_sample_alone(backend):
    head, hidden = LMHead(torch.eye(5), torch.zeros(5)), torch.zeros(4, 5)
    teacher = LMHead(torch.eye(5), torch.zeros(5))
    head.bias[[1, 3]], teacher.bias[[1, 2]] = -INF, -INF
    for baseline in ("kl", "none"):
        out = linear_amid_loss(hidden.requires_grad_(), head, torch.zeros(4, 5), teacher,
                               preset("sampled_rkl", baseline=baseline), backend=backend,
                               token_weights=torch.ones(4), labels=torch.tensor([0, 1, 2, 3]))
        assert out.kd.tolist() == [0.0, 0.0, INF, -INF]


def test_sampled_tokens_need_labels_and_the_reverse_order():
    problem = LossProblem()
    with pytest.raises(InputError, match="without labels"):
        problem.fused(preset("sampled_rkl"), labels=None, ce_weight=0.0)
    with pytest.raises(InputError, match="reads labels"):
        amid_loss(logits(1, 2, 5), logits(2, 2, 5), preset("sampled_rkl"))
    with pytest.raises(InputError, match="order='pr'"):
        AMiD(divergence="sampled_reverse_kl")
    with pytest.raises(InputError, match=r"power=2\.0"):
        AMiD(-1.0, 1.0, "sampled_reverse_kl", "qr", power=2.0)
    with pytest.raises(InputError, match="baseline='mean'"):
        SampledReverseKL("mean")


# --- shards and precision -------------------------------------------------------------------------

OBJECTIVES = {
    "log_squares": AMiD(0.5, 0.3, AlphaBeta(0, 0), {"pr": 0.5, "rq": 0.5}, 2.0),
    "alpha_zero": AMiD(-1.0, 0.0, AlphaBeta(0, 0.7)),
    "csd": preset("csd", first="uniform", temperature=2.0),
    "csd_through_r": AMiD(-5.0, 0.3, ConcreteScore("teacher", "student"), {"pr": 1, "rq": 0.5}),
    "sampled": preset("sampled_rkl", temperature=2.0),
    "sampled_alone": preset("sampled_rkl", baseline="none"),
}
CUTS = [0, 8, 8, 41]


def sharded(rank: int, group: Any, name: str) -> tuple[int, list[Tensor]]:
    """(exchanges in forward, loss, kd and gradients) on one of three uneven shards."""
    problem = LossProblem()
    start, stop = CUTS[rank], CUTS[rank + 1]
    exchanges = []
    with pytest.MonkeyPatch.context() as patch:
        real = VocabShard.gather
        patch.setattr(VocabShard, "gather",
                      lambda self, local: exchanges.append(local) or real(self, local))
        out = linear_amid_loss(
            problem.student, LMHead(problem.weight[start:stop], problem.bias[start:stop]),
            problem.teacher, problem.teacher_weight[start:stop], OBJECTIVES[name],
            token_weights=problem.weights, labels=problem.labels, ce_weight=0.4, kd_weight=0.9,
            shard=VocabShard(start, stop, group))
    return len(exchanges) - 1, [out.loss.detach(), out.kd, *problem.gradients(out.loss)]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.mark.parametrize(("name", "exchanges"), [
    ("log_squares", 3), ("alpha_zero", 2), ("csd", 3), ("csd_through_r", 3), ("sampled", 2),
    ("sampled_alone", 1)])
def test_three_uneven_shards_one_of_them_empty_are_one_process(ranks, name, exchanges):
    problem = LossProblem()
    out = problem.fused(OBJECTIVES[name])
    hidden, weight, bias = problem.gradients(out.loss)
    for rank, (made, (loss, kd, of_hidden, of_weight, of_bias)) in enumerate(
            ranks.run(3, sharded, name)):
        own = slice(CUTS[rank], CUTS[rank + 1])
        assert made == exchanges
        for actual, expected in ((loss, out.loss.detach()), (kd, out.kd), (of_hidden, hidden),
                                 (of_weight[own], weight[own]), (of_bias[own], bias[own])):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bf16_is_no_further_from_the_truth_than_autograd_in_bf16(name):
    problem = LossProblem(24, 211, 16, 16, dtype=torch.bfloat16, padding=0)
    exact, objective = problem.to(torch.float64), OBJECTIVES[name]

    def naive(of: LossProblem) -> Tensor:
        student = F.linear(of.student, of.weight, of.bias)[:, :211]
        teacher = (of.teacher @ of.teacher_weight.t())[:, :211]
        student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32))
                            for x in (student, teacher))
        kd = (naive_sampled_loss(student, teacher, of.labels, objective)
              if objective.resolved_divergence.needs_labels
              else naive_loss(student, teacher, objective))
        ce = F.cross_entropy(student, of.labels, reduction="none")
        return (of.weights * (0.9 * kd + 0.4 * ce)).sum()

    truth = exact.gradients(naive(exact))
    ours, rounded = (problem.gradients(loss) for loss in (problem.fused(objective).loss,
                                                          naive(problem)))
    for own, usual, true in zip(ours, rounded, truth, strict=True):
        assert relative_error(own, true) <= 1.2 * relative_error(usual, true) + 1e-3


def test_a_baseline_that_is_infinite_is_none():
    """A teacher that never says an id which the student may sample, though not this time."""
    student = torch.tensor([[0.3, -0.2, 0.5]], requires_grad=True)
    bias = torch.tensor([0.1, 0.4, -torch.inf])
    of_kl, of_none = (torch.autograd.grad(linear_amid_loss(
        student, torch.eye(3), torch.zeros(1, 1), LMHead(torch.zeros(3, 1), bias),
        preset("sampled_rkl", baseline=baseline), token_weights=torch.ones(1),
        labels=torch.tensor([1])).loss, student)[0] for baseline in ("kl", "none"))
    assert of_none.isfinite().all() and torch.equal(of_kl, of_none)
