"""Measures of tokens: as statistics, as token weights, over whole sequences; what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from support.losses import PER_TOKEN, LossProblem, random_logits
from torch import Tensor

from amid_ds import AlphaBeta, AMiD, LMHead, PerToken, amid_loss, linear_amid_loss
from amid_ds.errors import InputError
from amid_ds.losses import elementwise, fused
from amid_ds.losses.measures import (
    MEASURES,
    STATISTICS,
    first_choices,
    in_top_share,
    sequence_means,
)
from amid_ds.losses.reference import naive_loss, naive_measures

INF, NAN = math.inf, math.nan
SLOPE = PerToken("teacher_entropy", (0.1, 0.5), (0.0, 4.0))

# --- token weights and sequences ------------------------------------------------------------------

def test_a_token_weight_multiplies_divergence_and_cross_entropy_and_is_in_neither():
    problem, by = LossProblem(), PerToken("teacher_entropy", (0.5, 2.0), (1.0, 3.0))
    plain = problem.fused(AMiD(-5.0, 0.1), statistics=["teacher_entropy"])
    out = problem.fused(AMiD(-5.0, 0.1, token_weight=by))
    torch.testing.assert_close(out.kd, plain.kd)
    torch.testing.assert_close(out.ce, plain.ce)
    weights = problem.weights * by.values(plain.statistics["teacher_entropy"])
    torch.testing.assert_close(out.loss.detach(), (weights * (0.9 * out.kd + 0.4 * out.ce)).sum())


def test_the_top_share_of_a_sequence_is_rounded_up_and_the_earlier_of_equals_is_taken():
    measure = torch.tensor([1.0, 5.0, 5.0, 5.0, 2.0, 7.0, 0.0, 0.0])
    sequences = torch.tensor([4, 4, 4, 4, 4, 1, 1, -3])
    every = torch.ones(8, dtype=torch.bool)

    def chosen(share: float, counts: Tensor = every) -> list[int]:
        return in_top_share(measure, sequences, counts, share).nonzero()[:, 0].tolist()

    assert chosen(0.4) == [1, 2, 5, 7] and chosen(0.41) == [1, 2, 3, 5, 7]
    assert chosen(1.0) == list(range(8)) and chosen(1e-6) == [1, 5, 7]
    # A token that does not count takes nobody's place, and is not chosen.
    assert chosen(0.4, torch.tensor([True, False, True, True, True, False, True, False])) \
        == [2, 3, 6]
    # 0.07 · 100 is 7.000000000000001 in floating point.
    assert in_top_share(torch.rand(100), torch.zeros(100, dtype=torch.long),
                        torch.ones(100, dtype=torch.bool), 0.07).sum() == 7
    measure[3] = NAN
    assert in_top_share(measure, sequences, every, 0.4)[3].isnan()


def test_the_first_choice_is_the_lowest_of_equal_ids_across_shards_too():
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, 3.0], [0.0, 1.0, 2.0, 2.0, 0.0],
                           [0.0, 1.0, 2.0, NAN, 4.0]])
    gathered: list[Tensor] = []

    def gather(local: Tensor) -> Tensor:
        gathered.append(local)
        return torch.stack(gathered)

    for start, stop in ((0, 1), (1, 3), (3, 3), (3, 5)):
        shard = SimpleNamespace(start=start, gather=gather)
        ids, peaks = first_choices([logits[:, start:stop]], shard)
    assert ids.tolist() == [[1, 2, 3]] and peaks[0, :2].tolist() == [3, 2] and peaks[0, 2].isnan()


def test_means_are_of_the_tokens_that_count_and_of_no_other_sequence():
    measure = torch.tensor([1.0, 3.0, 100.0, 4.0, INF, NAN])
    sequences = torch.tensor([2, 2, 2, 0, 9, 8])
    means = sequence_means(measure, sequences, torch.tensor([True, True, False, True, True, True]))
    assert means[:5].tolist() == [2.0, 2.0, 2.0, 4.0, INF] and means[5].isnan()


def test_sequences_may_lie_mixed_and_be_cut_by_blocks(monkeypatch):
    problem, objective = LossProblem(tokens=30), PER_TOKEN[4]
    problem.sequences = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(1))
    truth = problem.naive(objective)
    for block in (1, 7, 100):
        monkeypatch.setattr(fused, "_tokens_per_block", lambda *_, size=block: size)
        torch.testing.assert_close(problem.fused(objective).loss, truth, rtol=1e-10, atol=1e-12)


def test_a_masked_token_has_no_part_in_its_sequence_and_no_statistics():
    problem, other = LossProblem(), LossProblem()
    masked = problem.weights == 0
    with torch.no_grad():
        other.student[masked], other.teacher[masked] = NAN, INF
    ours, theirs = (each.fused(PER_TOKEN[4], statistics=STATISTICS) for each in (problem, other))
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(ours.statistics[name], theirs.statistics[name]) for name in STATISTICS)
    assert all((of[masked] == 0).all() for of in ours.statistics.values())
    for actual, expected in zip(other.gradients(theirs.loss), problem.gradients(ours.loss),
                                strict=True):
        assert torch.equal(actual, expected)


def test_a_token_that_is_not_chosen_has_no_part_though_its_divergence_be_infinite():
    problem = LossProblem()
    objective = AMiD(lam=0.0, token_weight=PerToken("overlap", (1.0, 0.0), (-1.0, 0.0)))
    head = LMHead(problem.weight, problem.bias.detach().index_fill(0, torch.tensor([3]), -INF))
    out = linear_amid_loss(problem.student, head, problem.teacher, problem.teacher_weight,
                           objective, token_weights=problem.weights, vocab_size=41)
    assert out.kd[problem.weights > 0].isinf().all() and out.loss == 0


def test_without_a_valid_token_the_loss_is_zero_and_no_token_is_none():
    problem = LossProblem()
    problem.weights[:] = 0
    out = problem.fused(PER_TOKEN[4], statistics=STATISTICS)
    assert out.loss == 0 and all((of == 0).all() for of in out.statistics.values())
    assert all((g == 0).all() for g in problem.gradients(out.loss))
    for name in ("student", "teacher", "weights", "labels", "sequences"):
        setattr(problem, name, getattr(problem, name)[:0].detach())
    problem.student.requires_grad_()
    assert problem.fused(PER_TOKEN[4], statistics=STATISTICS).statistics["overlap"].shape == (0,)
    assert amid_loss(torch.zeros(0, 5), torch.zeros(0, 5), PER_TOKEN[0]).shape == (0,)


# --- statistics -----------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, {"student": 2.0, "teacher": 0.5}])
def test_statistics_are_their_formulas_of_the_tempered_models(temperature, monkeypatch):
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: 4)
    problem, objective = LossProblem(), AMiD(-5.0, 0.1, temperature=temperature)
    out = problem.fused(objective, statistics=STATISTICS)
    student = (problem.student @ problem.weight.t() + problem.bias)[:, :41]
    teacher = (problem.teacher @ problem.teacher_weight.t())[:, :41]
    truth = naive_measures(student / objective.student_temperature,
                           teacher / objective.teacher_temperature, problem.labels)
    counts = problem.weights > 0
    assert list(out.statistics) == list(STATISTICS)
    for name, measured in out.statistics.items():
        torch.testing.assert_close(measured, truth[name] * counts, rtol=1e-10, atol=1e-12)
        assert not measured.requires_grad
    torch.testing.assert_close(problem.fused(objective).loss, out.loss, rtol=0, atol=0)


def test_what_the_objective_and_the_statistics_both_name_is_measured_once(monkeypatch):
    asked, real = [], elementwise.measures

    def measures(block, norms, names):
        asked.append(names)
        return real(block, norms, names)

    monkeypatch.setattr(elementwise, "measures", measures)
    LossProblem().fused(PER_TOKEN[0], statistics=["overlap", "teacher_entropy"])
    assert asked == [("teacher_entropy", "overlap")]


def test_models_agree_on_the_lowest_of_equal_ids_and_not_where_one_has_nan():
    student = torch.tensor([[1.0, 3.0, 3.0], [5.0, 5.0, 1.0], [NAN, 0.0, 1.0], [0.0, 1.0, 2.0]])
    teacher = torch.tensor([[0.0, 9.0, 9.0], [1.0, 2.0, 2.0], [0.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    out = linear_amid_loss(student, torch.eye(3), teacher, torch.eye(3), AMiD(),
                           token_weights=torch.ones(4), statistics=["agreement"])
    agreement = out.statistics["agreement"]
    assert agreement[[0, 1, 3]].tolist() == [1, 0, 1] and agreement[2].isnan()


def test_an_id_without_probability_adds_no_entropy_and_an_infinite_divergence_is_beyond_at():
    problem = LossProblem()
    banned = problem.bias.detach().index_fill(0, torch.tensor([3, 7]), -INF)
    heads = (LMHead(problem.weight[:41], banned[:41]),
             LMHead(problem.teacher_weight[:41], banned[:41].index_fill(0, torch.tensor([3]), 0)))
    out = linear_amid_loss(problem.student, heads[0], problem.teacher, heads[1], AMiD(),
                           token_weights=torch.ones(11), statistics=MEASURES[:3])
    student, teacher = (hidden @ head.weight.t() + head.bias for hidden, head in
                        zip((problem.student, problem.teacher), heads, strict=True))
    truth = naive_measures(student, teacher)
    assert truth["divergence"].isinf().all() and truth["student_entropy"].isfinite().all()
    for name, measured in out.statistics.items():
        torch.testing.assert_close(measured, truth[name], rtol=1e-9, atol=1e-12)
    beyond = AMiD(1.0, PerToken("divergence", (0.2, 0.9), (0.0, 100.0)), order="qr")
    torch.testing.assert_close(amid_loss(student, teacher, beyond),
                               naive_loss(student, teacher, AMiD(1.0, 0.9, order="qr")))


def test_nan_stays_nan_at_its_token_alone():
    student, teacher = random_logits()
    for objective in (PER_TOKEN[0], PER_TOKEN[1], PER_TOKEN[2],
                      AMiD(token_weight=PerToken("teacher_entropy", (0.0, 0.0)))):
        for side in (0, 1):
            broken = [student.detach().clone(), teacher.clone()]
            broken[side][2, 4] = NAN
            where = amid_loss(*broken, objective).isnan().nonzero()
            assert where.tolist() == [[2]]


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "message"), [
    (lambda: PerToken("entropy"), "'entropy'"),
    (lambda: PerToken("overlap", (0.1,)), r"linear=\(0.1,\)"),
    (lambda: PerToken("overlap", 0.3), "linear=0.3"),
    (lambda: PerToken("overlap", (0.1, NAN)), "linear=nan"),
    (lambda: PerToken("overlap", at=(1.0, 1.0)), r"at=\[1.0, 1.0\]"),
    (lambda: PerToken("overlap", at=(1.0, INF)), "at=inf"),
    (lambda: PerToken("overlap", over="row"), "'row'"),
    (lambda: PerToken("overlap", top=0.0), "top=0.0"),
    (lambda: PerToken("overlap", top=1.1), "top=1.1"),
    (lambda: PerToken("overlap", (0.0, 2.0), top=0.5), "top=0.5 beside"),
    (lambda: AMiD(lam=PerToken("overlap", (0.5, 1.1))), "lam="),
    (lambda: AMiD(lam=PerToken("overlap", top=0.5)), "top"),
    (lambda: AMiD(alpha=PerToken("overlap", top=0.5)), "top"),
    (lambda: AMiD(order={"pr": PerToken("overlap", (-0.5, 1.0))}), "order"),
    (lambda: AMiD(order={"pr": PerToken("overlap", (0.0, 0.0))}), "order"),
    (lambda: AMiD(token_weight=0.5), "token_weight=0.5"),
    (lambda: AMiD(token_weight=PerToken("overlap", (-1.0, 0.0))), "token_weight"),
    (lambda: AMiD(power=0.0), "power=0.0"),
    (lambda: AMiD(temperature={"student": 1.0}), "temperature="),
    (lambda: AMiD(temperature={"student": 1.0, "teacher": 0.0}), "temperature="),
    (lambda: AMiD(temperature={"student": 1.0, "teacher": 1.0, "both": 1.0}), "temperature="),
    (lambda: amid_loss(*random_logits(), AMiD(lam=PerToken("label_probability"))), "labels"),
    (lambda: amid_loss(*random_logits(), PER_TOKEN[4]), "sequences"),
    (lambda: LossProblem().fused(PER_TOKEN[0], statistics=["entropy"]), "'entropy'"),
    (lambda: LossProblem().fused(PER_TOKEN[3], labels=None, ce_weight=0.0), "without labels"),
    (lambda: LossProblem().fused(AMiD(), sequences=torch.zeros(3)), r"sequences \[3\]"),
    (lambda: LossProblem().fused(AMiD(), sequences=torch.zeros(11)), "float32"),
    (lambda: linear_amid_loss(*random_logits(6, 6), None, None, None, token_weights=torch.ones(6),
                              labels=torch.zeros(6, dtype=torch.long), ce_weight=1.0, kd_weight=0.0,
                              statistics=["overlap"]), "without a teacher"),
])
def test_a_bad_value_is_refused_with_what_was_found_and_what_to_do(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert error.value.expected and error.value.remedy


def test_sequences_are_asked_for_where_the_objective_reads_them():
    problem = LossProblem()
    with pytest.raises(InputError, match="whole sequences"):
        linear_amid_loss(problem.student, problem.weight, problem.teacher, problem.teacher_weight,
                         PER_TOKEN[4], token_weights=problem.weights, vocab_size=41)


def test_an_objective_of_numbers_per_token_is_a_value():
    objective = AMiD(SLOPE, SLOPE, token_weight=PerToken("overlap", [0, 1], at=[0, 1]))
    assert objective == AMiD(SLOPE, SLOPE, token_weight=PerToken("overlap"))
    assert objective.per_token == (SLOPE, PerToken("overlap"))
    assert objective.measures == ("teacher_entropy", "overlap") and not objective.needs_sequences
    assert hash(SLOPE) == hash(PerToken("teacher_entropy", (0.1, 0.5), (0.0, 4.0)))
    assert AMiD(divergence=AlphaBeta(0.2, 0.7)).per_token == ()
