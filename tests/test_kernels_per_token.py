"""The Triton kernels with numbers per token, powers, two temperatures and measures.

Against the naive twin in fp64, token by token. On a GPU if there is one, else under Triton's
interpreter (conftest.py sets TRITON_INTERPRET).
"""

from __future__ import annotations

import math

import pytest
import torch
from support.losses import LossProblem, relative_error
from torch import Tensor

from amid_ds import AlphaBeta, AMiD, LMHead, PerToken, amid_loss, linear_amid_loss
from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.losses.block import Block, Logits, forward_backward_block, row_normalisers
from amid_ds.losses.measures import MEASURES, STATISTICS
from amid_ds.losses.objective import ORDERS
from amid_ds.losses.reference import naive_loss, naive_measures

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from amid_ds.losses import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Every path of the mixture: ends of λ, shares that fp32 barely holds, α at, near and far from 1.
NUMBERS = [*[(alpha, lam) for alpha in (-5.0, 0.5, 1.0, 3.0) for lam in (0.0, 0.3, 1.0)],
           (-1.0, 0.3), (0.999, 0.3), (1 + 1e-6, 0.3), (1.0, 1e-6), (-5.0, 1e-6)]
# Any three will do: their values are given.
ALPHA, LAM, WEIGHT = (PerToken(by) for by in ("divergence", "teacher_entropy", "overlap"))
ENTROPY = PerToken("teacher_entropy", (0.0, 1.0), (1.4, 2.6))
EVERY_ORDER = {"pr": 0.5, "qr": 0.25, "rp": 1.0, "rq": 2.0}


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw) * 2.0).to(dtype).to(DEVICE)


def of_numbers(student: Tensor, teacher: Tensor, objective: AMiD,
               values: dict[PerToken, Tensor]) -> tuple[Tensor, Tensor]:
    """The kernels' kd [n] and its gradient [n, width] where the objective's numbers are given."""
    gradient = torch.empty_like(student)
    taus = objective.student_temperature, objective.teacher_temperature
    q, p = (Logits(raw, temperature=tau)
            for raw, tau in zip((student, teacher), taus, strict=True))
    block = Block(q, p, None, torch.float32, None, torch.ones(len(student), device=DEVICE), None,
                  gradient)
    loss = forward_backward_block(block, objective, VocabShard(0, student.shape[1]), kernels,
                                  values={key: of.to(DEVICE) for key, of in values.items()})
    assert loss.kd is not None
    return loss.kd, gradient


def truth_of_numbers(student: Tensor, teacher: Tensor, objective: AMiD,
                     values: dict[PerToken, Tensor]) -> tuple[Tensor, Tensor]:
    """The same by the naive twin, one token and its plain numbers at a time, in fp64."""
    def plain(number: object, token: int) -> object:
        return values[number][token].item() if isinstance(number, PerToken) else number

    kd, gradients = [], []
    for token, (row, of_teacher) in enumerate(zip(student, teacher, strict=True)):
        order = {key: plain(weight, token) for key, weight in objective.order_weights}
        numbers = AMiD(plain(objective.alpha, token), plain(objective.lam, token),
                       objective.divergence, order, objective.temperature,
                       objective.detach_assistant, objective.power)
        exact = row.double().requires_grad_()
        loss = naive_loss(exact, of_teacher.double(), numbers)
        kd.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, exact)[0] if loss.requires_grad
                         else torch.zeros_like(exact))
    return torch.stack(kd), torch.stack(gradients)


@pytest.mark.parametrize("objective", [
    *[pytest.param(AMiD(ALPHA, LAM, order=order), id=order, marks=pytest.mark.slow)
      for order in ORDERS],
    pytest.param(AMiD(ALPHA, LAM, order=EVERY_ORDER,
                      temperature={"student": 2.0, "teacher": 0.7}), id="two temperatures"),
    pytest.param(AMiD(ALPHA, LAM, order=EVERY_ORDER, detach_assistant=True), id="detached",
                 marks=pytest.mark.slow),
    pytest.param(AMiD(ALPHA, LAM, order=EVERY_ORDER, power=1.7), id="power"),
    pytest.param(AMiD(ALPHA, LAM, AlphaBeta(0.2, 0.7), {"pr": 0.5, "rq": WEIGHT}, power=0.6),
                 id="alpha_beta"),
    pytest.param(AMiD(ALPHA, LAM, "total_variation", {"qr": WEIGHT, "rp": 1.0}),
                 id="total_variation", marks=pytest.mark.slow),
    pytest.param(AMiD(ALPHA, LAM, "squared_hellinger", EVERY_ORDER), id="squared_hellinger")])
