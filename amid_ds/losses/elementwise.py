"""The arithmetic between the matrix products, in plain torch: logits to row sums and gradient.

A block of tokens is read in tiles of the vocabulary (tiles.py), once per phase; between two phases
the row sums of all shards are added up. Nothing else is kept from phase to phase: recomputing a few
exponentials in cache costs less than storing them. The Triton backend (kernels.py) has the same
three public functions, those of `block.Backend`; block.py also defines D, A, B and w.

The functions of one tile have no loop over data, so that torch.compile can make one loop of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard, merge_logsumexp
from amid_ds.losses.block import (
    Block,
    RowNormalisers,
    RowStatistics,
    needs_normaliser,
    normalised,
)
from amid_ds.losses.divergences import (
    INFINITE_RATIO,
    KL,
    LOG_ZERO,
    AlphaBeta,
    ConcreteScore,
    LogProbs,
    Terms,
)
from amid_ds.losses.mixture import mixture
from amid_ds.losses.moments import MOMENT_ROWS, merge_moments, sums_from_moments
from amid_ds.losses.objective import Number, ResolvedObjective
from amid_ds.losses.tiles import each_tile


def log_normalisers(block: Block) -> Tensor:
    """[k, 2, n] local log Σ exp of the logits that `block.normaliser_names` lists."""
    return _merged(block, each_tile(block, _normalisers_tile), len(block.normaliser_names))


def _normalisers_tile(tile: Block) -> Tensor:
    return torch.stack([_log_sum_exp(_logits(tile, name)) for name in tile.normaliser_names])


def measures(block: Block, norms: RowNormalisers, names: tuple[str, ...]) -> Tensor:
    """[k, n] local sums of the measures of these names (measures.py). One reading."""
    empty = torch.zeros(len(names), block.tokens, dtype=block.dtype, device=block.device)
    return torch.stack(each_tile(block, _measures_tile, norms, names) or [empty]).sum(0)


def _measures_tile(tile: Block, norms: RowNormalisers, names: tuple[str, ...]) -> Tensor:
    log_p, log_q = _log_models(tile, norms)
    p, q = LogProbs(log_p), LogProbs(log_q)
    sums = []
    for name in names:
        if name == "teacher_entropy":
            sums.append(-(p.p * log_p).sum(-1))
        elif name == "student_entropy":
            sums.append(-(q.p * log_q).sum(-1))
        elif name == "divergence":
            sums.append(KL().terms(p, q)[0].sum(-1))
        elif name == "overlap":
            sums.append(torch.minimum(p.p, q.p).sum(-1))
        else:
            assert name == "label_probability" and tile.labels is not None
            here = (tile.labels >= 0) & (tile.labels < log_p.shape[1])
            at_label = p.p.gather(1, tile.labels.clamp(0, log_p.shape[1] - 1)[:, None])[:, 0]
            sums.append(torch.where(here, at_label, 0.0))
    return torch.stack(sums)


def statistics(block: Block, norms: RowNormalisers, shard: VocabShard) -> RowStatistics:
    """log Σ r̃ and ΣD, ΣA, Σ(wA + B), Σwr over the whole vocabulary.

    One collective for KL and without log Σ r̃, two otherwise; one more for a concrete score.
    """
    objective = block.objective
    assert objective is not None
    log_assistant = residuals = None
    if needs_normaliser(objective):
        if isinstance(objective.resolved_divergence, KL):
            moments = merge_moments(shard.gather(_kl_moments(block, norms)))
            return RowStatistics(moments[:2], sums_from_moments(moments, objective))
        log_assistant = shard.logsumexp(_log_assistant_normaliser(block, norms))
    if isinstance(objective.resolved_divergence, ConcreteScore):
        residuals = shard.sum(_residual_sums(block, norms, log_assistant))
    sums = shard.sum(_sums(block, norms, log_assistant, residuals))
    return RowStatistics(log_assistant, sums, residuals)


def _kl_moments(block: Block, norms: RowNormalisers) -> Tensor:
    """[9, n] local moments (moments.py)."""
    parts = each_tile(block, _kl_moments_tile, norms)
    if parts:
        return merge_moments(torch.stack(parts))
    empty = torch.zeros(MOMENT_ROWS, block.tokens, dtype=block.dtype, device=block.device)
    empty[:2] = -math.inf
    return empty


def _kl_moments_tile(tile: Block, norms: RowNormalisers) -> Tensor:
    objective = tile.objective
    assert objective is not None
    kappa = dict(objective.order_weights)
    log_p, log_q = _log_models(tile, norms)
    log_r, w = mixture(log_p, log_q, objective)
    w = 0.0 if objective.detach_assistant else w
    peak = log_r.amax(-1)
    r = (log_r - peak[:, None]).exp_()
    total = r.sum(-1)
    w_r = r * w
    zero = torch.zeros_like(total)
    t_r = wt_r = value = pull = w_models = excess = zero
    for model, log_m in (("p", log_p), ("q", log_q)):
        # The weights of D(model‖r) and D(r‖model).
        to_r, from_r = kappa.get(model + "r", 0.0), kappa.get("r" + model, 0.0)
        reads_to, reads_from = _is_used(to_r), _is_used(from_r)
        if not reads_to and not reads_from:
            continue
        m, rise = log_m.exp(), log_r - log_m
        excess = excess + (from_r - to_r) * m.sum(-1)
        # D(model‖r) is infinite where r has no probability and the model has some; D(r‖model), the
        # other way round.
        if reads_to:
            value = _infinite_where(rise.amin(-1) < -INFINITE_RATIO, to_r, value)
        if reads_from:
            value = _infinite_where(rise.amax(-1) > INFINITE_RATIO, from_r, value)
            t_r = t_r + from_r * (r * rise).sum(-1) / total
            wt_r = wt_r + from_r * (w_r * rise).sum(-1) / total
        if reads_to:
            fall = to_r * (m * rise).sum(-1)
            value = value - fall
            pull = pull - (fall if model == "q" else zero)
            w_models = w_models + to_r * (m * w).sum(-1)
    return torch.stack([peak, total.log(), w_r.sum(-1) / total, t_r, wt_r, value, pull, w_models,
                        excess])


def _is_used(weight: Number) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _infinite_where(mask: Tensor, weight: Number, value: Tensor) -> Tensor:
    """value [n], infinite where the mask [n] is set and the weight is not 0."""
    if isinstance(weight, Tensor):
        mask = mask & (weight != 0)
    return value.masked_fill(mask, math.inf)


def _log_assistant_normaliser(block: Block, norms: RowNormalisers) -> Tensor:
    """[2, n] local log Σ r̃."""
    return _merged(block, each_tile(block, _assistant_tile, norms), 1)[0]


def _assistant_tile(tile: Block, norms: RowNormalisers) -> Tensor:
    assert tile.objective is not None
    return _log_sum_exp(mixture(*_log_models(tile, norms), tile.objective)[0])[None]


def _residual_sums(block: Block, norms: RowNormalisers, log_assistant: Tensor | None) -> Tensor:
    """[orders, 4, n] local sums that a concrete score needs first."""
    assert block.objective is not None
    empty = torch.zeros(len(block.objective.order_weights), 4, block.tokens, dtype=block.dtype,
                        device=block.device)
    parts = each_tile(block, _residual_sums_tile, norms, log_assistant)
    return torch.stack(parts or [empty]).sum(0)


def _residual_sums_tile(tile: Block, norms: RowNormalisers,
                        log_assistant: Tensor | None) -> Tensor:
    assert tile.objective is not None
    divergence = tile.objective.resolved_divergence
    assert isinstance(divergence, ConcreteScore)
    probs, _ = _distributions(tile, norms, log_assistant)
    return torch.stack([
        divergence.residual_sums(probs[order[0]], probs[order[1]], probs["p"], probs["q"])
        for order, _ in tile.objective.order_weights])


def _sums(block: Block, norms: RowNormalisers, log_assistant: Tensor | None,
          residuals: Tensor | None) -> Tensor:
    """[4, n] local ΣD, ΣA, Σ(wA + B), Σwr."""
    empty = torch.zeros(4, block.tokens, dtype=block.dtype, device=block.device)
    parts = each_tile(block, _sums_tile, norms, log_assistant, residuals)
    return torch.stack(parts or [empty]).sum(0)


def _sums_tile(tile: Block, norms: RowNormalisers, log_assistant: Tensor | None,
               residuals: Tensor | None) -> Tensor:
    *terms, q = _terms(tile, norms, log_assistant, residuals)
    zero = torch.zeros_like(q.log[:, 0])
    return torch.stack([zero if term is None else term.sum(-1) for term in terms])


def write_gradient(block: Block, norms: RowNormalisers, stats: RowStatistics | None) -> None:
    """Write kd_scale · ∂D/∂raw + ce_scale · ∂CE/∂raw + label_scale · ∂log q(label)/∂raw into
    `block.gradient` [n, width]."""
    each_tile(block, _gradient_tile, norms, stats)


def _gradient_tile(tile: Block, norms: RowNormalisers, stats: RowStatistics | None) -> None:
    z = tile.student.read(tile.dtype)
    if tile.kd_scale is not None:
        assert stats is not None
        gradient = _kd_gradient(tile, norms, stats)
    else:
        gradient = torch.zeros_like(z)
    if tile.ce_scale is not None:
        assert norms.log_z is not None
        _add_label_gradient(tile, gradient, normalised(z, norms.log_z), -tile.ce_scale)
    if tile.label_scale is not None:
        assert norms.log_q is not None
        log_q = normalised(_logits(tile, "q"), norms.log_q)
        _add_label_gradient(tile, gradient, log_q, tile.label_scale / tile.student.temperature)
    tile.student.chain(gradient, z)
    assert tile.gradient is not None
    tile.gradient.copy_(gradient)


def _log_sum_exp(x: Tensor) -> Tensor:
    """[n, tile] -> [2, n], in two parts (vocab_parallel.py)."""
    # A tile may hold nothing but -inf.
    peak = x.amax(-1).clamp_(min=LOG_ZERO)
    return torch.stack([peak, (x - peak[:, None]).exp_().sum(-1).log_()])


def _merged(block: Block, parts: list[Tensor], rows: int) -> Tensor:
    """The tiles' log-sum-exps [rows, 2, n] merged; -inf for a shard without columns."""
    if not parts:
        parts = [torch.full((rows, 2, block.tokens), -math.inf, dtype=block.dtype,
                            device=block.device)]
    return merge_logsumexp(torch.stack(parts)) if len(parts) > 1 else parts[0]


