"""Between the matrix products, in plain torch: logits in, row sums and the gradient of the logits out.

A block of tokens is read in tiles of the vocabulary (tiles.py), once per phase; between two phases the row sums of all
shards are added up. Nothing is kept from phase to phase but those sums: recomputing a few exponentials in cache costs
less than storing them. The kernels (kernels.py) are the same three functions.

What is done to a tile is a function of that tile alone, without a loop over anything, so that torch.compile can make
one loop of it.

With g = w (A - r ΣA) + B, A = ∂D/∂log r, B = ∂D/∂log q at fixed r and w = ∂log r̃/∂log q, the gradient of a row is
∂D/∂s = (g - q Σg) / τ: a phase that sums D, A, wA + B and w r is all that the last phase needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard, merge_logsumexp
from amid_ds.losses.block import Block, needs_normaliser, normalised
from amid_ds.losses.moments import ROWS, merged, sums_of
from amid_ds.losses.objective import KL, AMiD, LogProbs
from amid_ds.losses.tiles import each_tile


def log_normalisers(block: Block) -> Tensor:
    """[k, 2, n] local log Σ exp of the logits that `block.normalisers` names."""
    return _joined(block, each_tile(block, _normalisers_tile), len(block.normalisers))


def _normalisers_tile(tile: Block) -> Tensor:
    return torch.stack([_log_sum_exp(_logits(tile, name)) for name in tile.normalisers])


def statistics(block: Block, shard: VocabShard) -> Tensor:
    """[4, n] ΣD, ΣA, Σ(wA + B), Σwr over the whole vocabulary; `block.log_assistant` on the way where it is not 0."""
    assert block.objective is not None
    if needs_normaliser(block.objective):
        if isinstance(block.objective.measure, KL):
            moments = merged(shard.gather(_kl_moments(block)))
            block.log_assistant = moments[:2]
            return sums_of(moments, block.objective)
        block.log_assistant = shard.logsumexp(_log_assistant_normaliser(block))
    return shard.sum(_sums(block))


def _kl_moments(block: Block) -> Tensor:
    """[9, n] local moments (moments.py)."""
    parts = each_tile(block, _kl_moments_tile)
    if parts:
        return merged(torch.stack(parts))
    empty = torch.zeros(ROWS, block.tokens, dtype=block.dtype, device=block.device)
    empty[:2] = -math.inf
    return empty


def _kl_moments_tile(tile: Block) -> Tensor:
    objective = tile.objective
    assert objective is not None
    kappa = dict(objective.weights)
    log_p, log_q = _log_models(tile)
    log_r, w = mixture(log_p, log_q, objective)
    w = 0.0 if objective.detach_assistant else w
    peak = log_r.amax(-1)
    r = (log_r - peak[:, None]).exp_()
    total = r.sum(-1)
    w_r = r * w
    zero = torch.zeros_like(total)
    t_r = wt_r = value = pull = w_models = excess = zero
    for order, log_m in (("p", log_p), ("q", log_q)):
        away, back = kappa.get(order + "r", 0.0), kappa.get("r" + order, 0.0)
        if not away and not back:
            continue
        m, rise = log_m.exp(), log_r - log_m
        excess = excess + (back - away) * m.sum(-1)
        if back:
            t_r = t_r + back * (r * rise).sum(-1) / total
            wt_r = wt_r + back * (w_r * rise).sum(-1) / total
        if away:
            fall = away * (m * rise).sum(-1)
            value = value - fall
            pull = pull - (fall if order == "q" else zero)
            w_models = w_models + away * (m * w).sum(-1)
    return torch.stack([peak, total.log(), w_r.sum(-1) / total, t_r, wt_r, value, pull, w_models, excess])


def _log_assistant_normaliser(block: Block) -> Tensor:
    """[2, n] local log Σ r̃."""
    return _joined(block, each_tile(block, _assistant_tile), 1)[0]


def _assistant_tile(tile: Block) -> Tensor:
    assert tile.objective is not None
    return _log_sum_exp(mixture(*_log_models(tile), tile.objective)[0])[None]


def _sums(block: Block) -> Tensor:
    """[4, n] local ΣD, ΣA, Σ(wA + B), Σwr."""
    empty = torch.zeros(4, block.tokens, dtype=block.dtype, device=block.device)
    return torch.stack(each_tile(block, _sums_tile) or [empty]).sum(0)


def _sums_tile(tile: Block) -> Tensor:
    *terms, q = _terms(tile)
    zero = torch.zeros_like(q.log[:, 0])
    return torch.stack([zero if term is None else term.sum(-1) for term in terms])


def write_gradient(block: Block) -> None:
    """Put kd_scale · ∂D/∂logits + ce_scale · ∂CE/∂logits into `block.gradient` [n, width]; it may be the logits."""
    each_tile(block, _gradient_tile)


def _gradient_tile(tile: Block) -> None:
    z = tile.student.read(tile.dtype)
    gradient = _kd_gradient(tile) if tile.kd_scale is not None else torch.zeros_like(z)
    if tile.ce_scale is not None:
        assert tile.log_z is not None
        gradient.addcmul_(normalised(z, tile.log_z).exp_(), tile.ce_scale[:, None])
        _at_labels(tile, gradient)
    tile.student.chain(gradient, z)
    assert tile.gradient is not None
    tile.gradient.copy_(gradient)


def _log_sum_exp(x: Tensor) -> Tensor:
    """[n, tile] -> [2, n], in two parts (vocab_parallel.joined)."""
    peak = x.amax(-1)
    return torch.stack([peak, (x - peak[:, None]).exp_().sum(-1).log_()])


def _joined(block: Block, parts: list[Tensor], rows: int) -> Tensor:
    """The tiles' log-sum-exps [rows, 2, n] put together; a shard without columns has none, its peak is -inf."""
    if not parts:
        parts = [torch.full((rows, 2, block.tokens), -math.inf, dtype=block.dtype, device=block.device)]
    return merge_logsumexp(torch.stack(parts)) if len(parts) > 1 else parts[0]


