"""Logits of -inf: 0·log 0 is 0 in the naive twin, in plain torch and in the kernels; what is truly
infinite is inf for its token, and never NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.losses import EVERY_DIVERGENCE, LossProblem
from torch.nn import functional as F

from amid_ds import (
    AlphaBeta,
    AMiD,
    ConcreteScore,
    LMHead,
    PerToken,
    amid_loss,
    linear_amid_loss,
    preset,
)
from amid_ds.losses import tiles
from amid_ds.losses.reference import naive_loss

INF = float("inf")
ALPHAS = (-5.0, -1.0, 0.5, 1.0, 3.0)
ORDERS = ("pr", "qr", "rp", "rq", {"pr": 0.5, "qr": 0.3, "rp": 0.2})
MEASURES = [*EVERY_DIVERGENCE, AlphaBeta(1.5, -0.5), AlphaBeta(-0.3, -0.2)]
# The ids without any probability, of the teacher and of the student; a long stretch is whole tiles.
PATTERNS = {"neither says them": ([3, 4, 9], [3, 4, 9]), "the teacher does not": ([3, 9], []),
            "the student does not": ([], [3, 9]), "each has its own": ([3], [4]),
            "a long stretch": (range(8, 24), range(8, 24)),
            "a long stretch of the teacher's": (range(8, 24), [])}


def logits(pattern: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """(student's, teacher's) [4, 37]; the first token has no -inf."""
    draw = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(4, 37, generator=draw) for _ in range(2))
    student, teacher = student.to(dtype), teacher.to(dtype)
    without_teacher, without_student = PATTERNS[pattern]
    teacher[1:, list(without_teacher)] = -INF
    student[1:, list(without_student)] = -INF
    return student.requires_grad_(), teacher


def objectives(measures, alphas=ALPHAS):
    """Every order and α with each measure; the ends of λ, which depend on no α."""
    for measure, order, alpha in itertools.product(measures, ORDERS, alphas):
        yield AMiD(alpha, 0.3, measure, order)
    for measure, order, lam in itertools.product(measures, ORDERS, (0.0, 1.0)):
        yield AMiD(-1.0, lam, measure, order)


def truth(pattern: str, objective: AMiD) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [4], gradient of its finite tokens [4, 37]) by the naive twin in float64."""
    student, teacher = logits(pattern)
    loss = naive_loss(student, teacher, objective)
    finite = loss.isfinite()
    # Each token is differentiated by itself: an infinite one's gradient is NaN, and 0 times it too.
    gradient = torch.zeros_like(student)
    for row in finite.nonzero()[:, 0].tolist() if loss.requires_grad else []:
        gradient[row] = torch.autograd.grad(loss[row], student, retain_graph=True)[0][row]
    return loss.detach(), gradient


