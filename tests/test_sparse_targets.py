"""The loss on a teacher that was written down sparsely: against the naive twin, whole teachers and
draws."""

from __future__ import annotations

import pytest
import torch
from support.losses import OBJECTIVES, PER_TOKEN
from support.sparse import SparseProblem, with_teacher_untempered

from amid_ds.losses import fused, tiles

EVERY_KIND = [*OBJECTIVES, *PER_TOKEN]


@pytest.mark.parametrize("rest", ["ghost", "spread", "drop"])
@pytest.mark.parametrize("objective", EVERY_KIND, ids=str)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_loss_and_its_gradients_are_the_naive_twins(rest, objective, cap, monkeypatch):
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: 3)
    monkeypatch.setitem(tiles.TILE_ELEMENTS, "cpu", 40)
    if rest == "drop" and "qr" in dict(objective.order_weights) and objective.alpha == 3.0:
        pytest.skip("KL(q‖r) is infinite: r is 0 wherever p is")
    if rest == "ghost":
        objective = with_teacher_untempered(objective)
    problem = SparseProblem(5, rest, padding=2)
    ours, truth = problem.sparse(objective, cap, 0.7).loss, problem.naive_sparse(objective, cap,
                                                                                0.7)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    for actual, expected in zip(problem.gradients(ours), problem.gradients(truth), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