def mixture(log_p: Tensor, log_q: Tensor, objective: AMiD) -> tuple[Tensor, Tensor | float]:
    """log r̃ and w = ∂log r̃/∂log q = (1-λ) q^c / (λ p^c + (1-λ) q^c), stable for every real α.

    With x = c (log p - log q) both follow from the student's log-odds, o = log((1-λ)/λ) - x: w = σ(o), and log r̃ is
    the one of log p + log(λ)/c and log q + log(1-λ)/c that dominates, plus log(1 + e^-|o|)/c: nothing cancels. Where c
    is small it does, between log(λ)/c and the rest; log q + log1p(λ expm1(x))/c does not, but overflows where x is
    large: it is taken element by element where |x| < 1.
    """
    alpha, lam = objective.alpha, objective.lam
    if lam in (0, 1):
        return (log_p, 0.0) if lam else (log_q, 1.0)
    if alpha == 1:
        return torch.lerp(log_q, log_p, lam), 1.0 - lam
    c = (1 - alpha) / 2
    x = (log_p - log_q).mul_(c)
    log_lam, log_rest = objective.log_shares
    odds = log_rest - log_lam - x
    dominant = torch.maximum if c > 0 else torch.minimum
    log_r = log_p + log_lam / c
    dominant(log_r, log_q + log_rest / c, out=log_r)
    log_r.add_(odds.abs().neg_().exp_().log1p_().div_(c))
    if abs(c) < 0.5:
        log_r = torch.where(x.abs() < 1, x.clamp(-1, 1).expm1_().mul_(lam).log1p_().div_(c).add_(log_q), log_r)
    return log_r, odds.sigmoid_()


def _terms(tile: Block) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, LogProbs]:
    """Element by element D, A, wA + B and w r, where None is a zero; and q."""
    objective = tile.objective
    assert objective is not None
    log_p, log_q = _log_models(tile)
    log_r, w = mixture(log_p, log_q, objective)
    if tile.log_assistant is not None:
        log_r = normalised(log_r, tile.log_assistant)
    if objective.detach_assistant:
        w = 0.0
    of = {"p": LogProbs(log_p), "q": LogProbs(log_q), "r": LogProbs(log_r)}
    parts: dict[str, Tensor | None] = {"value": None, "p": None, "q": None, "r": None}
    for order, weight in objective.weights:
        first, second = order[0], order[1]
        value, d_first, d_second = objective.measure.terms(of[first], of[second])
        for key, term in (("value", value), (first, d_first), (second, d_second)):
            parts[key] = _plus(parts[key], term if weight == 1 else weight * term)
    d_r, pull = parts["r"], parts["q"]
    if not isinstance(w, float) or w:
        assert d_r is not None and parts["value"] is not None
        return parts["value"], d_r, _plus(pull, d_r * w), of["r"].p * w, of["q"]
    return parts["value"], None, pull, None, of["q"]   # type: ignore[return-value]


def _kd_gradient(tile: Block) -> Tensor:
    """kd_scale · (X - ΣA·w r - q·Σg) / τ with X = wA + B and Σg = ΣX - ΣA·Σwr."""
    assert tile.sums is not None and tile.kd_scale is not None and tile.objective is not None
    _, _, pull, w_r, q = _terms(tile)
    _, sum_a, sum_x, sum_w_r = tile.sums[..., None]
    gradient = q.p * (sum_a * sum_w_r - sum_x)
    if pull is not None:
        gradient += pull
    if w_r is not None:
        gradient -= w_r.mul_(sum_a)
    return gradient.mul_(tile.kd_scale[:, None] / tile.objective.temperature)


def _log_models(tile: Block) -> tuple[Tensor, Tensor]:
    """log p and log q [n, tile], normalised over the whole vocabulary."""
    assert tile.log_p is not None and tile.log_q is not None
    return normalised(_logits(tile, "p"), tile.log_p), normalised(_logits(tile, "q"), tile.log_q)


def _logits(tile: Block, name: str) -> Tensor:
    """[n, tile] `p` the teacher's and `q` the student's logits over τ, `z` the student's as they are."""
    model = tile.teacher if name == "p" else tile.student
    assert model is not None
    logits = model.read(tile.dtype)
    tau = 1.0 if name == "z" or tile.objective is None else tile.objective.temperature
    return logits if tau == 1 else logits / tau


def _at_labels(tile: Block, gradient: Tensor) -> None:
    """gradient[i, label_i] -= ce_scale_i where the label lies in this tile."""
    assert tile.labels is not None and tile.ce_scale is not None
    local = tile.labels
    here = ((local >= 0) & (local < gradient.shape[1])).to(gradient.dtype)
    gradient.scatter_add_(1, local.clamp(0, gradient.shape[1] - 1)[:, None], -(tile.ce_scale * here)[:, None])


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b