def check(pattern: str, objective: AMiD, dtype: torch.dtype, rtol: float, **options) -> None:
    expected, gradient = truth(pattern, objective)
    student, teacher = logits(pattern, dtype)
    loss = amid_loss(student, teacher, objective, **options)
    finite, name = expected.isfinite(), f"{objective} where {pattern}"
    assert expected[0].isfinite() and gradient.isfinite().all(), name
    assert torch.equal(loss.isfinite(), finite), f"{name}: {loss.tolist()}, {expected.tolist()}"
    torch.testing.assert_close(loss[finite].double(), expected[finite], rtol=rtol, atol=rtol,
                               msg=name)
    own, = torch.autograd.grad(loss[finite].sum(), student)
    torch.testing.assert_close(own.double()[finite], gradient[finite], rtol=rtol, atol=rtol,
                               msg=name)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 columns, so that some hold nothing but -inf."""
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 32)
    monkeypatch.setattr(tiles, "MIN_TILE_COLUMNS", 8)
    monkeypatch.setattr(tiles, "MOST_THREADS", 1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_plain_torch_is_the_naive_twin(pattern, small_tiles):
    for objective in objectives(["kl"]):
        check(pattern, objective, torch.float64, 1e-9)
    for objective in objectives(MEASURES[1:], alphas=(-5.0,)):
        check(pattern, objective, torch.float64, 1e-9)
    check(pattern, AMiD(1.0, 0.4, order="rq", detach_assistant=True), torch.float64, 1e-9)
    check(pattern, AMiD(-1.0, 0.4, order="pr", temperature=2.0), torch.float64, 1e-9)
    check(pattern, AMiD(1.0, 0.4, order="rq", power=1.5), torch.float64, 1e-9)
    for measure, order in itertools.product(("kl", "squared_hellinger"), ORDERS):
        # λ from 0 to 1, α below 1, at 1 and above; a weight that is 0 at some tokens.
        by = PerToken("overlap", at=(0.03, 0.04))
        for alpha in (-5.0, 1.0, PerToken("teacher_entropy", (-1.0, 3.0), (0.9, 1.6)), 3.0):
            check(pattern, AMiD(alpha, by, measure, order), torch.float64, 1e-9)
        weights = {order: by} if isinstance(order, str) else {**order, "qr": by}
        check(pattern, AMiD(3.0, 0.3, measure, weights), torch.float64, 1e-9)


@pytest.mark.parametrize("pattern", ["neither says them", "each has its own"])
def test_the_kernels_are_the_naive_twin(pattern):
    for objective in (AMiD(-5.0, 0.3, order=ORDERS[-1]), AMiD(1.0, 0.3, order="rp"),
                      AMiD(3.0, 0.3, order="rq"), AMiD(-1.0, 0.0, order="pr")):
        check(pattern, objective, torch.float32, 1e-4, backend="triton")
    for measure in MEASURES[1:]:
        # The kernels have a concrete score of the models alone.
        lam = 0.0 if isinstance(measure, ConcreteScore) else 0.3
        order = "pr" if lam == 0 else "qr"
        check(pattern, AMiD(-1.0, lam, measure, order), torch.float32, 1e-3, backend="triton")


@pytest.mark.parametrize("pattern", ["the teacher does not", "the student does not"])
def test_the_kernels_are_infinite_where_kl_is_and_nowhere_else(pattern):
    for objective in (AMiD(-5.0, 0.3, order="rp"), AMiD(-5.0, 0.3, order="rq"),
                      AMiD(3.0, 0.3, order={"pr": 0.5, "qr": 0.5}), AMiD(-1.0, 0.0, order="pr"),
                      AMiD(-1.0, 1.0, order="qr"), AMiD(-1.0, 0.3, order={"rp": 0.5, "rq": 0.5}),
                      preset("gkd", beta=0.3), AMiD(3.0, 0.3, "total_variation", "pr")):
        check(pattern, objective, torch.float32, 1e-4, backend="triton")


@pytest.mark.slow
def test_compiled_tiles_are_the_naive_twin(monkeypatch):
    monkeypatch.setattr(tiles, "WORTH_COMPILING", 1)
    # Each objective is compiled, which takes long: one within λ's range, one at its end.
    for pattern in PATTERNS:
        check(pattern, AMiD(-5.0, 0.3, order="rq"), torch.float64, 1e-9)
        check(pattern, AMiD(-1.0, 0.0, order="pr"), torch.float64, 1e-9)


def test_an_infinite_divergence_is_infinite_at_its_token_alone():
    student, teacher = logits("the student does not")
    loss = amid_loss(student, teacher, AMiD(-1.0, 0.0, order="pr"))
    assert loss.isinf().tolist() == [False, True, True, True]
    # A probability too small for a float is a probability.
    rare = torch.tensor([[0.0, -800.0]]), torch.tensor([[0.0, -INF]])
    assert amid_loss(rare[1], rare[0], AMiD(-1.0, 0.0, order="pr")).isinf().all()
    assert amid_loss(rare[0], rare[1], AMiD(-1.0, 0.0, order="pr")).tolist() == [0.0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("measure", [AlphaBeta(-0.5, -0.5), AlphaBeta(-0.6, 0.3)], ids=str)
def test_a_token_of_factor_0_has_no_share_in_loss_and_gradient_though_it_be_infinite(measure,
                                                                                     backend):
    student, teacher = logits("each has its own", torch.float32)
    # No overlap is above 1.
    chosen = AMiD(-1.0, 0.3, measure, {"pr": 0.5, "qr": 0.5},
                  token_weight=PerToken("overlap", (1.0, 0.0), (2.0, 3.0)))
    left_out = AMiD(-1.0, 0.3, measure, {"pr": 0.5, "qr": 0.5},
                    token_weight=PerToken("overlap", (0.0, 1.0), (2.0, 3.0)))
    assert amid_loss(student, teacher, chosen, backend=backend).isinf().tolist() == [
        False, True, True, True]
    loss = amid_loss(student, teacher, left_out, backend=backend)
    assert loss.tolist() == [0.0] * 4
    assert torch.autograd.grad(loss.sum(), student)[0].abs().max() == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_label_that_the_student_never_says_costs_infinitely_much(backend):
    problem = LossProblem(dtype=torch.float32)
    bias = problem.bias.detach().clone()
    banned = int(problem.labels[problem.labels >= 0][0])
    bias[banned] = -INF
    out = linear_amid_loss(
        problem.student, LMHead(problem.weight, bias), None, None, None, kd_weight=0.0,
        ce_weight=1.0, token_weights=torch.ones(len(problem.labels)), labels=problem.labels,
        vocab_size=problem.vocab_size, backend=backend)
    expected = F.cross_entropy(F.linear(problem.student, problem.weight, bias)
                               [:, :problem.vocab_size], problem.labels, reduction="none")
    assert expected.isinf().any() and expected[problem.labels != banned].isfinite().all()
    torch.testing.assert_close(out.ce, expected.detach())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_gradients_of_a_head_that_bans_a_token_are_finite(backend):
    problem = LossProblem(dtype=torch.float32)
    with torch.no_grad():
        for banned in (3, 7):
            problem.bias[banned] = -INF
    teacher = LMHead(problem.teacher_weight.detach(), torch.zeros(len(problem.teacher_weight)))
    teacher.bias[[3, 7, 11]] = -INF
    out = linear_amid_loss(
        problem.student, LMHead(problem.weight, problem.bias), problem.teacher.detach(), teacher,
        AMiD(-5.0, 0.1), token_weights=torch.ones(len(problem.labels)),
        vocab_size=problem.vocab_size, backend=backend)
    student = F.linear(problem.student, problem.weight, problem.bias)[:, :problem.vocab_size]
    guide = F.linear(problem.teacher, teacher.weight, teacher.bias)[:, :problem.vocab_size]
    torch.testing.assert_close(out.kd, naive_loss(student.double(), guide.double(),
                                                  AMiD(-5.0, 0.1)).float().detach(),
                               rtol=1e-4, atol=1e-5)
    assert all(each.isfinite().all() for each in problem.gradients(out.loss))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_whole_family_is_the_naive_twin(pattern, small_tiles):
    for objective in objectives(MEASURES):
        check(pattern, objective, torch.float64, 1e-9)
    for objective in objectives(["kl"]):
        check(pattern, objective, torch.float32, 1e-4, backend="triton")
