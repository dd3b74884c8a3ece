"""The Triton kernels against the naive twin in fp64.

On a GPU if there is one, else under Triton's interpreter (conftest.py sets TRITON_INTERPRET).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.losses import EVERY_DIVERGENCE, LossProblem, relative_error
from torch import Tensor

from amid_ds import (
    AlphaBeta,
    AMiD,
    LMHead,
    PerToken,
    VocabShard,
    amid_loss,
    linear_amid_loss,
    preset,
)
from amid_ds.errors import InputError
from amid_ds.losses import fused
from amid_ds.losses.divergences import divergence_from
from amid_ds.losses.objective import ORDERS
from amid_ds.losses.reference import naive_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from amid_ds.losses import kernels  # noqa: E402
from amid_ds.losses.kernel_arguments import is_balanced  # noqa: E402
from amid_ds.losses.kernel_math import DIVERGENCE_CODES  # noqa: E402


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32,
           scale: float = 2.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw) * scale).to(dtype).to(DEVICE)


def check(student: Tensor, teacher: Tensor, objective: AMiD, budget: float, value: float,
          **options: Any) -> None:
    """Value and gradient of the kernels within `value` and `budget` of the truth."""
    student = student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    weights = torch.rand(student.shape[:-1], generator=torch.Generator().manual_seed(5)).to(DEVICE)
    size = options.get("vocab_size", student.shape[-1])
    ours = amid_loss(student, teacher, objective, backend="triton", **options)
    truth = naive_loss(exact[..., :size], teacher.double()[..., :size], objective)
    torch.testing.assert_close(ours.double(), truth.detach(), rtol=value, atol=value * 1e-2)
    actual, = torch.autograd.grad((ours * weights).sum(), student)
    if truth.requires_grad:
        expected, = torch.autograd.grad((truth * weights).sum(), exact)
    else:
        expected = torch.zeros_like(exact)
    assert actual.dtype == student.dtype
    assert relative_error(actual, expected) < budget


# Others run in plain torch, or have kernels for the two models alone (test_kernels_divergences.py).
WITH_KERNELS = [each for each in EVERY_DIVERGENCE
                if type(divergence_from(each)) in DIVERGENCE_CODES
                and kernels.supports(AMiD(-5.0, 0.3, each), [torch.float32])]


@pytest.mark.parametrize("measure", WITH_KERNELS, ids=str)
@pytest.mark.parametrize("alpha", [-10.0, -5.0, -1.0, 0.999, 1.0, 1.01, 3.0])
def test_every_divergence_and_order_is_within_the_fp32_budget(measure, alpha):
    budget = 1e-3 if isinstance(measure, AlphaBeta) else 2e-4
    for order in [*ORDERS, {"pr": 0.5, "qr": 0.25, "rp": 1.0, "rq": 2.0}]:
        check(logits(1, 3, 37), logits(2, 3, 37), AMiD(alpha, 0.3, measure, order, 1.5), budget,
              2e-4)


@pytest.mark.parametrize("lam", [0.0, 1e-6, 1.0])
def test_the_ends_of_lam_and_the_detached_assistant(lam):
    for objective in (AMiD(-5.0, lam, "kl", "rp" if lam < 1 else "qr"),
                      AMiD(0.0, lam, "squared_hellinger", {"pr": 0.5, "qr": 1.0}),
                      AMiD(1.0, 0.4, order="rq", detach_assistant=True)):
        check(logits(1, 3, 37), logits(2, 3, 37), objective, 2e-4, 2e-4)


def test_an_arithmetic_mixture_is_made_of_probabilities_and_at_balance_has_no_pull_through_r():
    """KL and λ : 1-λ as κ_pr : κ_qr (GKD), other weights, and λ too small for p and q in fp32."""
    for objective in (preset("gkd", beta=0.3), preset("gkd", beta=0.9, temperature=2.0),
                      AMiD(-1.0, 0.3, order={"pr": 0.3, "qr": 0.7}, detach_assistant=True),
                      AMiD(-1.0, 0.3, order={"pr": 0.7, "qr": 0.3}), preset("srkl"),
                      AMiD(-1.0, 1e-9, order="pr"), AMiD(-1.0, 1e-9, "squared_hellinger")):
        check(logits(1, 3, 37), logits(2, 3, 37), objective, 2e-4, 2e-4)
    assert is_balanced(preset("gkd", beta=0.3).resolved({}))
    assert not is_balanced(preset("skl").resolved({}))


def test_columns_that_do_not_lie_side_by_side():
    student, teacher = logits(1, 74, 3).t()[:, ::2], logits(2, 3, 37, 2)[..., 0]
    assert student.stride(-1) != 1 and teacher.stride(-1) != 1
    check(student, teacher, AMiD(-5.0, 0.1), 2e-4, 2e-4)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_nan_makes_its_token_nan_and_no_other(whose):
    for objective in (preset("gkd"), AMiD(-5.0, 0.1), AMiD(3.0, 0.1, order="rp"), preset("fkl"),
                      AMiD(-5.0, 0.1, "total_variation")):
        rows = {"student": logits(1, 3, 37), "teacher": logits(2, 3, 37)}
        rows[whose][1, 20] = float("nan")
        student = rows["student"].requires_grad_()
        loss = amid_loss(student, rows["teacher"], objective, backend="triton")
        gradient, = torch.autograd.grad(loss.sum(), student)
        assert loss.isnan().tolist() == [False, True, False], objective
        assert gradient.isnan().any(-1).tolist() == [False, True, False], objective


@pytest.mark.parametrize("width", [2, 15, 2048, 2049, 5000])
def test_ragged_widths_and_several_blocks_of_a_row(width):
    check(logits(1, 2, width + 3), logits(2, 2, width + 9), AMiD(-5.0, 0.1, order="qr"), 2e-4, 2e-4,
          vocab_size=width)


@pytest.mark.parametrize(("dtype", "budget"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_low_precision_logits_are_read_exactly_and_only_the_gradient_is_rounded(dtype, budget):
    """Rounded when written (the interpreter truncates bf16) and by the upstream gradient."""
    for objective in (AMiD(-5.0, 0.1), AMiD(3.0, 0.3, "total_variation", "rq")):
        check(logits(1, 3, 300, dtype=dtype), logits(2, 3, 300, dtype=dtype), objective, budget,
              2e-4)


@pytest.mark.parametrize("alpha", [-10.0, 1.0, 1 + 1e-6, 3.0, 10.0])
def test_extreme_logits_stay_finite_and_right(alpha):
    student, teacher = (logits(seed, 4, 50, scale=1e4).clamp(-1e4, 1e4).round() for seed in (1, 2))
    student[0, 0] = teacher[0, 0] = 1e4
    teacher[1] = student[1]
    for order in ORDERS:
        loss = amid_loss(student, teacher, AMiD(alpha, 0.1, order=order), backend="triton")
        truth = naive_loss(student.double(), teacher.double(), AMiD(alpha, 0.1, order=order))
        torch.testing.assert_close(loss, truth.float(), rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", [AMiD(-5.0, 0.1),
                                       AMiD(0.5, 0.3, AlphaBeta(0.2, 0.7), {"pr": 0.5, "qr": 0.5},
                                            2.0)], ids=str)
def test_the_linear_loss_is_that_of_plain_torch(dtype, objective):
    problem = LossProblem(tokens=13, vocabulary=83).to(dtype)
    results = []
    for backend in ("torch", "triton"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "_tokens_per_block", lambda *_: 4)
            out = on_device(problem, objective, backend)
        results.append([out.loss, out.kd, out.ce, *problem.gradients(out.loss)])
    for actual, expected in zip(results[1], results[0], strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7 if dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [0.3, -2.0])
def test_a_scale_without_a_cap(scale):
    problem = LossProblem(tokens=5, vocabulary=41, dtype=torch.float32)
    results = [problem.fused(AMiD(-5.0, 0.1, temperature=2.0), scale=scale, backend=backend)
               for backend in ("torch", "triton")]
    for expected, actual in zip(*[[out.loss, out.kd, out.ce, *problem.gradients(out.loss)]
                                  for out in results], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def on_device(problem: LossProblem, objective: AMiD, backend: str) -> fused.LossOutput:
    tensors = (*problem.leaves(), problem.teacher, problem.teacher_weight, problem.weights,
               problem.labels)
    student, weight, bias, teacher, head, weights, labels = (x.to(DEVICE) for x in tensors)
    return linear_amid_loss(student, LMHead(weight, bias, 3.0, 0.7), teacher, head, objective,
                            token_weights=weights, labels=labels, ce_weight=0.4,
                            vocab_size=problem.vocab_size, backend=backend)


def test_cross_entropy_alone():
    problem = LossProblem(dtype=torch.float32)
    student, weight, weights, labels = (
        x.to(DEVICE) for x in (problem.student, problem.weight, problem.weights, problem.labels))
    out = linear_amid_loss(student, weight, None, None, None, token_weights=weights, labels=labels,
                           ce_weight=1.0, kd_weight=0.0, backend="triton")
    truth = (weights * F.cross_entropy(student @ weight.t(), labels, reduction="none")).sum()
    torch.testing.assert_close(out.loss, truth)
    leaves = [problem.student, problem.weight]
    for actual, expected in zip(torch.autograd.grad(out.loss, leaves),
                                torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class Peers(VocabShard):
    """Ranks in one process, by turns: the peers' rows are those of the round before."""

    def gather(self, local: Tensor) -> Tensor:
        rank, mine, before = self.noted
        mine.append(local)
        call = len(mine) - 1
        return torch.stack([
            local if peer == rank else sent[call] if call < len(sent) else torch.zeros_like(local)
            for peer, sent in enumerate(before)])


