"""Numbers of the objective that follow from measures of each token, and what is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support.losses import EVERY_DIVERGENCE, PER_TOKEN, LossProblem, random_logits, relative_error
from support.ranks import RankPool
from torch import Tensor

from amid_ds import AMiD, LMHead, PerToken, VocabShard, amid_loss, linear_amid_loss
from amid_ds.losses import elementwise, fused, mixture, tiles
from amid_ds.losses.block import forward_backward_block
from amid_ds.losses.measures import STATISTICS
from amid_ds.losses.objective import ORDERS
from amid_ds.losses.reference import naive_loss

INF, NAN = math.inf, math.nan

# --- values and gradients -------------------------------------------------------------------------

@pytest.mark.parametrize("objective", PER_TOKEN, ids=str)
@pytest.mark.parametrize(("block", "tile"), [(100, 10_000), (3, 40)])
def test_the_loss_and_its_gradients_are_the_naive_twins(objective, block, tile, monkeypatch):
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: block)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", tile)
    problem = LossProblem()
    ours, truth = problem.fused(objective, 3.0, 0.7).loss, problem.naive(objective, 3.0, 0.7)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    for actual, expected in zip(problem.gradients(ours), problem.gradients(truth), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measure", EVERY_DIVERGENCE, ids=str)
@pytest.mark.parametrize("order", [*ORDERS, {"pr": PerToken("teacher_entropy", (0, 2), (1.5, 2.5)),
                                             "qr": 0.25, "rp": 1.0, "rq": 2.0}], ids=str)
def test_gradients_pass_gradcheck_for_every_divergence_and_order(measure, order):
    """By the teacher's entropy, which does not move with the student: the numbers stay."""
    student, teacher = random_logits(4, 7)
    by = "teacher_entropy"
    for objective in (
            AMiD(PerToken(by, (-1.0, 3.0), (1.0, 1.6)), PerToken(by, (0.2, 0.9), (1.0, 1.6)),
                 measure, order, {"student": 1.5, "teacher": 0.8}, power=1.3),
            AMiD(1.0, PerToken(by, (0.9, 0.2), (1.0, 1.6)), measure, order,
                 token_weight=PerToken(by, (0.5, 2.0), (1.0, 1.6)))):
        assert torch.autograd.gradcheck(lambda s, o=objective: amid_loss(s, teacher, o), student)


def with_given_numbers(student: Tensor, teacher: Tensor, cases: list[tuple[float, float]],
                       *rest: object) -> tuple[Tensor, Tensor]:
    """(loss [n], its gradient [n, V]) in fp32 where token i has the α and λ of case i."""
    by_alpha, by_lam = PerToken("overlap"), PerToken("student_entropy")
    objective = AMiD(by_alpha, by_lam, *rest)
    values = {by_alpha: torch.tensor([alpha for alpha, _ in cases]),
              by_lam: torch.tensor([lam for _, lam in cases])}
    gradient = torch.empty_like(student)
    block = fused.Block(*(fused.Logits(x, temperature=objective.student_temperature)
                          for x in (student, teacher)), None,
                        torch.float32, kd_scale=torch.ones(len(cases)), gradient=gradient)
    out = forward_backward_block(block, objective, VocabShard(0, student.shape[1]), elementwise,
                                 values=values)
    return out.kd.double(), gradient.double()


def with_numbers(student: Tensor, teacher: Tensor, case: tuple[float, float],
                 *rest: object) -> tuple[Tensor, Tensor | None]:
    """The same of one token by the naive twin in fp64; no gradient where it is not finite."""
    exact = student.double().requires_grad_()
    # The numbers that fp32 has.
    truth = naive_loss(exact, teacher.double(), AMiD(*torch.tensor(case).tolist(), *rest))
    if not truth.requires_grad:
        return truth, None
    gradient, = torch.autograd.grad(truth, exact)
    # Autograd through logaddexp of equal infinities may give NaN.
    return truth.detach(), gradient if gradient.isfinite().all() else None


