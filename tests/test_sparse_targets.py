"""The loss on a teacher that was written down sparsely: against the naive twin, whole teachers and
draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.losses import EVERY_DIVERGENCE, OBJECTIVES, PER_TOKEN, relative_error
from support.sparse import SparseProblem, sampled_targets, topk_targets, with_teacher_untempered
from torch import Tensor

from amid_ds import (
    AlphaBeta,
    AMiD,
    LMHead,
    PerToken,
    SparseTargets,
    linear_amid_loss,
    preset,
)
from amid_ds.errors import InputError
from amid_ds.losses import LossOutput, fused, tiles
from amid_ds.losses.measures import STATISTICS
from amid_ds.losses.objective import ORDERS
from amid_ds.losses.sparse_reference import naive_sparse_loss, naive_sparse_measures

EVERY_KIND = [*OBJECTIVES, *PER_TOKEN]


@pytest.mark.parametrize("rest", ["ghost", "spread", "drop"])
@pytest.mark.parametrize("objective", EVERY_KIND, ids=str)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_loss_and_its_gradients_are_the_naive_twins(rest, objective, cap, monkeypatch):
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: 3)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 40)
    if rest == "drop" and objective == PER_TOKEN[4]:
        pytest.skip("KL(q‖r) is infinite: at α = 3 r is 0 wherever p is")
    if rest == "ghost":
        objective = with_teacher_untempered(objective)
    problem = SparseProblem(5, rest, padding=2)
    ours, truth = problem.sparse(objective, cap, 0.7).loss, problem.naive_sparse(objective, cap,
                                                                                0.7)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    for actual, expected in zip(problem.gradients(ours), problem.gradients(truth), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# --- the whole teacher at K = V -------------------------------------------------------------------

def whole(problem: SparseProblem, objective: AMiD, **options) -> tuple[LossOutput, list[Tensor]]:
    """The loss of the teacher's own logits, from a head without padding, and its gradients."""
    out = problem.fused(objective, 3.0, 0.7, statistics=STATISTICS, **options)
    return out, problem.gradients(out.loss)


