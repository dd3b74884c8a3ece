"""The kernels stay within the error budget with a GPU's approximate exp2, log2 and reciprocal.

A model of their errors takes the place of the interpreter's exact functions: each result is off by
the bound that NVIDIA's PTX ISA states for ex2, lg2 and rcp (.approx.ftz.f32), 2⁻²² of itself, for
lg2 2⁻²² where its argument lies in [½, 2], and 2⁻²³ for rcp; subnormal numbers are 0. The same
argument gets the same error, as it does on a GPU.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
import triton
import triton.language as tl
from triton.runtime import interpreter

from amid_ds import AlphaBeta, AMiD, PerToken, amid_loss, preset
from amid_ds.losses import kernels
from amid_ds.losses.kernel_arguments import mixture_arguments
from amid_ds.losses.kernel_math import MIXTURE_POWER, SERIES_LIMIT, log_mixture
from amid_ds.losses.reference import naive_loss

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")

LEAST = np.float32(2.0**-126)


def direction(x: np.ndarray, signs: str) -> np.ndarray:
    """The error's direction at each argument: 1, -1, or either by the argument's bits."""
    if signs != "mixed":
        return np.float32(1 if signs == "up" else -1)
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return np.where((bits * np.uint32(2654435761)) >> np.uint32(31), np.float32(1), np.float32(-1))


def normal(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < LEAST, np.float32(0), x)


@pytest.fixture(params=["mixed", pytest.param("up", marks=pytest.mark.slow),
                        pytest.param("down", marks=pytest.mark.slow)])
def approximate(request, monkeypatch) -> None:
    """exp2, log2 and division of the interpreter as a GPU might have them."""
    signs, bound = request.param, np.float32(2.0**-22)

    def exp2(x: np.ndarray) -> np.ndarray:
        return normal(np.exp2(normal(x)) * (1 + direction(x, signs) * bound))

    def log2(x: np.ndarray) -> np.ndarray:
        log = np.log2(normal(x))
        size = np.where((x >= 0.5) & (x <= 2), np.float32(1), np.abs(log))
        return np.where(np.isfinite(log), log + direction(x, signs) * size * bound, log)

    def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return normal(np.divide(x, normal(y)) * (1 + direction(y, signs) * bound / 2))

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_exp2", lambda self, x: self.unary_op(x, exp2))
    monkeypatch.setattr(builder, "create_log2", lambda self, x: self.unary_op(x, log2))
    monkeypatch.setattr(builder, "create_fdiv", lambda self, x, y: self.binary_op(x, y, divide))


def models(kind: str) -> tuple[Tensor, Tensor]:
    """The logits [3, 1500] of a student and a teacher."""
    draw = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(3, 1500, generator=draw) for _ in range(2))
    if kind == "unsure":
        return 2 * student, 2 * teacher
    # Nearly all of the probability at one token, as after training.
    student, teacher = 3 * student, 3 * teacher
    student[:, 7] += 16
    teacher[:, 7] += 18
    return (student, teacher) if kind == "sure" else (teacher + 0.02 * student, teacher)


OBJECTIVES = [
    preset("gkd", beta=0.3), preset("skl"), preset("srkl"), preset("fkl"), AMiD(-5.0, 0.1),
    AMiD(-1.0, 1e-6, order="rp"), AMiD(0.001, 0.1, order="qr"), AMiD(0.9, 0.3, order="rq"),
    AMiD(0.9, 0.3, "squared_hellinger"), AMiD(1.0, 0.4, order="rq", detach_assistant=True),
    AMiD(3.0, 0.3, order={"pr": 1.0, "qr": 0.5, "rp": 0.3}), AMiD(-5.0, 0.1, "total_variation"),
    AMiD(-1.0, 0.2, AlphaBeta(0.2, 0.7)), AMiD(1.0, 1 / 1.4, order="rq", power=1.4),
    AMiD(PerToken("overlap", (-5.0, 1.0), (0.0, 0.3)),
         PerToken("teacher_entropy", (0.0, 1.0), (1.0, 5.0)), order={"pr": 1.0, "rq": 0.5})]


@pytest.mark.parametrize("kind", ["sure", pytest.param("unsure", marks=pytest.mark.slow),
                                  pytest.param("the teacher's", marks=pytest.mark.slow)])
def test_approximate_functions_leave_loss_and_gradient_within_the_fp32_budget(
        approximate, kind, monkeypatch):
    """The budget of test_losses_kernels.py: 2e-4 of the truth (α-β: 1e-3), and 2e-6 beside it."""
    # Full blocks and a tail.
    monkeypatch.setattr(kernels, "MAX_COLUMNS", 512)
    student, teacher = models(kind)
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    for objective in OBJECTIVES:
        budget = 1e-3 if isinstance(objective.divergence, AlphaBeta) else 2e-4
        loss = amid_loss(student, teacher, objective, backend="triton")
        truth = naive_loss(exact, teacher.double(), objective)
        assert (loss - truth).abs().max() <= budget * (truth.abs().max() + 1e-2), objective
        actual, = torch.autograd.grad(loss.sum(), student)
        expected, = torch.autograd.grad(truth.sum(), exact)
        error = (actual.double() - expected).norm()
        assert error <= budget * (expected.norm() + 1e-2), objective


@triton.jit
def mixture_kernel(logs, out, c, lam, log_lam, log_rest, SERIES: tl.constexpr, N: tl.constexpr):
    """out [2, N] = log₂ r̃ and w of log₂ p and log₂ q, logs [2, N]."""
    ids = tl.arange(0, N)
    log_r, _, w = log_mixture(tl.load(logs + ids), tl.load(logs + N + ids), c, 1.0 / c, lam,
                              log_lam, log_rest, 1.0, MIXTURE_POWER, SERIES, False, False)
    tl.store(out + ids, log_r)
    tl.store(out + N + ids, w)


@pytest.mark.parametrize("c", [0.5, -0.5, 1.0, 3.0, -4.5, 0.4, -0.1, 1e-3])
@pytest.mark.parametrize("lam", [0.01, 0.3, 0.9])
def test_log_r_is_exact_to_millionths_of_a_bit_with_the_series_where_it_is_needed(
        approximate, c, lam):
    """The logaddexp form is off by log₂(1 + e)'s 2⁻²² over c, which from |c| = ½ on is no more than
    log₂ p has been rounded by; below that a series takes over where p and q are close."""
    arguments = mixture_arguments(AMiD(1 - 2 * c, lam, AlphaBeta(0.2, 0.7)).resolved({}))
    assert arguments["SERIES"] == (abs(c) < 0.5)
    logs = torch.stack(torch.meshgrid(*[torch.linspace(-16, -0.01, 32)] * 2, indexing="ij"))
    out = torch.empty(2, 1024)
    mixture_kernel[(1,)](logs.flatten(1).contiguous(), out, c, lam, arguments["log_lam"],
                         arguments["log_rest"], SERIES=arguments["SERIES"], N=1024)
    log_p, log_q = logs.flatten(1).double() * math.log(2)
    upper, lower = math.log(lam) + c * log_p, math.log1p(-lam) + c * log_q
    both = torch.logaddexp(upper, lower)
    error = (out[0] - both / c / math.log(2)).abs()
    close = (c * (log_p - log_q)).abs() < SERIES_LIMIT.value
    assert error[close].max() < 3 * 2**-20
    # Three roundings of a number between 8 and 16 are 1.5 of these.
    assert error.max() < (1.5 + 1 / abs(c)) * 2**-20
    assert (out[1] - (lower - both).exp()).abs().max() < 2**-20
