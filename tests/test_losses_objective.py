"""The objective as data: presets against their papers' formulas, properties, refusals."""

from __future__ import annotations

import dataclasses
import textwrap

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.losses import value_and_gradient, with_zeros
from torch import Tensor

from amid_ds import AlphaBeta, AMiD, PerToken, amid_loss, preset
from amid_ds.errors import InputError
from amid_ds.losses import divergences
from amid_ds.losses.divergences import DIVERGENCES, divergence_from
from amid_ds.losses.objective import ORDERS

MEASURES = ["kl", AlphaBeta(0.2, 0.7), "total_variation", "squared_hellinger"]
alphas = st.one_of(st.sampled_from([-10.0, -5.0, -1.0, 0.0, 1.0, 3.0, 10.0]), st.floats(-10, 10))
lams = st.one_of(st.sampled_from([0.0, 1e-6, 0.5, 1.0]), st.floats(0, 1))
orders = st.sampled_from([*ORDERS, {"pr": 0.5, "qr": 0.5}, {"rp": 0.3, "rq": 2.0, "qr": 1.0}])
objectives = st.builds(AMiD, alphas, lams, st.sampled_from(MEASURES), orders,
                       st.sampled_from([1.0, 0.5, 3.0]))
seeds = st.integers(0, 10_000)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64) * scale


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(-1, keepdim=True)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def taid(t: float, student: Tensor, teacher: Tensor) -> Tensor:
    target = softmax((1 - t) * student.detach() + t * teacher)
    return kl(target, softmax(student))


def abkd(x: float, y: float, p: Tensor, q: Tensor) -> Tensor:
    return -(p**x * q**y - x / (x + y) * p ** (x + y)
             - y / (x + y) * q ** (x + y)).sum(-1) / (x * y)


def gjsd(beta: float, p: Tensor, q: Tensor) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


PAPERS = {
    "fkl": ({}, lambda s, t: kl(softmax(t), softmax(s))),
    "rkl": ({}, lambda s, t: kl(softmax(s), softmax(t))),
    "skl": ({"lam": 0.1}, lambda s, t: kl(softmax(t), 0.1 * softmax(t) + 0.9 * softmax(s))),
    "srkl": ({"lam": 0.9}, lambda s, t: kl(softmax(s), 0.1 * softmax(s) + 0.9 * softmax(t))),
    "gkd": ({"beta": 0.3}, lambda s, t: gjsd(0.3, softmax(t), softmax(s))),
    "taid": ({"t": 0.4}, lambda s, t: taid(0.4, s, t)),
    "abkd": ({"alpha": 0.2, "beta": 0.7}, lambda s, t: abkd(0.2, 0.7, softmax(t), softmax(s))),
    "veto": ({"beta": 0.8}, lambda s, t: kl(softmax(0.8 * s.detach() + t), softmax(s))),
    "amid": ({"alpha": 3.0, "lam": 0.3},
             lambda s, t: kl(softmax(t), harmonic(0.3, softmax(t), softmax(s)))),
}


def harmonic(lam: float, p: Tensor, q: Tensor) -> Tensor:
    r = 1 / (lam / p + (1 - lam) / q)
    return r / r.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", PAPERS)
def test_preset_is_its_papers_formula_in_value_and_gradient(name):
    parameters, formula = PAPERS[name]
    student, teacher = logits(1, 5, 17).requires_grad_(), logits(2, 5, 17)
    weights = logits(3, 5).abs()
    ours = amid_loss(student, teacher, preset(name, **parameters))
    truth = formula(student, teacher)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad((loss * weights).sum(), student)[0] for loss in (ours, truth)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PAPERS)
def test_every_preset_takes_a_temperature_that_divides_both_logits(name):
    parameters, formula = PAPERS[name]
    student, teacher = logits(1, 5, 17), logits(2, 5, 17)
    ours = amid_loss(student, teacher, preset(name, temperature=2.5, **parameters))
    torch.testing.assert_close(ours, formula(student / 2.5, teacher / 2.5), rtol=1e-10, atol=1e-12)