@pytest.mark.parametrize("rest", ["ghost", "spread", "drop"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_with_every_id_it_is_the_teachers_own_loss(rest, dtype, within):
    objectives = EVERY_KIND + [AMiD(-5.0, 0.3, measure, order, {"student": 1.3, "teacher": 0.8})
                               for measure in EVERY_DIVERGENCE for order in ORDERS]
    problem = SparseProblem(41, rest, dtype=dtype)
    for objective in objectives:
        expected, truth = whole(problem, objective)
        out = problem.sparse(objective, 3.0, 0.7, statistics=STATISTICS)
        torch.testing.assert_close(out.loss, expected.loss, rtol=within, atol=within)
        torch.testing.assert_close(out.ce, expected.ce, rtol=within, atol=within)
        for name in STATISTICS:
            torch.testing.assert_close(out.statistics[name], expected.statistics[name],
                                       rtol=5 * within, atol=5 * within)
        for actual, gradient in zip(problem.gradients(out.loss), truth, strict=True):
            assert relative_error(actual, gradient) < 10 * within, objective


def test_a_row_that_keeps_every_id_has_no_rest_whatever_is_written_of_it():
    problem = SparseProblem(41)
    leaking = replace(problem.targets, log_rest=torch.full((11,), -12.0))
    for objective in (preset("fkl"), preset("rkl")):
        expected = problem.fused(objective).kd
        torch.testing.assert_close(problem.sparse(objective, targets=leaking).kd, expected)


def test_with_every_id_logits_far_below_0_have_the_gradient_that_their_shift_has():
    """exp(-log Σ exp) of them is beyond fp32; there is no rest that it would be a factor of."""
    problem = SparseProblem(41, dtype=torch.float32)
    out = problem.sparse(AMiD())
    expected = problem.gradients(out.loss)
    with torch.no_grad():
        problem.bias -= 128
    shifted = problem.sparse(AMiD())
    torch.testing.assert_close(shifted.loss, out.loss, rtol=1e-4, atol=0)
    for pair in zip(problem.gradients(shifted.loss), expected, strict=True):
        assert relative_error(*pair) < 1e-4


# --- the rest, and what is cut off ----------------------------------------------------------------

@pytest.mark.parametrize("cap", [None, 50.0])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_rest_of_hardly_any_mass_keeps_its_digits(cap, backend):
    """In fp32 1 - Σ q would be 0, and KL(q‖p) and its gradient with it."""
    student, teacher = ((25 * torch.randn(6, 50, generator=torch.Generator().manual_seed(seed))
                         ).clamp(-28, 28) for seed in (1, 2))
    student[:, :4] += 40
    student[:, 4:].clamp_(max=5)
    targets = topk_targets(teacher.double(), 4)
    targets = replace(targets, ids=torch.arange(4).expand(6, 4).contiguous())
    exact = student.double().requires_grad_()
    capped = exact if cap is None else cap * (exact / cap).tanh()
    objective = AMiD(-1.0, 1.0, order={"qr": 1.0, "pr": 0.0})
    truth = naive_sparse_loss(capped, targets, objective)
    expected, = torch.autograd.grad(truth.sum(), exact)
    hidden, weight = torch.eye(6), student.t().clone().requires_grad_()
    out = linear_amid_loss(hidden, LMHead(weight, softcap=cap), None, None, objective,
                           token_weights=torch.ones(6), targets=targets, backend=backend)
    actual, = torch.autograd.grad(out.loss, weight)
    torch.testing.assert_close(out.kd.double(), truth.detach(), rtol=2e-5, atol=0)
    # Row by row: some have 1e-9 in all.
    others = expected[:, 4:].norm(dim=1)
    assert 0 < others.min() < 1e-8
    assert ((actual.t() - expected)[:, 4:].norm(dim=1) < 1e-3 * others).all()


def test_ids_from_vocab_size_on_do_not_count():
    problem = SparseProblem(5)
    targets = problem.targets
    beyond = torch.full_like(targets.ids[:, :1], problem.vocab_size)
    wider = replace(targets, ids=torch.cat([beyond, targets.ids], 1), log_probabilities=torch.cat(
        [torch.full_like(targets.log_probabilities[:, :1], -0.1), targets.log_probabilities], 1))
    for rest in ("ghost", "spread", "drop"):
        pair = [problem.sparse(AMiD(-5.0, 0.3), targets=replace(x, rest=rest)).loss
                for x in (targets, wider)]
        assert torch.equal(*pair)


def test_ghost_is_a_lower_bound_of_forward_kl_that_rises_with_k():
    problem = SparseProblem(41)
    exact, last = problem.fused(preset("fkl")).kd, torch.zeros(11)
    logits = (problem.teacher @ problem.teacher_weight.t())[:, :41]
    for k in (1, 4, 16, 40, 41):
        kd = problem.sparse(preset("fkl"), targets=topk_targets(logits, k)).kd
        assert (kd >= last - 1e-12).all() and (kd <= exact + 1e-12).all()
        last = kd
    torch.testing.assert_close(last, exact)


def test_the_statistics_are_the_naive_twins():
    problem = SparseProblem(5, padding=2)
    objective = AMiD(-5.0, 0.3, temperature={"student": 1.7, "teacher": 1.0})
    for rest in ("ghost", "spread", "drop"):
        problem.targets = replace(problem.targets, rest=rest)
        out = problem.sparse(objective, statistics=STATISTICS)
        truth = naive_sparse_measures(problem.student_logits(), problem.targets, objective,
                                      problem.labels)
        counted = problem.weights > 0
        for name in STATISTICS:
            torch.testing.assert_close(out.statistics[name][counted], truth[name][counted])


def test_a_masked_token_contributes_exactly_nothing_whatever_it_holds():
    problem = SparseProblem(5)
    expected = problem.sparse(AMiD())
    gradients = problem.gradients(expected.loss)
    masked = problem.weights == 0
    for tensor, wrong in ((problem.targets.ids, -1), (problem.targets.log_probabilities, 3.0),
                          (problem.targets.log_rest, float("nan"))):
        tensor[masked] = wrong
    out = problem.sparse(AMiD())
    assert torch.equal(out.loss, expected.loss)
    assert all(torch.equal(*pair) for pair in zip(problem.gradients(out.loss), gradients,
                                                  strict=True))


def test_kd_weight_0_and_no_gradient_at_all():
    problem = SparseProblem(5)
    expected = problem.sparse(AMiD())
    with torch.no_grad():
        out = problem.sparse(AMiD())
        assert torch.equal(out.loss, expected.loss) and torch.equal(out.kd, expected.kd)
    out = problem.sparse(AMiD(), kd_weight=0.0)
    alone = linear_amid_loss(problem.student, LMHead(problem.weight, problem.bias), None, None,
                             None, token_weights=problem.weights, labels=problem.labels,
                             ce_weight=0.4, kd_weight=0.0, vocab_size=problem.vocab_size)
    torch.testing.assert_close(out.kd, expected.kd)
    torch.testing.assert_close(out.loss, alone.loss)
    for pair in zip(problem.gradients(out.loss), problem.gradients(alone.loss), strict=True):
        torch.testing.assert_close(*pair)


# --- Triton, low precision ------------------------------------------------------------------------

@pytest.mark.parametrize(("rest", "objective", "cap"), [
    ("ghost", OBJECTIVES[1], 3.0), ("ghost", PER_TOKEN[2], None), ("drop", OBJECTIVES[0], 3.0),
    ("spread", preset("rkl"), None)], ids=str)
def test_the_kernels_are_within_the_fp32_budget(rest, objective, cap):
    objective = with_teacher_untempered(objective)
    single = SparseProblem(5, rest, padding=2, dtype=torch.float32)
    exact = single.to(torch.float64)
    out, truth = (single.sparse(objective, cap, 0.7, backend="triton"),
                  exact.naive_sparse(objective, cap, 0.7))
    torch.testing.assert_close(out.loss.double(), truth, rtol=2e-4, atol=2e-6)
    for a, b in zip(single.gradients(out.loss), exact.gradients(truth), strict=True):
        assert relative_error(a, b) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rest", ["ghost", "spread", "drop"])
def test_low_precision_is_no_further_from_the_truth_than_the_naive_loss(dtype, rest):
    low = SparseProblem(9, rest, tokens=24, vocabulary=70, student=24, dtype=dtype)
    exact = low.to(torch.float64)
    objective = AMiD(-5.0, 0.1)
    truth, naive = exact.naive_sparse(objective), naive_from(low, objective)
    expected, naive_gradients = exact.gradients(truth), low.gradients(naive)
    for backend in ("torch", "triton") if rest == "ghost" else ("torch",):
        ours = low.sparse(objective, backend=backend).loss
        assert (ours - truth).abs() <= (naive - truth).abs() + 2**-9 * truth.abs()
        for a, b, c in zip(low.gradients(ours), naive_gradients, expected, strict=True):
            assert relative_error(a, c) <= relative_error(b, c) + 2**-8


def naive_from(problem: SparseProblem, objective: AMiD) -> Tensor:
    """The naive twin on the problem's own logits in low precision, then in fp32."""
    logits = problem.student_logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "student_logits", lambda *of: logits(*of).float(), raising=False)
        return problem.naive_sparse(objective)


# --- draws ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("exponent", [1.0, 0.7])
def test_over_many_draws_the_mean_is_the_whole_teachers_loss_and_gradient(exponent):
    """Within 5 standard errors in each of 11 values and 66 derivatives; top-k of as many ids,
    renormalised, is not."""
    tokens, repeats, draws = 11, 1500, 12
    problem, many = SparseProblem(draws, "drop"), SparseProblem(draws)
    logits = (problem.teacher @ problem.teacher_weight.t())[:, :problem.vocab_size]
    many.student = problem.student.detach().repeat(repeats, 1).requires_grad_()
    many.weights = torch.ones(tokens * repeats)
    problem.weights = torch.ones(tokens)
    options = {"labels": None, "ce_weight": 0.0, "kd_weight": 1.0}
    targets = sampled_targets(logits.repeat(repeats, 1), draws, torch.Generator().manual_seed(0),
                              exponent)
    out = many.sparse(preset("fkl"), targets=targets, **options)
    gradient, = torch.autograd.grad(out.loss, many.student)
    whole, dropped = (problem.fused(preset("fkl"), **options),
                      problem.sparse(preset("fkl"), **options))
    for of_draws, truth, biased in (
            (out.kd, whole.kd, dropped.kd),
            (gradient, *(torch.autograd.grad(x.loss, problem.student)[0]
                         for x in (whole, dropped)))):
        parts = of_draws.unflatten(0, (repeats, tokens))
        mean, error = parts.mean(0), parts.std(0) / repeats**0.5
        assert ((mean - truth).abs() <= 5 * error).all()
        # The bound says something.
        assert error.mean() < 0.05 * truth.abs().mean()
        assert ((biased - truth).abs() > 5 * error).float().mean() > 0.4


def test_a_samples_loss_and_gradients_are_the_naive_twins():
    problem = SparseProblem(5)
    logits = (problem.teacher @ problem.teacher_weight.t())[:, :problem.vocab_size]
    problem.targets = replace(sampled_targets(logits, 9, torch.Generator().manual_seed(3), 0.7),
                              label_log_probabilities=problem.targets.label_log_probabilities)
    weighted = AMiD(-1.0, 0.0, order="pr", temperature={"student": 1.7, "teacher": 1},
                    token_weight=PerToken("label_probability", (0.5, 2.0), (0.0, 0.3)))
    for objective, cap in ((preset("fkl"), None), (AMiD(3.0, 1.0, order="rq"), 3.0),
                           (AMiD(0.0, 0.0, AlphaBeta(1, 0), {"pr": 1.0}), None)):
        ours, truth = problem.sparse(objective, cap).loss, problem.naive_sparse(objective, cap)
        torch.testing.assert_close(ours, truth)
        for pair in zip(problem.gradients(ours), problem.gradients(truth), strict=True):
            torch.testing.assert_close(*pair)
    out = problem.sparse(weighted, statistics=("teacher_entropy", "divergence"))
    p = problem.targets.label_log_probabilities.exp().where(problem.labels >= 0, 0)
    factor = 0.5 + 1.5 * (p / 0.3).clamp(max=1)
    loss = (problem.weights * factor * (0.9 * out.kd + 0.4 * out.ce)).sum()
    torch.testing.assert_close(out.loss.detach(), loss)
    torch.testing.assert_close(out.statistics["divergence"], out.kd)


# --- what is refused ------------------------------------------------------------------------------

def test_what_is_not_linear_in_p_is_refused_for_a_sample():
    problem = SparseProblem(5)
    logits = (problem.teacher @ problem.teacher_weight.t())[:, :problem.vocab_size]
    problem.targets = sampled_targets(logits, 9, torch.Generator().manual_seed(3))
    for objective in (AMiD(-1.0, 0.1), preset("rkl"), AMiD(-1.0, 0.0, "total_variation"),
                      AMiD(-1.0, 0.0, order={"pr": 0.5, "rp": 0.5}), AMiD(-1.0, 0.0, power=2.0),
                      AMiD(-1.0, PerToken("label_probability")), preset("gkd"),
                      AMiD(-1.0, 0.0, detach_assistant=True)):
        with pytest.raises(InputError, match=r"forward KL.*\n.*topk"):
            problem.sparse(objective)
    for name in ("overlap", "student_entropy", "agreement"):
        with pytest.raises(InputError, match=f"{name} with sampled"):
            problem.sparse(preset("fkl"), statistics=[name])
    with pytest.raises(InputError, match="a number per token by teacher_entropy"):
        problem.sparse(AMiD(-1.0, 0.0, token_weight=PerToken("teacher_entropy")))
    with pytest.raises(InputError, match="temperature of 2 with sampled"):
        problem.sparse(preset("fkl", temperature=2.0))


def test_a_teachers_temperature_is_refused_where_the_kept_values_do_not_have_it():
    problem = SparseProblem(40)
    with pytest.raises(InputError, match="tempered sum of p"):
        problem.sparse(AMiD(temperature=2.0))
    problem.sparse(AMiD(temperature={"student": 2.0, "teacher": 1.0}))
    for rest in ("spread", "drop"):
        problem.sparse(AMiD(temperature=2.0), targets=replace(problem.targets, rest=rest))
    whole = SparseProblem(41)
    whole.sparse(AMiD(temperature=2.0))
    whole.targets.ids[1, 40] = -1
    with pytest.raises(InputError, match="row 1 has not every id, and the teacher a temperature"):
        whole.sparse(AMiD(temperature=2.0))


def test_drop_is_refused_where_it_would_be_infinite_at_every_token():
    problem = SparseProblem(40, "drop")
    for objective in (preset("rkl"), AMiD(1.0, 0.5, order="qr"), AMiD(3.0, 0.1, order="qr")):
        with pytest.raises(InputError, match="every token's loss would be infinite"):
            problem.sparse(objective)
        assert problem.sparse(objective, targets=replace(problem.targets, rest="ghost")
                              ).loss.isfinite()
    assert problem.sparse(preset("gkd")).loss.isfinite()


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: replace(t, ids=t.ids.index_fill(1, torch.tensor([1]), 3).index_fill(
        1, torch.tensor([2]), 3)), "an id twice"),
    (lambda t: replace(t, ids=t.ids - 43), "an id below -1"),
    (lambda t: replace(t, log_probabilities=t.log_probabilities * torch.nan), "log_probabilities"),
    (lambda t: replace(t, log_probabilities=t.log_probabilities.abs()), "log_probabilities"),
    (lambda t: replace(t, weights=-t.log_probabilities.exp(), log_rest=None, rest="drop"),
     "weights that are none"),
    (lambda t: replace(t, log_rest=t.log_rest * torch.nan), "log_rest"),
    (lambda t: replace(t, ids=t.ids + 99, rest="drop"), "no id"),
    (lambda t: t.take(slice(0, 3)), "targets of 3 tokens"),
    (lambda t: replace(t, label_log_probabilities=None), "label_probability")])
