"""The tests can fail: each of fifteen ways to break the implementation differs from the naive twin.

A mutation is a replacement in the source of one module. The replaced text must be there exactly
once, so a mutation cannot silently become none when the code changes.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch
from support.losses import PER_TOKEN, LossProblem
from torch import Tensor

from amid_ds import AMiD, VocabShard, amid_loss
from amid_ds.losses import backends, block, elementwise, fused, lm_head, mixture, moments, tiles

OBJECTIVES = [AMiD(-5.0, 0.3, order="rp"), AMiD(0.5, 0.3, order={"pr": 0.5, "qr": 0.5}),
              AMiD(2.0, 0.6, order="rq")]

MUTATIONS = {
    "drop log Z's gradient": (elementwise, "gradient -= w_r.mul_(sum_a)", "pass"),
    "swap p and q": (elementwise,
                     'of = {"p": LogProbs(log_p), "q": LogProbs(log_q)',
                     'of = {"p": LogProbs(log_q), "q": LogProbs(log_p)'),
    "skip a tile": (tiles, "for start in range(0, width, step)]",
                    "for start in range(step, width, step)]"),
    "forget the softmax's gradient": (elementwise, "gradient = q.p * (sum_a * sum_w_r - sum_x)",
                                      "gradient = q.p * 0"),
    "forget the assistant's normaliser": (elementwise,
                                          "log_r = normalised(log_r, log_assistant)", "pass"),
    "take the teacher's share for the student's": (
        mixture, "odds = log_rest - log_lam - x\n    dominant",
        "odds = log_lam - log_rest - x\n    dominant"),
    "ignore a weight": (fused, "index = weights.nonzero()[:, 0]",
                        "weights = (weights > 0).to(dtype); index = weights.nonzero()[:, 0]"),
    "ignore the temperature in the gradient": (
        elementwise, "tile.kd_scale[:, None] / tile.student.temperature",
        "tile.kd_scale[:, None]"),
    "leave out a block": (fused, "for rows in slices(len(index), size):",
                          "for rows in [*slices(len(index), size)][1:]:"),
    "take another token's number": (mixture, "number[:, None] if isinstance",
                                    "number.flip(0)[:, None] if isinstance"),
    "forget a token weight in the gradient": (block, "block = block.weighted(factor)", "pass"),
    "forget a token weight in the loss": (
        fused, "total_weights[tokens] = weights[tokens] * out.factor",
        "total_weights[tokens] = weights[tokens]"),
    "count a masked token in its sequence": (fused, "inputs.sequences, weights > 0)",
                                             "inputs.sequences, weights >= 0)"),
    "measure the other model": (elementwise, "-(p.p * log_p).sum(-1)", "-(q.p * log_q).sum(-1)"),
    "forget the upstream gradient": (lm_head, "factor[rows] if per_row else factor",
                                    "torch.ones(())"),
}


def mutant(module: types.ModuleType, old: str, new: str) -> dict[str, Any]:
    """The namespace of `module` with `old` replaced by `new` in its source."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is in {module.__name__} {source.count(old)} times"
    changed = types.ModuleType(module.__name__)
    changed.__dict__.update(__file__=module.__file__, __package__=module.__package__)
    exec(compile(source.replace(old, new), f"<{module.__name__}, mutated>", "exec"),
         changed.__dict__)
    return changed.__dict__


def agrees(linear_loss: Any, head: Any = fused.LMHead) -> bool:
    """True if the loss and its gradients are the naive twin's, over several blocks and tiles."""
    for objective in (*OBJECTIVES, AMiD(-5.0, 0.1, temperature=2.0), *PER_TOKEN):
        problem = LossProblem()
        truth = problem.naive(objective)
        ours = linear_loss(problem.student, head(problem.weight, problem.bias), problem.teacher,
                           problem.teacher_weight, objective, token_weights=problem.weights,
                           labels=problem.labels, ce_weight=0.4, kd_weight=0.9,
                           vocab_size=problem.vocab_size, sequences=problem.sequences).loss
        pairs = zip([ours, *problem.gradients(3 * ours)], [truth, *problem.gradients(3 * truth)],
                    strict=True)
        if not all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in pairs):
            return False
    return True


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_tokens_per_block", lambda *_: 3)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", {"cpu": 30})


def test_what_is_not_broken_agrees():
    assert agrees(fused.linear_amid_loss)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, monkeypatch):
    module, old, new = MUTATIONS[name]
    broken = mutant(module, old, new)
    if module is fused:
        broken["_tokens_per_block"] = lambda *_: 3
        assert not agrees(broken["linear_amid_loss"], broken["LMHead"])
    elif module is tiles:
        broken["TILE_ELEMENTS"] = {"cpu": 30}
        monkeypatch.setattr(elementwise, "each_tile", broken["each_tile"])
        assert not agrees(fused.linear_amid_loss)
    elif module in (block, lm_head):
        name = "forward_backward_block" if module is block else "scaled"
        monkeypatch.setattr(fused, name, broken[name])
        assert not agrees(fused.linear_amid_loss)
    elif module is mixture:
        monkeypatch.setattr(elementwise, "mixture", broken["mixture"])
        assert not agrees(fused.linear_amid_loss)
    else:
        monkeypatch.setattr(backends, "elementwise", types.SimpleNamespace(**broken))
        assert not agrees(fused.linear_amid_loss)


class Doubled(VocabShard):
    """Two ranks in one process with the same columns of a vocabulary that has every id twice."""

    def gather(self, local: Tensor) -> Tensor:
        return torch.stack([local, local])


def test_a_forgotten_shards_sum_is_noticed(monkeypatch):
    student, teacher = (torch.randn(3, 9, dtype=torch.float64) for _ in range(2))

    def sharded(objective: AMiD) -> Tensor:
        shard = Doubled(0, 9, group="a peer")  # type: ignore[arg-type]
        shard._extent.extend([9, 18])
        return amid_loss(student, teacher, objective, shard=shard)

    forgotten = {"logsumexp": (Doubled, "logsumexp", lambda self, local: local),
                 "sum": (Doubled, "sum", lambda self, local: local),
                 "moments": (elementwise, "merge_moments",
                             lambda parts: moments.merge_moments(parts[:1]))}
    for objective, exchanges in ((OBJECTIVES[0], ["logsumexp", "moments"]),
                                 (AMiD(2.0, 0.6, "squared_hellinger"), ["logsumexp", "sum"])):
        whole = amid_loss(student.repeat(1, 2), teacher.repeat(1, 2), objective)
        torch.testing.assert_close(sharded(objective), whole)
        for name in exchanges:
            with monkeypatch.context() as patch:
                patch.setattr(*forgotten[name])
                assert not torch.allclose(sharded(objective), whole, rtol=1e-3), name
