"""Compiled tiles of large blocks: the same numbers, for any objective and size."""

from __future__ import annotations

import functools
import itertools
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.losses import EVERY_DIVERGENCE, OBJECTIVES, PER_TOKEN, LossProblem, relative_error
from torch import Tensor

from amid_ds import AlphaBeta, AMiD
from amid_ds.losses import blocks, elementwise, fused, tiles
from amid_ds.losses.divergences import Divergence, LogProbs, Terms

WHOLE_FAMILY = [AMiD(alpha, lam, measure, order, 1.5, detach)
                for measure in EVERY_DIVERGENCE for order in ("pr", "rq", {"qr": 0.5, "rp": 0.5})
                for alpha, lam, detach in ((-5.0, 0.1, False), (1.0, 0.4, True), (1.5, 0.3, False),
                                           (3.0, 0.0, False))
                if not (measure == "total_variation" and lam == 0)]


@pytest.fixture(autouse=True)
def compile_all(monkeypatch):
    """Compile blocks of every size; a failed compilation fails the test."""
    monkeypatch.setattr(tiles, "WORTH_COMPILING", 0)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 200)
    monkeypatch.setattr(fused, "_tokens_per_block",
                        lambda tokens, *_: blocks.equal_blocks(tokens, 16))
    monkeypatch.setattr(tiles, "_say_once", pytest.fail)
    tiles._compiled.cache_clear()
    torch._dynamo.reset()


def matches_the_naive_twin(objective: AMiD, dtype: torch.dtype = torch.float64,
                           softcap: float | None = None) -> None:
    problem = LossProblem(dtype=torch.float64)
    truth = problem.naive(objective, softcap)
    mine = problem.to(dtype)
    ours = mine.fused(objective, softcap).loss
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    pairs = zip([ours, *mine.gradients(ours)], [truth, *problem.gradients(truth)], strict=True)
    assert max(relative_error(actual.detach(), expected.detach())
               for actual, expected in pairs) < tolerance


def test_compiled_tiles_match_the_naive_twin():
    matches_the_naive_twin(OBJECTIVES[0])


def test_compiled_tiles_keep_the_error_budget_in_fp32_under_a_soft_cap():
    matches_the_naive_twin(AMiD(0.5, 0.3, order={"pr": 0.5, "qr": 0.5}), torch.float32, softcap=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [*WHOLE_FAMILY, OBJECTIVES[1], *PER_TOKEN], ids=str)
def test_the_whole_family_compiled_matches_the_naive_twin(objective):
    matches_the_naive_twin(objective)


def test_numbers_that_change_from_step_to_step_and_other_sizes_compile_nothing_anew():
    for number in range(12):
        # The second call may compile again: it sees what varies.
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            problem = LossProblem(40 + number, 61 + 3 * number, dtype=torch.float32)
            out = problem.fused(AMiD(-5.0 + number / 10, 0.1 + number / 50,
                                     AlphaBeta(0.2 + number / 31, 0.7),
                                     temperature=1.5 + number / 10))
            problem.gradients(out.loss)


@pytest.mark.slow
def test_there_is_no_limit_to_the_objectives_of_a_process(monkeypatch):
    monkeypatch.setattr(tiles, "_compiled",
                        functools.cache(functools.partial(_traced, tiles._compiled.__wrapped__)))
    shapes = itertools.product((-5.0, 0.5, 1.0), ("pr", "rq", {"qr": 0.5, "rp": 0.5}),
                               (False, True))
    for alpha, order, detach in shapes:
        matches_the_naive_twin(AMiD(alpha, 0.3, order=order, detach_assistant=detach))


def _traced(compiled: Any, visit: Any) -> Any:
    """Compiled as far as the limit is concerned, without waiting for a C++ compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        return compiled(visit)


@dataclass(frozen=True)
class Unsuited(Divergence):
    """A squared difference, written in a way that no compiler follows."""

    name = "unsuited"

    def terms(self, a: LogProbs, b: LogProbs) -> Terms:
        torch._dynamo.graph_break()
        difference = a.p - b.p
        return difference.square(), 2 * difference * a.p, -2 * difference * b.p


def test_what_cannot_be_compiled_is_reported_once_and_runs_eagerly(monkeypatch, caplog):
    monkeypatch.undo()
    plain = logits_loss(AMiD(0.5, 0.3, Unsuited()))
    monkeypatch.setattr(tiles, "WORTH_COMPILING", 0)
    with caplog.at_level(logging.WARNING):
        compiled = [logits_loss(AMiD(0.5, 0.3, Unsuited())) for _ in range(2)]
    for result in compiled:
        torch.testing.assert_close(result, plain)
    assert sum("without torch.compile" in record.message for record in caplog.records) == 1


def logits_loss(objective: AMiD) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 40, generator=draw, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    loss = fused.amid_loss(student, teacher, objective)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), student)]


def test_only_large_blocks_on_a_cpu_are_compiled(monkeypatch):
    monkeypatch.setattr(tiles, "WORTH_COMPILING", 1000)
    asked = []
    monkeypatch.setattr(tiles, "_compiled", lambda visit: asked.append(visit) or visit)
    LossProblem(4, 100).fused(OBJECTIVES[0])
    assert asked == []
    LossProblem(16, 100).fused(OBJECTIVES[0])
    assert elementwise._kl_moments_tile in asked