def test_a_number_per_token_is_that_number_at_that_token(objective):
    """Of α, λ and a weight; each token's kd and gradient are those of plain numbers."""
    n = len(NUMBERS)
    student, teacher = logits(1, n, 37), logits(2, n, 37)
    # Where p and q are close, and far apart.
    teacher[1::3] = student[1::3] + 0.01 * teacher[1::3]
    teacher[2::3] *= 8
    columns = [torch.tensor(column) for column in zip(*NUMBERS, strict=True)]
    values = {ALPHA: columns[0], LAM: columns[1], WEIGHT: torch.arange(n) % 4 / 2}
    kd, gradient = of_numbers(student, teacher, objective, values)
    expected, of_student = truth_of_numbers(student, teacher, objective, values)
    budget = 1e-3 if isinstance(objective.divergence, AlphaBeta) else 2e-4
    torch.testing.assert_close(kd.double(), expected, rtol=budget, atol=budget * 1e-2)
    assert relative_error(gradient, of_student) < budget
    for token, numbers in enumerate(NUMBERS):
        error = (gradient[token].double() - of_student[token]).norm()
        assert error <= budget * (of_student[token].norm() + 1e-2), numbers


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_weights_of_orders_per_token_leave_the_mixture_its_own_path(lam):
    for alpha in (-1.0, 1.0):
        for divergence in ("kl", "squared_hellinger"):
            objective = AMiD(alpha, lam, divergence, {"pr": WEIGHT, "rq": 0.3, "qr": WEIGHT})
            student, teacher = logits(1, 3, 37), logits(2, 3, 37)
            values = {WEIGHT: torch.tensor([0.0, 0.3, 2.0])}
            kd, gradient = of_numbers(student, teacher, objective, values)
            expected, of_student = truth_of_numbers(student, teacher, objective, values)
            torch.testing.assert_close(kd.double(), expected, rtol=2e-4, atol=2e-6)
            assert relative_error(gradient, of_student) < 2e-4


def test_a_divergence_is_infinite_at_the_tokens_whose_own_numbers_make_it_so():
    """-inf in one model's logits and not in the other's; an infinite term of weight 0 is none."""
    numbers = [(alpha, lam, weight) for alpha in (0.5, 1.0) for lam in (0.0, 0.3, 1.0)
               for weight in (0.0, 1.0)] + [(1.0, 1e-20, 1.0)]
    values = dict(zip((ALPHA, LAM, WEIGHT), torch.tensor(numbers).T, strict=True))
    infinite = set()
    for whose in (0, 1):
        pair = logits(1, len(numbers), 16), logits(2, len(numbers), 16)
        pair[whose][:, 5] = -math.inf
        pair[0][:, 7] = pair[1][:, 7] = -math.inf
        for divergence, order in (("kl", {"pr": WEIGHT, "rp": 1.0}),
                                  ("kl", {"qr": 1.0, "rq": WEIGHT}),
                                  (AlphaBeta(-0.3, 0.8), {"pr": 1.0, "qr": WEIGHT})):
            objective = AMiD(ALPHA, LAM, divergence, order)
            kd, gradient = of_numbers(*pair, objective, values)
            expected, _ = truth_of_numbers(*pair, objective, values)
            torch.testing.assert_close(kd.double(), expected, rtol=2e-4, atol=2e-6)
            assert gradient[kd.isfinite()].isfinite().all()
            infinite |= set(kd.isinf().tolist())
    assert infinite == {True, False}


@pytest.mark.parametrize("objective", [
    AMiD(-5.0, 0.1, temperature={"student": 2.0, "teacher": 0.5}),
    AMiD(-1.0, 0.5, order={"pr": 0.5, "qr": 0.5}, temperature={"student": 0.7, "teacher": 1.0}),
    # Veto's p·q^β, and powers of every other kind of mixture.
    AMiD(1.0, 1 / 1.4, order="rq", power=1.4), AMiD(-1.0, 0.3, power=0.5),
    AMiD(-1.0, 0.0, "squared_hellinger", "pr", power=2.0), AMiD(-1.0, 1.0, order="qr", power=0.8),
    AMiD(0.5, 0.3, AlphaBeta(0.2, 0.7), EVERY_ORDER, 1.5, power=1.3),
    AMiD(-5.0, ENTROPY, order={"pr": 1.0, "rq": ENTROPY}, power=1.2),
    AMiD(PerToken("overlap", (-5.0, 3.0), (0.2, 0.5)), 0.3, temperature=1.5),
    AMiD(-1.0, 0.0, order={"pr": ENTROPY, "rp": 1.0})], ids=[
        "two temperatures", "jsd of two temperatures", "product", "power of a mean",
        "power of the student", "power of the teacher", "power, alpha_beta", "lam and a weight",
        "alpha", "entropy-aware"])