@given(objectives, seeds)
@quick
def test_a_divergence_is_never_negative(objective, seed):
    assert (amid_loss(logits(seed, 4, 9), logits(seed + 1, 4, 9), objective) >= -1e-12).all()


@given(objectives, seeds)
@quick
def test_a_divergence_between_equal_models_is_zero_and_so_is_its_gradient(objective, seed):
    student = logits(seed, 4, 9).requires_grad_()
    loss = amid_loss(student, student.detach() + 3.0, objective)
    loss.sum().backward()
    assert loss.detach().abs().max() < 1e-9
    assert (objective.resolved_divergence.name == "total_variation"
            or student.grad.abs().max() < 1e-9)


@given(alphas, st.floats(0.01, 0.99), st.sampled_from(MEASURES), st.sampled_from(ORDERS), seeds)
@quick
def test_a_divergence_between_different_models_is_above_zero(alpha, lam, measure, order, seed):
    student, teacher = logits(seed, 4, 9), logits(seed + 1, 4, 9)
    assert (amid_loss(student, teacher, AMiD(alpha, lam, measure, order)) > 0).all()


@given(objectives, seeds, st.floats(-50, 50))
@quick
def test_the_loss_does_not_change_when_logits_are_shifted_or_the_vocabulary_is_permuted(objective,
                                                                                        seed,
                                                                                        shift):
    student, teacher = logits(seed, 4, 9), logits(seed + 1, 4, 9)
    loss = amid_loss(student, teacher, objective)
    torch.testing.assert_close(amid_loss(student + shift, teacher - shift, objective), loss,
                               rtol=1e-9, atol=1e-11)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(amid_loss(student[:, order], teacher[:, order], objective), loss,
                               rtol=1e-9, atol=1e-11)


@given(alphas, st.sampled_from(MEASURES), seeds)
@quick
def test_the_ends_of_lam_are_the_models_themselves(alpha, measure, seed):
    student, teacher = logits(seed, 4, 9), logits(seed + 1, 4, 9)

    def loss(lam: float, order: str) -> Tensor:
        return amid_loss(student, teacher, AMiD(alpha, lam, measure, order))

    for lam, order in ((0.0, "qr"), (0.0, "rq"), (1.0, "pr"), (1.0, "rp")):
        assert loss(lam, order).abs().max() < 1e-12
    torch.testing.assert_close(loss(0.0, "pr"), loss(1.0, "rq"))  # D(p‖q) both
    torch.testing.assert_close(loss(0.0, "rp"), loss(1.0, "qr"))  # D(q‖p) both


@given(st.floats(0.01, 0.99), st.sampled_from(ORDERS), seeds,
       st.sampled_from([1e-3, 1e-5, 1e-9, 1e-14]))
@quick
def test_the_loss_is_continuous_through_alpha_one(lam, order, seed, step):
    def loss(alpha: float) -> Tensor:
        return amid_loss(logits(seed, 4, 9), logits(seed + 1, 4, 9), AMiD(alpha, lam, "kl", order))

    for alpha in (1 - step, 1 + step):
        torch.testing.assert_close(loss(alpha), loss(1.0), rtol=20 * step + 1e-11,
                                   atol=20 * step + 1e-13)


@given(alphas, lams, st.sampled_from(MEASURES), seeds)
@quick
def test_a_mapping_of_orders_is_their_weighted_sum(alpha, lam, measure, seed):
    student, teacher = logits(seed, 4, 9), logits(seed + 1, 4, 9)
    weights = {"pr": 0.5, "qr": 0.0, "rp": 2.0, "rq": 0.25}
    parts = sum(weight * amid_loss(student, teacher, AMiD(alpha, lam, measure, order))
                for order, weight in weights.items())
    torch.testing.assert_close(amid_loss(student, teacher, AMiD(alpha, lam, measure, weights)),
                               parts)


