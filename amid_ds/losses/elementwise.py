"""Between the matrix products, in plain torch: logits in, row sums and the gradient of the logits out.

A block of tokens is read in tiles of the vocabulary, small enough to stay in cache, once per phase; between two phases
the row sums of all shards are added up. Nothing is kept from phase to phase but those sums: recomputing a few
exponentials in cache costs less than storing them. The kernels (kernels.py) are the same three functions.

With g = w (A - r ΣA) + B, A = ∂D/∂log r, B = ∂D/∂log q at fixed r and w = ∂log r̃/∂log q, the gradient of a row is
∂D/∂s = (g - q Σg) / τ: a phase that sums D, A, wA + B and w r is all that the last phase needs.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from amid_ds.host_memory import keep_freed_memory
from amid_ds.losses.block import Block, needs_normaliser, normalised
from amid_ds.losses.moments import ROWS, merged, sums_of
from amid_ds.losses.objective import KL, AMiD, LogProbs
from amid_ds.vocab_parallel import VocabShard, joined

T = TypeVar("T")
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 22}   # of the tiles under way together: 2 MB of fp32, 16 MB
TEMPORARIES = 10                       # of a tile, alive at once
MOST_THREADS = 8                       # beyond, tiles would be too small to be worth a thread


def log_normalisers(block: Block) -> Tensor:
    """[k, 2, n] local log Σ exp of the logits that `block.normalisers` names."""
    def visit(columns: slice) -> Tensor:
        return torch.stack([_log_sum_exp(_logits(block, name, columns)) for name in block.normalisers])

    return _joined(block, _each_tile(block, visit), len(block.normalisers))


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
    objective = block.objective
    assert objective is not None
    kappa = dict(objective.weights)

    def visit(columns: slice) -> Tensor:
        log_p, log_q = _log_models(block, columns)
        log_r, w = mixture(log_p, log_q, objective)
        w = 0.0 if objective.detach_assistant else w
        rows = torch.zeros(ROWS, block.tokens, dtype=block.dtype, device=block.device)
        rows[0] = log_r.amax(-1)
        r = (log_r - rows[0][:, None]).exp_()
        total = r.sum(-1)
        rows[1] = total.log()
        w_r = r * w
        rows[2] = w_r.sum(-1) / total
        for order, log_m in (("p", log_p), ("q", log_q)):
            away, back = kappa.get(order + "r", 0.0), kappa.get("r" + order, 0.0)
            if not away and not back:
                continue
            m, rise = log_m.exp(), log_r - log_m
            rows[8] += (back - away) * m.sum(-1)
            if back:
                rows[3] += back * (r * rise).sum(-1) / total
                rows[4] += back * (w_r * rise).sum(-1) / total
            if away:
                fall = away * (m * rise).sum(-1)
                rows[5] -= fall
                rows[6] -= fall if order == "q" else 0.0
                rows[7] += away * (m * w).sum(-1)
        return rows

    parts = _each_tile(block, visit)
    if parts:
        return merged(torch.stack(parts))
    empty = torch.zeros(ROWS, block.tokens, dtype=block.dtype, device=block.device)
    empty[:2] = -math.inf
    return empty


def _log_assistant_normaliser(block: Block) -> Tensor:
    """[2, n] local log Σ r̃."""
    objective = block.objective
    assert objective is not None

    def visit(columns: slice) -> Tensor:
        return _log_sum_exp(mixture(*_log_models(block, columns), objective)[0])[None]

    return _joined(block, _each_tile(block, visit), 1)[0]


def _sums(block: Block) -> Tensor:
    """[4, n] local ΣD, ΣA, Σ(wA + B), Σwr."""
    def visit(columns: slice) -> Tensor:
        *terms, q = _terms(block, columns)
        zero = torch.zeros_like(q.log[:, 0])
        return torch.stack([zero if term is None else term.sum(-1) for term in terms])

    empty = torch.zeros(4, block.tokens, dtype=block.dtype, device=block.device)
    return torch.stack(_each_tile(block, visit) or [empty]).sum(0)


def write_gradient(block: Block) -> None:
    """Put kd_scale · ∂D/∂logits + ce_scale · ∂CE/∂logits into `block.gradient` [n, width]; it may be the logits."""
    target = block.gradient
    assert target is not None

    def visit(columns: slice) -> None:
        z = block.student.read(columns, block.dtype)
        gradient = _kd_gradient(block, columns) if block.kd_scale is not None else torch.zeros_like(z)
        if block.ce_scale is not None:
            assert block.log_z is not None
            gradient.addcmul_(normalised(z, block.log_z).exp_(), block.ce_scale[:, None])
            _at_labels(block, columns, gradient)
        block.student.chain(gradient, z)
        target[:, columns].copy_(gradient)

    _each_tile(block, visit)


def _log_sum_exp(x: Tensor) -> Tensor:
    """[n, tile] -> [2, n], in two parts (vocab_parallel.joined)."""
    peak = x.amax(-1)
    return torch.stack([peak, (x - peak[:, None]).exp_().sum(-1).log_()])


def _joined(block: Block, parts: list[Tensor], rows: int) -> Tensor:
    """The tiles' log-sum-exps [rows, 2, n] put together; a shard without columns has none, its peak is -inf."""
    if not parts:
        parts = [torch.full((rows, 2, block.tokens), -math.inf, dtype=block.dtype, device=block.device)]
    return joined(torch.stack(parts)) if len(parts) > 1 else parts[0]


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
    log_lam, log_rest = math.log(lam), math.log1p(-lam)
    odds = log_rest - log_lam - x
    dominant = torch.maximum if c > 0 else torch.minimum
    log_r = log_p + log_lam / c
    dominant(log_r, log_q + log_rest / c, out=log_r)
    log_r.add_(odds.abs().neg_().exp_().log1p_(), alpha=1 / c)
    if abs(c) < 0.5:
        log_r = torch.where(x.abs() < 1, x.clamp(-1, 1).expm1_().mul_(lam).log1p_().div_(c).add_(log_q), log_r)
    return log_r, odds.sigmoid_()