def _distributions(tile: Block, norms: RowNormalisers, log_assistant: Tensor | None,
                   ) -> tuple[dict[str, LogProbs], Tensor | float]:
    """p, q and r by their letters, and w = ∂log r̃/∂log q, 0 if r is detached."""
    objective = tile.objective
    assert objective is not None
    log_p, log_q = _log_models(tile, norms)
    log_r, w = mixture(log_p, log_q, objective)
    if log_assistant is not None:
        log_r = normalised(log_r, log_assistant)
    probs_of = {"p": LogProbs(log_p), "q": LogProbs(log_q), "r": LogProbs(log_r)}
    return probs_of, 0.0 if objective.detach_assistant else w


def _terms(tile: Block, norms: RowNormalisers, log_assistant: Tensor | None,
           residuals: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None,
                                              LogProbs]:
    """D, A, wA + B and w r element by element [n, tile], None for a zero; and q."""
    objective = tile.objective
    assert objective is not None
    probs_of, w = _distributions(tile, norms, log_assistant)
    # D, and its derivatives with respect to log p, log q and log r.
    parts: dict[str, Tensor | None] = {"value": None, "p": None, "q": None, "r": None}
    for number, (order, weight) in enumerate(objective.order_weights):
        first, second = order[0], order[1]
        value, d_first, d_second = _order_terms(objective, probs_of, number, residuals)
        for key, term in (("value", value), (first, d_first), (second, d_second)):
            parts[key] = _plus(parts[key], _times(weight, term))
    total, d_r, d_q = parts["value"], parts["r"], parts["q"]
    assert total is not None and d_r is not None
    if isinstance(w, float) and not w:
        return total, None, d_q, None, probs_of["q"]
    return total, d_r, _plus(d_q, d_r * w), probs_of["r"].p * w, probs_of["q"]