@pytest.mark.parametrize(("dtype", "width", "budget"),
                         [(torch.float32, 2049, 2e-4), (torch.bfloat16, 15, 2**-7),
                          (torch.float16, 300, 2**-10)], ids=str)
def test_the_loss_from_logits_is_the_naive_twins(objective, dtype, width, budget):
    student, teacher = (logits(seed, 3, width, dtype=dtype) for seed in (1, 2))
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    loss = amid_loss(student, teacher, objective, backend="triton")
    truth = naive_loss(exact, teacher.double(), objective)
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-3, atol=2e-6)
    actual, = torch.autograd.grad(loss.sum(), student)
    expected, = torch.autograd.grad(truth.sum(), exact)
    assert relative_error(actual, expected) < max(budget, 1e-3)


def test_a_nan_makes_its_token_nan_and_no_other():
    for objective in (AMiD(-5.0, ENTROPY), AMiD(ENTROPY, 0.3, "total_variation"),
                      AMiD(-1.0, 0.0, order={"pr": ENTROPY, "rp": 1.0}),
                      AMiD(1.0, 0.5, order="rq", power=1.5)):
        for whose in (0, 1):
            pair = [logits(1, 3, 37), logits(2, 3, 37)]
            pair[whose][1, 20] = float("nan")
            student = pair[0].requires_grad_()
            loss = amid_loss(student, pair[1], objective, backend="triton")
            gradient, = torch.autograd.grad(loss.sum(), student)
            assert loss.isnan().tolist() == [False, True, False], objective
            assert gradient.isnan().any(-1).tolist() == [False, True, False], objective


def on_device(problem: LossProblem, objective: AMiD, statistics: tuple[str, ...], backend: str):
    tensors = (*problem.leaves(), problem.teacher, problem.teacher_weight, problem.weights,
               problem.labels)
    student, weight, bias, teacher, head, weights, labels = (x.to(DEVICE) for x in tensors)
    return linear_amid_loss(student, LMHead(weight, bias, 3.0, 0.7), teacher, head, objective,
                            token_weights=weights, labels=labels, ce_weight=0.4,
                            vocab_size=problem.vocab_size, statistics=statistics, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_linear_loss_and_its_statistics_are_those_of_plain_torch(dtype):
    """Masked tokens and labels, a cap, two temperatures, a weight of each token's own."""
    objective = AMiD(-5.0, PerToken("label_probability", (0.1, 0.9)),
                     order={"pr": 1.0, "qr": PerToken("overlap", (1.0, 0.0))},
                     temperature={"student": 1.5, "teacher": 0.8},
                     token_weight=PerToken("student_entropy", (2.0, 0.5), (1.0, 3.0)))
    problem = LossProblem(tokens=9, vocabulary=83).to(dtype)
    results = []
    for backend in ("torch", "triton"):
        out = on_device(problem, objective, STATISTICS, backend)
        assert set(out.statistics) == set(STATISTICS)
        results.append([out.loss, out.kd, out.ce, *[out.statistics[name] for name in STATISTICS],
                        *problem.gradients(out.loss)])
    for actual, expected in zip(results[1], results[0], strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7 if dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [2, 2100])
def test_measures_are_the_naive_ones_whichever_are_asked_for(width):
    student, teacher = logits(1, 6, width), logits(2, 6, width)
    student[1, 0] = teacher[2, 0] = student[3, 1] = teacher[3, 1] = -math.inf
    teacher[4, 1] = math.nan
    labels = torch.tensor([1, 0, 0, -100, 0, 1], device=DEVICE)
    taus = 2.0, 0.7
    truth = naive_measures(student.double() / taus[0], teacher.double() / taus[1], labels)
    q, p = Logits(student, temperature=taus[0]), Logits(teacher, temperature=taus[1])
    block = Block(q, p, None, torch.float32, labels.clamp(min=-1))
    norms, _ = row_normalisers(block, VocabShard(0, width), kernels)
    for names in (("teacher_entropy",), ("student_entropy",), ("overlap", "teacher_entropy"),
                  ("divergence",), ("label_probability",), MEASURES):
        found = kernels.measures(block, norms, names)
        expected = torch.stack([truth[name] for name in names])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