@given(alphas, st.floats(0.01, 0.99), seeds)
@quick
def test_the_mixture_is_the_alpha_power_mean_for_every_alpha(alpha, lam, seed):
    """The definition, not the published code's: α above 1 is not taken for 1."""
    assume(abs(alpha - 1) > 0.05)
    p, q = softmax(logits(seed, 3, 7)), softmax(logits(seed + 1, 3, 7))
    c = (1 - alpha) / 2
    r = (lam * p**c + (1 - lam) * q**c) ** (1 / c)
    truth = kl(p, r / r.sum(-1, keepdim=True))
    ours = amid_loss(q.log(), p.log(), AMiD(alpha, lam))
    torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-11)


def test_a_new_divergence_is_one_small_class():
    """The class that the docstring of divergences.py writes, read from there."""
    example = divergences.__doc__.partition("write its class here,\n\n")[2]
    try:
        exec(textwrap.dedent(example.partition("\nand its")[0]), vars(divergences).copy())
        student, teacher = logits(1, 4, 9).requires_grad_(), logits(2, 4, 9)
        objective = AMiD(-5.0, 0.4, "squared_distance", "qr")
        assert torch.autograd.gradcheck(lambda s: amid_loss(s, teacher, objective), student)
        student, teacher = with_zeros()
        loss, gradient = value_and_gradient(student, teacher, objective)
        assert loss.isfinite().all() and gradient.isfinite().all()
    finally:
        del DIVERGENCES["squared_distance"]


def test_a_divergence_may_be_named_as_a_recipe_names_it():
    assert divergence_from({"alpha_beta": {"alpha": 0.2, "beta": 0.7}}) == AlphaBeta(0.2, 0.7)
    assert AMiD(divergence={"kl": {}}).resolved_divergence == divergence_from("kl")


def test_an_objective_is_frozen_and_can_be_replaced_in_part():
    objective = AMiD(alpha=-5.0, order={"pr": 1.0, "rq": 0.5})
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.alpha = 0.0
    moved = dataclasses.replace(objective, alpha=2.0)
    assert (moved.alpha, moved.order_weights) == (2.0, (("pr", 1.0), ("rq", 0.5)))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: AMiD(alpha=float("nan")), "alpha=nan"),
    (lambda: AMiD(alpha=float("inf")), "alpha=inf"),
    (lambda: AMiD(alpha="1"), "alpha='1'"),
    (lambda: AMiD(alpha=True), "alpha=True"),
    (lambda: AMiD(lam=-0.1), "lam=-0.1"),
    (lambda: AMiD(lam=1.1), "lam=1.1"),
    (lambda: AMiD(temperature=0), "temperature=0"),
    (lambda: AMiD(divergence="kld"), "'kld'"),
    (lambda: AMiD(divergence=["kl"]), r"\['kl'\]"),
    (lambda: AMiD(divergence="alpha_beta"), "alpha_beta"),
    (lambda: AMiD(divergence={"kl": {"x": 1}}), "'x'"),
    (lambda: AMiD(divergence={"kl": {}, "total_variation": {}}), "total_variation"),
    (lambda: AMiD(order="pq"), "'pq'"),
    (lambda: AMiD(order={}), "{}"),
    (lambda: AMiD(order={"pr": -1.0}), "-1.0"),
    (lambda: AMiD(order={"pr": 0.0}), "0.0"),
    (lambda: AMiD(order={"pr": float("nan")}), "nan"),
    (lambda: AMiD(detach_assistant="no"), "'no'"),
    (lambda: AlphaBeta("0", 1.0), "alpha='0'"),
    (lambda: AlphaBeta(1.0, float("inf")), "inf"),
    (lambda: preset("jsd"), "'jsd'"),
    (lambda: AMiD(divergence={"concrete_score": {"firs": "student"}}), "(?s)'firs'.* first, sec"),
    (lambda: preset("skl", beta=0.1), "(?s): got an unexpected.*'beta'.* lam, temperature"),
    (lambda: preset("taid"), "'t'"),
    (lambda: preset("veto", beta=PerToken("overlap")), "beta=PerToken"),
    (lambda: preset("veto", beta=-1.0), "(?s)beta=-1.0.*a number from 0\n"),
    (lambda: preset("gkd", beta=1.0), "beta=1.0"),
])
def test_a_bad_value_is_refused_with_what_was_found_and_what_to_do(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert error.value.expected and error.value.remedy