def _order_terms(objective: ResolvedObjective, probs_of: dict[str, LogProbs], number: int,
                 residuals: Tensor | None) -> Terms:
    """The terms of the divergence in the objective's order of this number."""
    divergence, order = objective.resolved_divergence, objective.order_weights[number][0]
    first, second = probs_of[order[0]], probs_of[order[1]]
    if isinstance(divergence, ConcreteScore):
        assert residuals is not None
        return divergence.centred_terms(first, second, probs_of["p"], probs_of["q"],
                                        residuals[number])
    return divergence.terms(first, second)


def _kd_gradient(tile: Block, norms: RowNormalisers, stats: RowStatistics) -> Tensor:
    """kd_scale · (X - ΣA·w r - q·Σg) / τ with X = wA + B and Σg = ΣX - ΣA·Σwr."""
    assert tile.kd_scale is not None and tile.objective is not None
    _, _, pull, w_r, q = _terms(tile, norms, stats.log_assistant, stats.residuals)
    _, sum_a, sum_x, sum_w_r = stats.sums[..., None]
    gradient = q.p * (sum_a * sum_w_r - sum_x)
    if pull is not None:
        gradient += pull
    if w_r is not None:
        gradient -= w_r.mul_(sum_a)
    gradient.mul_(tile.kd_scale[:, None] / tile.student.temperature)
    if isinstance(tile.objective.resolved_divergence, AlphaBeta):
        # Powers below 0 may be infinite at a token whose weight is 0.
        gradient.masked_fill_(tile.kd_scale[:, None] == 0, 0.0)
    return gradient


