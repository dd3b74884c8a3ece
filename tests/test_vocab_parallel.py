"""The loss over a vocabulary cut across ranks: equal to one process's, in few collectives.

On real processes joined by gloo, started once for the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.losses import PER_TOKEN, LossProblem
from support.ranks import RankPool
from support.sparse import SparseProblem, sampled_targets, with_teacher_untempered

from amid_ds import AlphaBeta, AMiD, LMHead, VocabShard, amid_loss, linear_amid_loss, preset
from amid_ds.errors import InputError
from amid_ds.losses import fused, tiles
from amid_ds.losses.measures import STATISTICS

OBJECTIVES = [AMiD(-5.0, 0.1), AMiD(0.5, 0.3, AlphaBeta(0.2, 0.7), {"pr": 0.5, "qr": 0.5}, 2.0),
              AMiD(3.0, 0.7, "total_variation", "rq"),
              AMiD(-1.0, 0.5, order={"rp": 0.5, "qr": 0.5}),
              AMiD(1.0, 0.0, "squared_hellinger")]
VOCABULARY = 41
SPLITS = {"even": [0, 21, 42], "uneven": [0, 5, 42], "three": [0, 30, 31, 42],
          "an empty shard": [0, 20, 20, 42],
          "four, the last one padding": [0, 1, 17, 41, 42]}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    ranks = RankPool()
    yield ranks
    ranks.close()


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the collectives that are called."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist):
            if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "barrier",
                                "send", "recv")):
                real = getattr(dist, name)

                def call(*arguments: Any, real: Any = real, name: str = name,
                         **keywords: Any) -> Any:
                    calls.append(name)
                    return real(*arguments, **keywords)
                patch.setattr(dist, name, call)
        yield calls


def sharded(rank: int, group: Any, cuts: list[int], objective: AMiD, block: int, tile: int,
            cap: float | None) -> Any:
    """The linear and the logit loss on this rank's shard: loss, per-token values, gradients."""
    start, stop = cuts[rank], cuts[rank + 1]
    problem, shard = LossProblem(vocabulary=VOCABULARY, padding=1), VocabShard(start, stop, group)
    weight, bias = (x.detach()[start:stop].clone().requires_grad_()
                    for x in (problem.weight, problem.bias))
    hidden = problem.student
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_tokens_per_block", lambda *_: block)
        patch.setitem(tiles.TILE_ELEMENTS, "cpu", tile)
        out = linear_amid_loss(hidden, LMHead(weight, bias, cap, 0.8), problem.teacher,
                               problem.teacher_weight[start:stop], objective,
                               token_weights=problem.weights, labels=problem.labels, ce_weight=0.4,
                               vocab_size=VOCABULARY, shard=shard)
        gradients = torch.autograd.grad(out.loss, [hidden, weight, bias])
        student = (hidden @ weight.t()).detach().requires_grad_()
        per_token = amid_loss(student, problem.teacher @ problem.teacher_weight[start:stop].t(),
                              objective, vocab_size=VOCABULARY, shard=shard)
        columns, = torch.autograd.grad((per_token * problem.weights).sum(), student)
    return [x.detach().clone() for x in (out.loss, out.kd, out.ce, *gradients, per_token, columns)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_gives_what_one_process_gives(ranks, objective, split):
    cuts = SPLITS[split]
    cap = 3.0 if split == "three" else None
    whole = sharded(0, None, [0, cuts[-1]], objective, 100, 10_000, cap)
    loss, kd, ce, hidden, weight, bias, per_token, columns = whole
    results = ranks.run(len(cuts) - 1, sharded, cuts, objective, 4, 50, cap)
    for actual, start, stop in zip(results, cuts, cuts[1:], strict=False):
        expected = [loss, kd, ce, hidden, weight[start:stop], bias[start:stop], per_token,
                    columns[:, start:stop]]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # Not only close: the same bits on every rank.
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result[:4], results[0][:4], strict=True))