@pytest.mark.parametrize("measure", EVERY_DIVERGENCE, ids=str)
@pytest.mark.parametrize("detach", [False, True])
def test_a_number_per_token_is_that_number_at_each_token(measure, detach):
    """Every α with every λ, at their ends too: as the loss of constants has it, in fp32."""
    alphas, lams = (-5.0, -1.0, 0.0, 0.999, 1.0, 1.01, 3.0), (0.0, 1e-6, 0.3, 1 - 1e-6, 1.0)
    cases = list(itertools.product(alphas, lams))
    student, teacher = (x.detach().float() for x in random_logits(len(cases), 61))
    for order in (*ORDERS, {"pr": 0.5, "rq": 1.5}):
        rest = (measure, order, 1.5, detach)
        loss, gradient = with_given_numbers(student, teacher, cases, *rest)
        for row, case in enumerate(cases):
            truth, expected = with_numbers(student[row], teacher[row], case, *rest)
            torch.testing.assert_close(loss[row], truth, rtol=2e-4, atol=1e-6)
            # Total variation has a kink where r is a model.
            if expected is not None and not (measure == "total_variation" and case[1] != 0.3):
                torch.testing.assert_close(gradient[row], expected, rtol=1e-3, atol=3e-6)


def test_extreme_logits_stay_finite_and_right():
    cases = list(itertools.product((-10.0, -1.0, 1 - 1e-6, 1.0, 1 + 1e-6, 3.0, 10.0),
                                   (0.0, 1e-6, 0.1, 1 - 1e-6, 1.0)))
    draw = torch.Generator().manual_seed(0)
    for kind, order in itertools.product(range(3), ORDERS):
        student, teacher = ((torch.rand(50, generator=draw) * 2e4 - 1e4).round() for _ in range(2))
        if kind == 1:
            teacher = student.clone()
        if kind == 2:
            # Both are certain of the same id.
            student[1:], teacher[1:], student[0], teacher[0] = -1e4, -1e4, 1e4, 1e4
        loss, gradient = with_given_numbers(student.repeat(len(cases), 1),
                                            teacher.repeat(len(cases), 1), cases, "kl", order)
        assert loss.isfinite().all() and gradient.isfinite().all()
        for row, case in enumerate(cases):
            truth, expected = with_numbers(student, teacher, case, "kl", order)
            torch.testing.assert_close(loss[row], truth, rtol=2e-4, atol=2e-3)
            if expected is not None:
                torch.testing.assert_close(gradient[row], expected, rtol=1e-2, atol=1e-2)


def test_constants_take_the_path_they_took_to_the_last_bit(monkeypatch):
    """A number per token that is one number everywhere is near the constant, and goes its own
    way; constants never do."""
    problem = LossProblem(dtype=torch.float32)
    flat = problem.fused(AMiD(-5.0, PerToken("overlap", (0.1, 0.1)))).loss
    torch.testing.assert_close(flat, problem.fused(AMiD(-5.0, 0.1)).loss, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(mixture, "_mixture_per_token", lambda *_: pytest.fail("per token"))
    monkeypatch.setattr(elementwise, "measures", lambda *_: pytest.fail("measured"))
    problem.fused(AMiD(-5.0, 0.1, power=2.0, temperature={"student": 2, "teacher": 1}))


def test_the_number_is_a_constant_for_the_gradient():
    """AMiD's α by the overlap of the models: the gradient is that of the α that it has."""
    student, teacher = random_logits()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    loss = amid_loss(student, teacher, AMiD(PerToken("overlap", (-5.0, 1.0)), 0.1))
    gradient, = torch.autograd.grad(loss.sum(), student)
    for row, alpha in enumerate((-5 + 6 * overlap).tolist()):
        mine = student[row].detach().requires_grad_()
        c = (1 - alpha) / 2
        own = mine.softmax(-1)
        r = (0.1 * p[row] ** c + 0.9 * own**c) ** (1 / c)
        truth = (p[row] * (p[row] / (r / r.sum())).log()).sum()
        torch.testing.assert_close(loss[row], truth, rtol=1e-9, atol=1e-12)
        expected, = torch.autograd.grad(truth, mine)
        torch.testing.assert_close(gradient[row], expected, rtol=1e-8, atol=1e-12)


def test_entropy_aware_distillation_adds_forward_kl_where_the_teacher_is_unsure():
    """KL(q‖p) everywhere, and KL(p‖q) where H(p) is above a threshold (arXiv 2603.07079)."""
    student, teacher = random_logits(12)
    p, q = teacher.softmax(-1), student.softmax(-1)
    unsure = -(p * p.log()).sum(-1) > 1.7
    assert 0 < unsure.sum() < 12
    gate = PerToken("teacher_entropy", (0.0, 1.0), (1.7, 1.700001))
    ours = amid_loss(student, teacher, AMiD(lam=0.0, order={"rp": 1.0, "pr": gate}))
    truth = (q * (q / p).log()).sum(-1) + unsure * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, truth)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def test_exponents_need_not_sum_to_one():
    """The target p·q^β, normalised: α = 1, λ = 1/(1+β), power = 1+β (arXiv 2601.07155)."""
    student, teacher = random_logits()
    beta = 0.8
    target = (teacher.log_softmax(-1) + beta * student.detach().log_softmax(-1)).softmax(-1)
    truth = (target * (target.log() - student.log_softmax(-1))).sum(-1)
    objective = AMiD(1.0, 1 / (1 + beta), order="rq", power=1 + beta, detach_assistant=True)
    ours = amid_loss(student, teacher, objective)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, truth)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measure", EVERY_DIVERGENCE, ids=str)
