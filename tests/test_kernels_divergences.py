"""The kernels of the divergences at their limits and of residuals, against plain torch."""

from __future__ import annotations

import pytest
import torch
from support.losses import LossProblem, relative_error, value_and_gradient, with_zeros

from amid_ds import AlphaBeta, AMiD, ConcreteScore, amid_loss, preset
from amid_ds.errors import InputError

LIMITS = [AlphaBeta(0.4, 0), AlphaBeta(-1.5, 1.5), AlphaBeta(0, -0.6), AlphaBeta(-0.6, 0)]
WEIGHTS = [("student", "student"), ("uniform", "student"), ("teacher", "student"),
           ("teacher", "teacher")]


@pytest.mark.parametrize("measure", [
    AlphaBeta(0, 0.7), AlphaBeta(0.4, -0.4), AlphaBeta(0, 0), AlphaBeta(0.03, -0.04),
    *(pytest.param(each, marks=pytest.mark.slow)
      for each in (*LIMITS, AlphaBeta(1e-6, 1), AlphaBeta(0.05, -0.04), AlphaBeta(-0.3, -0.2),
                   AlphaBeta(1.5, -0.5)))], ids=str)
def test_the_kernels_have_the_limits(measure):
    # A power must leave what neither model says as likely in r as in p.
    for alpha, lam, order, power in ((-5.0, 0.3, "pr", 1), (3.0, 0.5, {"rq": 0.5, "qr": 0.3}, 1),
                                     (-1.0, 0.0, "qr", 0.7)):
        objective = AMiD(alpha, lam, measure, order, power=power)
        truth, of_truth = value_and_gradient(*with_zeros(), objective)
        loss, gradient = value_and_gradient(*with_zeros(torch.float32), objective,
                                            backend="triton")
        finite = truth.isfinite()
        assert torch.equal(loss.isfinite(), finite) and not loss.isnan().any()
        torch.testing.assert_close(loss[finite].double(), truth[finite], rtol=1e-5, atol=1e-6)
        assert relative_error(gradient[finite], of_truth[finite]) < 1e-5


@pytest.mark.parametrize("weights", [
    *WEIGHTS[:2], *(pytest.param(each, marks=pytest.mark.slow) for each in WEIGHTS[2:])], ids=str)
def test_the_kernels_have_concrete_scores_of_the_models(weights):
    for lam, order, tau in ((0.0, "pr", 1.0),
                            (1.0, {"qr": 0.5, "rq": 0.3, "pr": 1.0}, {"student": 2, "teacher": 1})):
        objective = AMiD(-1.0, lam, ConcreteScore(*weights), order, tau)
        truth, of_truth = value_and_gradient(*with_zeros(), objective)
        loss, gradient = value_and_gradient(*with_zeros(torch.float32), objective,
                                            backend="triton")
        finite = truth.isfinite()
        assert torch.equal(loss.isfinite(), finite)
        torch.testing.assert_close(loss[finite].double(), truth[finite], rtol=1e-5, atol=1e-6)
        assert relative_error(gradient[finite], of_truth[finite]) < 1e-5


def test_the_kernels_refuse_a_concrete_score_through_the_assistant():
    # Nor one of p and a detached r = q, which has no gradient.
    for lam, detach in ((0.1, False), (0.0, True)):
        with pytest.raises(InputError, match="backend='triton'"):
            amid_loss(torch.zeros(2, 5), torch.zeros(2, 5),
                      AMiD(-1.0, lam, ConcreteScore(), detach_assistant=detach), backend="triton")


@pytest.mark.parametrize(("name", "parameters", "launched"), [
    ("sampled_rkl", {"baseline": "none"}, ["normalisers", "gradient"]),
    ("sampled_rkl", {"baseline": "kl"}, ["normalisers", "sums", "gradient"]),
    ("rkl", {}, ["normalisers", "sums", "gradient"]),
    ("csd", {}, ["normalisers", "residual_sums", "score", "gradient"])])
def test_the_logits_are_read_no_more_often_than_it_takes(name, parameters, launched, monkeypatch):
    from amid_ds.losses import kernels

    seen, real = [], kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda kernel, *rest, **options: (
        seen.append(kernel.__name__.removesuffix("_kernel")), real(kernel, *rest, **options)))
    LossProblem(2, 5, dtype=torch.float32).fused(preset(name, **parameters), backend="triton")
    assert seen == launched