def collectives(rank: int, group: Any, objective: AMiD, teacher: bool,
                masked: bool) -> tuple[list[str], list[str]]:
    """The collectives of forward and of backward with 3 blocks, after the shard's first check."""
    cuts = [0, 5, 42]
    start, stop = cuts[rank], cuts[rank + 1]
    problem, shard = LossProblem(tokens=12, vocabulary=VOCABULARY,
                                 padding=1), VocabShard(start, stop, group)
    problem.weights[:] = 0 if masked else 1

    def loss() -> torch.Tensor:
        side = (problem.teacher, problem.teacher_weight[start:stop]) if teacher else (None, None)
        return linear_amid_loss(problem.student, problem.weight[start:stop], *side, objective,
                                shard=shard, token_weights=problem.weights, labels=problem.labels,
                                ce_weight=0.4, kd_weight=1.0 if teacher else 0.0).loss

    with pytest.MonkeyPatch.context() as patch, counted() as calls:
        patch.setattr(fused, "_tokens_per_block", lambda *_: 4)
        loss()
        checks = calls[:1]
        calls.clear()
        value = loss()
        forward = list(calls)
        value.backward()
    assert checks == ["all_gather"]
    return forward, calls[len(forward):]


@pytest.mark.parametrize(("objective", "teacher", "per_block"), [
    (AMiD(-5.0, 0.1, "total_variation"), True, 3), (AMiD(-5.0, 0.1), True, 2),
    (AMiD(-1.0, 0.5), True, 2),
    (AMiD(2.0, 0.0, "squared_hellinger"), True, 2), (None, False, 1)],
                         ids=["any α", "KL, any α", "α -1", "λ 0", "cross entropy alone"])
def test_at_most_three_collectives_per_block_and_one_in_backward(ranks, objective, teacher,
                                                                 per_block):
    for forward, backward in ranks.run(2, collectives, objective, teacher, False):
        assert forward == ["all_gather"] * 3 * per_block
        assert backward == ["all_reduce"]


def test_a_batch_without_valid_tokens_still_makes_backwards_collective_on_every_rank(ranks):
    assert ranks.run(2, collectives, AMiD(), True, True) == [([], ["all_reduce"])] * 2


def refused(rank: int, group: Any, cuts: list[tuple[int, int]], rows: list[int],
            changes: list[dict]) -> str:
    start, stop = cuts[rank]
    tokens = changes[rank].get("tokens", 3)
    try:
        linear_amid_loss(torch.ones(tokens, 2), torch.ones(rows[rank], 2), torch.ones(tokens, 2),
                         torch.ones(changes[rank].get("teacher", rows[rank]), 2), AMiD(),
                         token_weights=torch.ones(tokens), shard=VocabShard(start, stop, group),
                         vocab_size=changes[rank].get("vocab_size"))
    except InputError as error:
        assert error.expected and error.remedy
        return error.found
    return "not refused"


@pytest.mark.parametrize(("cuts", "rows", "changes", "message"), [
    # A gap.
    ([(0, 5), (6, 10)], [5, 4], [{}, {}], "shards"),
    # An overlap.
    ([(0, 5), (4, 10)], [5, 6], [{}, {}], "shards"),
    # Not from 0.
    ([(1, 5), (5, 10)], [4, 5], [{}, {}], "shards"),
    # The same twice.
    ([(0, 5), (0, 5)], [5, 5], [{}, {}], "shards"),
    # Not to the end.
    ([(0, 5), (5, 10)], [5, 5], [{"vocab_size": 11}, {"vocab_size": 11}], "shards"),
    # Wrong rows on rank 1.
    ([(0, 5), (5, 10)], [5, 4], [{}, {}], "student_head"),
    ([(0, 5), (5, 10)], [5, 5], [{}, {"teacher": 6}], "teacher_head"),
    ([(0, 5), (5, 10)], [5, 5], [{"vocab_size": 9}, {}], "vocab_size"),
    ([(0, 5), (5, 10)], [5, 5], [{"tokens": 4}, {}], "number of tokens"),
])
def test_shards_that_do_not_fit_are_refused_on_every_rank_at_the_first_call(ranks, cuts, rows,
                                                                            changes, message):
    answers = ranks.run(2, refused, cuts, rows, changes)
    assert all(message in answer for answer in answers), answers


def mixed(rank: int, group: Any) -> list[torch.Tensor]:
    """bf16 heads on two ranks: the hidden states' gradient."""
    cuts = [0, 21, 41]
    problem = LossProblem(vocabulary=41, dtype=torch.bfloat16)
    start, stop = (cuts[rank], cuts[rank + 1]) if group is not None else (0, 41)
    out = linear_amid_loss(problem.student, problem.weight[start:stop], problem.teacher,
                           problem.teacher_weight[start:stop], AMiD(-5.0, 0.1),
                           token_weights=problem.weights, shard=VocabShard(start, stop, group))
    return [out.loss.detach(), *torch.autograd.grad(out.loss, [problem.student])]