ENTROPY = PerToken("teacher_entropy", (0.1, 0.9), (1.0, 3.0))


@pytest.mark.parametrize(("objective", "exchanges"), [
    (AMiD(-5.0, 0.1, order={"pr": 0.5, "qr": 0.2, "rp": 1.0, "rq": 0.3}), 2),
    (AMiD(3.0, 0.4, "squared_hellinger"), 3),
    (AMiD(-5.0, ENTROPY, order={"pr": 1.0, "rq": PerToken("overlap")}, power=1.3), 3),
    (AMiD(PerToken("divergence", (-1.0, 1.0), (0.0, 3.0)), 0.4, "squared_hellinger",
          temperature={"student": 2.0, "teacher": 1.0}), 4)],
    ids=["kl", "squared_hellinger", "kl per token", "squared_hellinger per token"])
def test_uneven_shards_are_put_together_in_two_or_three_collectives_and_one_for_measures(
        objective, exchanges):
    """A rank's n-th exchange is right once the first n − 1 are: exchanges + 1 rounds suffice."""
    student, teacher = logits(1, 3, 61), logits(2, 3, 61)
    cuts = [0, 17, 21, 61]
    ranks = range(len(cuts) - 1)
    sent: list[list[Tensor]] = [[] for _ in ranks]
    for _ in range(exchanges + 1):
        before, sent, results = sent, [[] for _ in ranks], []
        for rank in ranks:
            columns = slice(cuts[rank], cuts[rank + 1])
            shard = Peers(columns.start, columns.stop, group="peers")  # type: ignore[arg-type]
            object.__setattr__(shard, "noted", (rank, sent[rank], before))
            shard._extent.extend([40, 61])
            shard._least["the device"] = [80 << 30, 132]
            part = student[:, columns].clone().requires_grad_()
            loss = amid_loss(part, teacher[:, columns], objective, shard=shard, backend="triton")
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), part)[0]))
    assert [len(calls) for calls in sent] == [exchanges] * len(ranks)
    whole = student.clone().requires_grad_()
    loss = amid_loss(whole, teacher, objective)
    expected, = torch.autograd.grad(loss.sum(), whole)
    for actual, _ in results:
        torch.testing.assert_close(actual, loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in results], -1), expected,
                               rtol=1e-4, atol=1e-6)


def test_fp64_and_unknown_divergences_are_refused_by_name():
    with pytest.raises(InputError, match="float64"):
        amid_loss(logits(1, 2, 5).double(), logits(1, 2, 5).double(), AMiD(), backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU here")
def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(InputError, match="triton") as error:
        amid_loss(logits(1, 2, 5), logits(1, 2, 5), AMiD(), backend="triton")
    assert "auto" in error.value.remedy


def test_a_head_wrapped_for_the_kernels_may_be_frozen():
    problem = LossProblem(dtype=torch.float32)
    problem.weight.requires_grad_(False)
    on_device(problem, AMiD(), "triton").loss.backward()
    assert problem.weight.grad is None and problem.student.grad is not None