def _terms(block: Block, columns: slice) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, LogProbs]:
    """Element by element D, A, wA + B and w r, where None is a zero; and q."""
    objective = block.objective
    assert objective is not None
    log_p, log_q = _log_models(block, columns)
    log_r, w = mixture(log_p, log_q, objective)
    if block.log_assistant is not None:
        log_r = normalised(log_r, block.log_assistant)
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


def _kd_gradient(block: Block, columns: slice) -> Tensor:
    """kd_scale · (X - ΣA·w r - q·Σg) / τ with X = wA + B and Σg = ΣX - ΣA·Σwr."""
    assert block.sums is not None and block.kd_scale is not None and block.objective is not None
    _, _, pull, w_r, q = _terms(block, columns)
    _, sum_a, sum_x, sum_w_r = block.sums[..., None]
    gradient = q.p * (sum_a * sum_w_r - sum_x)
    if pull is not None:
        gradient += pull
    if w_r is not None:
        gradient -= w_r.mul_(sum_a)
    return gradient.mul_(block.kd_scale[:, None] / block.objective.temperature)


def _log_models(block: Block, columns: slice) -> tuple[Tensor, Tensor]:
    """log p and log q [n, tile], normalised over the whole vocabulary."""
    assert block.log_p is not None and block.log_q is not None
    return normalised(_logits(block, "p", columns), block.log_p), normalised(_logits(block, "q", columns), block.log_q)


def _logits(block: Block, name: str, columns: slice) -> Tensor:
    """[n, tile] `p` the teacher's and `q` the student's logits over τ, `z` the student's as they are."""
    model = block.teacher if name == "p" else block.student
    assert model is not None
    logits = model.read(columns, block.dtype)
    tau = 1.0 if name == "z" or block.objective is None else block.objective.temperature
    return logits if tau == 1 else logits / tau


def _at_labels(block: Block, columns: slice, gradient: Tensor) -> None:
    """gradient[i, label_i] -= ce_scale_i where the label lies in this tile."""
    assert block.labels is not None and block.ce_scale is not None
    local = block.labels - columns.start
    here = ((local >= 0) & (local < gradient.shape[1])).to(gradient.dtype)
    gradient.scatter_add_(1, local.clamp(0, gradient.shape[1] - 1)[:, None], -(block.ce_scale * here)[:, None])


def tiling(device: torch.device) -> tuple[int, int]:
    """Bytes that the tiles' temporaries take at most (fp32), and the most tokens for which a tile is not too narrow.

    The same whatever the number of threads, which ranks of a group need not have in common.
    """
    elements = TILE_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    return 4 * elements * TEMPORARIES, elements // 256


def product_elements(device: torch.device) -> int:
    """Elements of a matrix product that is made in low precision before it is added to an fp32 sum."""
    return 4 * TILE_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]


def _each_tile(block: Block, visit: Callable[[slice], T]) -> list[T]:
    """Visit the tiles of the vocabulary, on a CPU each tile by one of as many threads as torch has been given.

    One thread per tile, rather than all threads on every operation of a tile, because a tile's operations are so short
    that waiting for one another costs more than they do wherever the cores are shared with anything else.
    """
    width, cpu = block.student.width, block.device.type == "cpu"
    if cpu:
        keep_freed_memory()
    threads = min(torch.get_num_threads(), MOST_THREADS) if cpu else 1
    step = max(1, TILE_ELEMENTS["cpu" if cpu else "cuda"] // (threads * max(1, block.tokens)))
    tiles = [slice(start, min(start + step, width)) for start in range(0, width, step)]
    if threads == 1 or len(tiles) < 2:
        return [visit(columns) for columns in tiles]
    return list(_pool(threads).map(torch.no_grad()(visit), tiles))


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that run torch's operations alone, each."""
    pool, before = ThreadPoolExecutor(threads, "amid_ds tile"), torch.get_num_threads()
    ready = threading.Barrier(threads)

    def alone() -> None:
        torch.set_num_threads(1)       # this thread's OpenMP setting, and the default of threads yet to be
        ready.wait()

    for task in [pool.submit(alone) for _ in range(threads)]:
        task.result()
    torch.set_num_threads(before)      # so the default is put back
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)   # a forked child has the pool's object but not its threads


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b