def test_low_precision_gradients_are_added_up_before_they_are_rounded(ranks):
    loss, hidden = mixed(0, None)
    for actual in ranks.run(2, mixed):
        torch.testing.assert_close(actual[0], loss)
        assert actual[1].dtype == torch.bfloat16
        torch.testing.assert_close(actual[1], hidden, rtol=2**-6, atol=1e-3)


def test_a_shard_without_a_group_is_one_process():
    problem = LossProblem()
    whole = linear_amid_loss(problem.student, problem.weight[:41], problem.teacher,
                             problem.teacher_weight[:41], AMiD(), token_weights=problem.weights)
    shard = linear_amid_loss(problem.student, problem.weight[:41], problem.teacher,
                             problem.teacher_weight[:41], AMiD(), token_weights=problem.weights,
                             shard=VocabShard(0, 41))
    assert torch.equal(whole.loss, shard.loss)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3)])
def test_a_shard_that_is_no_range_is_refused(start, stop):
    with pytest.raises(InputError, match=f"start={start}"):
        VocabShard(start, stop)


def test_a_shard_that_does_not_begin_at_row_0_is_refused_where_it_is_alone():
    with pytest.raises(InputError, match="shards"):
        amid_loss(torch.zeros(2, 5), torch.zeros(2, 5), AMiD(), shard=VocabShard(5, 10))


# --- sparse targets -------------------------------------------------------------------------------

OF_TARGETS = [("ghost", with_teacher_untempered(OBJECTIVES[1])), ("drop", OBJECTIVES[0]),
              ("ghost", PER_TOKEN[4]), ("spread", PER_TOKEN[2]), ("sample", preset("fkl"))]


def on_targets(rank: int, group: Any, cuts: list[int], rest: str, objective: AMiD) -> Any:
    """(loss, per-token values, statistics and gradients; the collectives of a second call and its
    backward) of this rank's shard, in three blocks."""
    problem = SparseProblem(5, "drop" if rest == "sample" else rest, tokens=12, padding=2,
                            vocabulary=VOCABULARY)
    problem.weights[:] = 0.5
    statistics: tuple[str, ...] = STATISTICS
    if rest == "sample":
        logits = (problem.teacher @ problem.teacher_weight.t())[:, :VOCABULARY]
        problem.targets = sampled_targets(logits, 9, torch.Generator().manual_seed(3))
        statistics = ("divergence",)
    problem.weight, problem.bias = (x.detach()[cuts[rank]:cuts[rank + 1]].clone().requires_grad_()
                                    for x in (problem.weight, problem.bias))
    run = partial(problem.sparse, objective, 3.0, 0.7,
                  shard=VocabShard(cuts[rank], cuts[rank + 1], group), checked=True)
    with pytest.MonkeyPatch.context() as patch, counted() as calls:
        patch.setattr(fused, "_tokens_per_block", lambda *_: 4)
        patch.setitem(tiles.TILE_ELEMENTS, "cpu", 50)
        out = run(statistics=statistics)
        calls.clear()
        gradients = problem.gradients(run().loss)
    parts = (out.loss, out.kd, out.ce, *out.statistics.values(), *gradients)
    return [x.detach().clone() for x in parts if x is not None], list(calls)


@pytest.mark.parametrize(("rest", "objective"), OF_TARGETS, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_on_sparse_targets_every_split_gives_what_one_process_gives(ranks, rest, objective, split):
    cuts = SPLITS[split]
    whole, _ = on_targets(0, None, [0, 42], rest, objective)
    results = [parts for parts, _ in ranks.run(len(cuts) - 1, on_targets, cuts, rest, objective)]
    for actual, start, stop in zip(results, cuts, cuts[1:], strict=False):
        for a, b in zip(actual, [*whole[:-2], *(x[start:stop] for x in whole[-2:])], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # Not only close: the same bits on every rank.
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result[:-2], results[0][:-2], strict=True))


@pytest.mark.parametrize(("case", "per_block"), [(0, 1), (1, 1), (2, 2), (4, 1)])
def test_sparse_targets_take_one_collective_a_block_whatever_the_objective(ranks, case, per_block):
    """Two where whole sequences are measured first."""
    for _, calls in ranks.run(2, on_targets, [0, 5, 42], *OF_TARGETS[case]):
        assert calls == ["all_gather"] * 3 * per_block + ["all_reduce"]