def test_wrong_targets_are_refused_by_name(change, message):
    problem = SparseProblem(5)
    problem.targets = change(problem.targets)
    with pytest.raises(InputError, match=message):
        problem.sparse(preset("fkl"), statistics=["label_probability"])


def test_wrong_shapes_and_combinations_are_refused():
    problem = SparseProblem(5)
    ids, log_p, log_rest = (problem.targets.ids, problem.targets.log_probabilities,
                            problem.targets.log_rest)
    for arguments, message in (
            ((ids.int(), log_p, log_rest), "ids"), ((ids[:, :0], log_p[:, :0], log_rest), "K abov"),
            ((ids, log_p[:, 1:], log_rest), "log_prob"), ((ids, log_p, log_rest[1:]), "log_rest"),
            ((ids, log_p), "without log_rest"),
            ((ids, log_p, None, log_p.exp(), None, "ghost"), "sampled weights"),
            ((ids, log_p, log_rest, None, None, "other"), "rest='other'")):
        with pytest.raises(InputError, match=message):
            SparseTargets(*arguments)
    with pytest.raises(InputError, match="beside teacher_hidden"):
        problem.fused(AMiD(), targets=problem.targets)
    with pytest.raises(InputError, match="samples"):
        problem.sparse(preset("sampled_rkl"))
    with pytest.raises(InputError, match="of 2 kinds"):
        SparseTargets.concatenate([problem.targets, replace(problem.targets, rest="drop")])


def test_rows_are_taken_and_joined():
    problem = SparseProblem(5)
    logits = (problem.teacher @ problem.teacher_weight.t())[:, :problem.vocab_size]
    narrow = replace(topk_targets(logits, 3, labels=problem.labels)).take(slice(0, 4))
    joined = SparseTargets.concatenate([narrow, problem.targets.take(torch.arange(4, 11))])
    assert joined.ids.shape == (11, 5) and (joined.ids[:4, 3:] == -1).all() and len(joined) == 11
    expected = torch.cat([problem.sparse(AMiD(), targets=topk_targets(logits, 3)).kd[:4],
                          problem.sparse(AMiD()).kd[4:]])
    torch.testing.assert_close(problem.sparse(AMiD(), targets=joined).kd, expected)
    assert joined.take(torch.arange(11) > 8).to("cpu").ids.equal(problem.targets.ids[9:])