def test_a_power_and_two_temperatures_pass_gradcheck_at_every_kind_of_mixture(measure):
    student, teacher = random_logits(3, 7)
    for alpha, lam, order in ((-5.0, 0.1, "pr"), (-1.0, 0.5, "qr"), (1.0, 0.3, "rp"),
                              (3.0, 0.0, "pr"), (3.0, 0.0, "rq"), (2.0, 1.0, "qr")):
        objective = AMiD(alpha, lam, measure, order, {"student": 2.0, "teacher": 0.5}, power=1.6)
        torch.testing.assert_close(amid_loss(student, teacher, objective),
                                   naive_loss(student, teacher, objective))
        assert torch.autograd.gradcheck(lambda s, o=objective: amid_loss(s, teacher, o), student)


# --- precision, compiled tiles, shards ------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_no_further_from_the_truth_than_the_naive_loss(dtype):
    """The tolerance beyond the naive loss's own distance: 2⁻⁹, a unit of bf16's last place; of fp32
    2e-4."""
    low = LossProblem(37, 333, 17, 9).to(dtype)
    exact = low.to(torch.float64)
    tolerance = 2e-4 if dtype == torch.float32 else 2**-9
    for objective in (PER_TOKEN[0], PER_TOKEN[3], PER_TOKEN[5],
                      AMiD(PerToken("overlap", (-5.0, 1.0)), 0.1)):
        truth = exact.naive(objective)
        ours, naive = low.fused(objective).loss, low.naive(objective)
        assert (ours - truth).abs() <= (naive - truth).abs() + tolerance * truth.abs()
        for a, b, c in zip(low.gradients(ours), low.gradients(naive), exact.gradients(truth),
                           strict=True):
            assert relative_error(a, c) <= relative_error(b, c) + tolerance


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    ranks = RankPool()
    yield ranks
    ranks.close()


def sharded(rank: int, group, cuts: list[int], objective: AMiD) -> tuple[list[Tensor], int]:
    """(loss, parts, gradients, statistics, logit loss) on this rank's shard; collectives of the
    linear loss's forward."""
    start, stop = cuts[rank], cuts[rank + 1]
    problem, shard = LossProblem(padding=1), VocabShard(start, stop, group)
    weight, bias = (x.detach()[start:stop].clone().requires_grad_()
                    for x in (problem.weight, problem.bias))
    calls, real = [], dist.all_gather

    def counted(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_tokens_per_block", lambda *_: 4)
        patch.setattr(dist, "all_gather", counted)
        shard.agree({}, 41, len(problem.student), torch.device("cpu"))
        calls.clear()
        out = linear_amid_loss(
            problem.student, LMHead(weight, bias, 3.0, 0.8), problem.teacher,
            problem.teacher_weight[start:stop], objective, token_weights=problem.weights,
            labels=problem.labels, ce_weight=0.4, vocab_size=41, shard=shard,
            sequences=problem.sequences, statistics=STATISTICS)
        collectives = len(calls)
    gradients = torch.autograd.grad(out.loss, [problem.student, weight, bias])
    found = [out.loss, out.kd, out.ce, *out.statistics.values(), *gradients]
    return [x.detach().clone() for x in found], collectives


@pytest.mark.parametrize(
    ("objective", "per_block"), list(zip(PER_TOKEN, [4, 5, 5, 4, 5, 5], strict=True)), ids=str)
def test_three_uneven_shards_give_what_one_process_gives(ranks, objective, per_block):
    """Normalisers, measures, agreement, one or two of the divergence; normalisers twice where
    sequences are needed."""
    cuts = [0, 30, 31, 42]
    whole, _ = sharded(0, None, [0, 42], objective)
    results = ranks.run(3, sharded, cuts, objective)
    for (actual, collectives), start, stop in zip(results, cuts, cuts[1:], strict=False):
        expected = [*whole[:-2], whole[-2][start:stop], whole[-1][start:stop]]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        # Eight tokens with a weight: two blocks.
        assert collectives == 2 * per_block
    for actual, _ in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(actual[:-2], results[0][0][:-2], strict=True))