def _log_models(tile: Block, norms: RowNormalisers) -> tuple[Tensor, Tensor]:
    """log p and log q [n, tile], normalised over the whole vocabulary."""
    assert norms.log_p is not None and norms.log_q is not None
    return normalised(_logits(tile, "p"), norms.log_p), normalised(_logits(tile, "q"), norms.log_q)


def _logits(tile: Block, name: str) -> Tensor:
    """[n, tile] `p` the teacher's and `q` the student's logits over τ, `z` the student's alone."""
    model = tile.teacher if name == "p" else tile.student
    assert model is not None
    return model.read(tile.dtype) if name == "z" else model.tempered(tile.dtype)


def _add_label_gradient(tile: Block, gradient: Tensor, log: Tensor, scale: Tensor) -> None:
    """gradient += scale · ∂log[label]/∂logits = scale · (onehot - exp(log)), for the logits' own
    log-softmax [n, tile]; scale [n], 0 for a token without a label."""
    assert tile.labels is not None
    gradient.addcmul_(log.exp_(), -scale[:, None])
    width = gradient.shape[1]
    here = ((tile.labels >= 0) & (tile.labels < width)).to(gradient.dtype)
    gradient.scatter_add_(1, tile.labels.clamp(0, width - 1)[:, None], (scale * here)[:, None])


def _times(weight: Number, term: Tensor) -> Tensor:
    """[n, tile] of a number or [n] weights; 0 where the weight is, though the term be infinite."""
    if isinstance(weight, Tensor):
        of_token = weight[:, None]
        return torch.where((of_token == 0) & term.isinf(), 0.0, of_token * term)
    return term if weight == 1 else weight * term


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
