"""A part of a model's distribution at each token: its K most probable ids, or draws from it.

In blocks of tokens like the loss, so that logits of all tokens never exist. Log-probabilities are
of the ids below `vocab_size`, renormalised over them, in fp32. Under a vocabulary shard each rank
looks at its own rows and a few numbers per token travel: K candidates, or the drawn ids. The
selection is then exact, and the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.errors import InputError
from amid_ds.losses import checks
from amid_ds.losses.blocks import slices, tokens_per_block
from amid_ds.losses.checks import VocabLayout
from amid_ds.losses.lm_head import LMHead, logits_workspace

# Bytes an element beside the logits themselves: at the most four times 8, while keys are made.
TEMPORARY_BYTES = 32
SIGN_BIT, LOW_HALF = 1 << 31, (1 << 32) - 1
LEAST_KEY = -(1 << 63)


class TopK(NamedTuple):
    """ids: [n, k] int64, by falling probability, the lowest id first among equals.

    log_p: [n, k] fp32; log_rest: [n] fp32, log of the mass outside, -inf for none; label_log_p:
    [n] fp32, of the labels.
    """

    ids: Tensor
    log_p: Tensor
    log_rest: Tensor
    label_log_p: Tensor


class Draws(NamedTuple):
    """ids: [n, N] int64, the distinct drawn ids, rising, then -1; counts: [n, N] of each, or 0.

    log_p: [n, N] fp32, -inf without an id; log_proposal_sum: [n] fp32, log Σ p^s, so that an id's
    proposal is exp(s · log_p - log_proposal_sum); label_log_p: [n] fp32.
    """

    ids: Tensor
    counts: Tensor
    log_p: Tensor
    log_proposal_sum: Tensor
    label_log_p: Tensor


@torch.no_grad()
def linear_topk(
    hidden: Tensor,                    # [N, H]
    head: LMHead,                      # weight [V_local, H]
    k: int,
    *,
    labels: Tensor,                    # [N] int64
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    workspace_bytes: int | None = None,
) -> TopK:
    """The k most probable ids of each token and the mass of all others. Replaces

        log_p = (hidden @ W.T + b)[:, :vocab_size].float().log_softmax(-1)
        top = log_p.topk(k)                           # the lowest ids among equals
        log_rest = log_p.scatter(-1, top.indices, -inf).logsumexp(-1)
        label_log_p = log_p.gather(-1, labels[:, None])[:, 0]

    The mass outside is the sum of what is there, not 1 less the rest. Collectives under a shard:
    three per block. Raises InputError for arguments that do not fit.
    """
    layout = _checked(hidden, head, labels, vocab_size, shard)
    if not 1 <= k <= layout.vocabulary:
        raise InputError(f"k={k} of a vocabulary of {layout.vocabulary}",
                         f"1 to {layout.vocabulary}", "lower k")
    parts = [_topk_of(*block, k, layout) for block in _blocks(hidden, head, labels, layout,
                                                              workspace_bytes)]
    return TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def linear_draws(
    hidden: Tensor,                    # [N, H]
    head: LMHead,                      # weight [V_local, H]
    uniforms: Tensor,                  # [N, draws] float64 in [0, 1)
    *,
    exponent: float,
    labels: Tensor,                    # [N] int64
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    workspace_bytes: int | None = None,
) -> Draws:
    """Ids drawn with a probability ∝ p^exponent (2503.16870: p), duplicates merged. Replaces

        log_p = (hidden @ W.T + b)[:, :vocab_size].float().log_softmax(-1)
        cumulative = (exponent * log_p.double()).exp().cumsum(-1)
        drawn = searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
        log_proposal_sum = cumulative[:, -1].log()

    The ranks of a shard stand in the order of their rows, so the draws are those of one process up
    to the rounding of sums in fp64. Collectives under a shard: three per block. Raises InputError
    for arguments that do not fit.
    """
    layout = _checked(hidden, head, labels, vocab_size, shard)
    if not 0 < exponent < float("inf") or uniforms.dtype != torch.float64:
        raise InputError(f"exponent={exponent}, uniforms of {uniforms.dtype}",
                         "a finite exponent above 0, and float64", "1 draws from p itself")
    parts = []
    for rows, block in zip(_block_rows(hidden, head, layout, workspace_bytes),
                           _blocks(hidden, head, labels, layout, workspace_bytes), strict=True):
        parts.append(_draws_of(*block, uniforms[rows], exponent, layout))
    return Draws(*(torch.cat(column) for column in zip(*parts, strict=True)))


def row_uniforms(seed: int, row: int, positions: int, draws: int) -> NDArray[np.float64]:
    """[positions, draws] numbers in [0, 1) of a row of the data, the same on any rank.

    Philox, keyed by seed and row: a position's are the next `draws` of its numbers.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, row], np.uint64)))
    return generator.random((positions, draws))


def _checked(hidden: Tensor, head: LMHead, labels: Tensor, vocab_size: int | None,
             shard: VocabShard | None) -> VocabLayout:
    checks.check_head_and_hidden("the", hidden, head)
    if labels.shape != hidden.shape[:1]:
        raise InputError(f"labels of shape {list(labels.shape)}", f"[N] = [{len(hidden)}]",
                         "one label per row of hidden")
    return checks.check_vocabulary({"head": head.weight.shape[0]}, vocab_size, shard, len(hidden),
                                   hidden.device)


def _block_rows(hidden: Tensor, head: LMHead, layout: VocabLayout, workspace_bytes: int | None
                ) -> Iterator[slice]:
    size = tokens_per_block(len(hidden), layout, 1, head.weight.element_size() + TEMPORARY_BYTES,
                            workspace_bytes, hidden.device, tiled=False)
    # One at least, so that there is something to concatenate.
    return slices(max(len(hidden), 1), max(size, 1))


def _blocks(hidden: Tensor, head: LMHead, labels: Tensor, layout: VocabLayout,
            workspace_bytes: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [n, width] in fp32, labels [n]) of each block; the logits are to be used up."""
    workspace = None
    for rows in _block_rows(hidden, head, layout, workspace_bytes):
        states = hidden[rows]
        if workspace is None:
            workspace = logits_workspace(len(states), layout.valid, head.weight)
        yield (head.logits(states, layout.valid, workspace).read(torch.float32), labels[rows])


def _normalised(logits: Tensor, labels: Tensor, layout: VocabLayout) -> tuple[Tensor, Tensor]:
    """(peak [n] and log Σ exp(logit - peak) [n] as [2, n], the labels' log p [n]), over the group.

    One collective.
    """
    n, width = logits.shape
    local = logits.new_zeros(2, 2, n)
    local[:, 0] = -torch.inf
    if width:
        peak = logits.amax(-1)
        local[0, 0] = peak
        local[0, 1] = (logits - peak.masked_fill(peak.isinf(), 0)[:, None]).logsumexp(-1)
        here = (labels >= layout.shard.start) & (labels < layout.shard.start + width)
        own = logits.gather(1, (labels - layout.shard.start).clamp(0, width - 1)[:, None])[:, 0]
        local[1, 0] = torch.where(here, own, -torch.inf)
    parts = layout.shard.gather(local)
    peak = parts[:, 0, 0].amax(0)
    rest = (parts[:, 0, 0] - peak + parts[:, 0, 1]).logsumexp(0)
    return torch.stack([peak, rest]), parts[:, 1, 0].amax(0) - peak - rest


def _topk_of(logits: Tensor, labels: Tensor, k: int, layout: VocabLayout) -> TopK:
    shard, width = layout.shard, logits.shape[1]
    (peak, rest), label_log_p = _normalised(logits, labels, layout)
    keys = torch.full((len(logits), k), LEAST_KEY, device=logits.device)
    if width:
        own = min(k, width)
        keys[:, :own] = _keys(logits, shard.start).topk(own, -1).values
    candidates = torch.cat(list(shard.gather(keys)), -1)
    ids, values = _from_keys(candidates.topk(k, -1).values)
    # What is left: the chosen of this rank's rows have no mass in it.
    outside = logits.new_full((len(logits),), -torch.inf)
    if width:
        place = ids - shard.start
        here = (place >= 0) & (place < width)
        # Those of other ranks write to a column beyond the last.
        chosen = torch.zeros(len(logits), width + 1, dtype=torch.bool, device=logits.device)
        chosen.scatter_(1, torch.where(here, place, width), True)
        outside = logits.masked_fill_(chosen[:, :width], -torch.inf).logsumexp(-1)
    log_rest = shard.gather(outside).logsumexp(0) - peak - rest
    return TopK(ids, values - peak[:, None] - rest[:, None], log_rest, label_log_p)


def _keys(logits: Tensor, start: int) -> Tensor:
    """[n, width] int64 in the order of the fp32 logits, then of falling ids. NaN is the largest."""
    bits = logits.view(torch.int32).to(torch.int64)
    # As integers the negative ones stand in the opposite order. -0 is 0.
    ordered = torch.where(bits >= 0, bits, -(bits + SIGN_BIT))
    ids = torch.arange(start, start + logits.shape[1], device=logits.device)
    return ordered.mul_(1 << 32).add_(LOW_HALF - ids)


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(ids int64, logits fp32) of keys."""
    ordered = keys >> 32
    bits = torch.where(ordered >= 0, ordered, -ordered - SIGN_BIT)
    return LOW_HALF - (keys & LOW_HALF), bits.to(torch.int32).view(torch.float32)


def _draws_of(logits: Tensor, labels: Tensor, uniforms: Tensor, exponent: float,
              layout: VocabLayout) -> Draws:
    shard, width = layout.shard, logits.shape[1]
    (peak, rest), label_log_p = _normalised(logits, labels, layout)
    # Sums over this rank's rows of exp(exponent · (logit - peak)).
    sums = (logits.double().sub_(peak[:, None].double()).mul_(exponent).exp_().cumsum_(-1)
            if width else torch.zeros(len(logits), 1, dtype=torch.float64, device=logits.device))
    totals = shard.gather(sums[:, -1].contiguous())
    ends = totals.cumsum(0)
    places = (uniforms * ends[-1][:, None])[None].expand(len(ends), -1, -1)
    # The shard that a place is in: the first whose end is beyond it, else the last with any mass.
    last = (totals > 0).cumsum(0).argmax(0)
    owner = torch.minimum((places >= ends[..., None]).sum(0), last[:, None])
    number = _number_of(shard)
    begin = ends[number] - totals[number]
    mine = owner == number
    inside = torch.minimum(places[0] - begin[:, None],
                           torch.nextafter(sums[:, -1:], torch.zeros_like(sums[:, -1:])))
    index = torch.searchsorted(sums, inside.contiguous(), right=True).clamp(max=max(width - 1, 0))
    found = torch.full((2, *index.shape), -torch.inf, dtype=torch.float64, device=logits.device)
    if width:
        found[0] = torch.where(mine, index + shard.start, -torch.inf)
        found[1] = torch.where(mine, logits.gather(1, index), -torch.inf)
    drawn, values = shard.gather(found).amax(0)
    log_p = (values - peak[:, None] - rest[:, None]).float()
    ids, counts, log_p = _merged(drawn.long(), log_p)
    return Draws(ids, counts, log_p, (ends[-1].log() - exponent * rest.double()).float(),
                 label_log_p)


def _number_of(shard: VocabShard) -> int:
    """This rank's number in the shard's group."""
    return 0 if shard.group is None else torch.distributed.get_rank(shard.group)


def _merged(drawn: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distinct ids, rising, then -1; how often each; their log p, then -inf), [n, N] each."""
    drawn, order = drawn.sort(-1)
    is_first = torch.ones_like(drawn, dtype=torch.bool)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = is_first.cumsum(-1) - 1
    ids = torch.full_like(drawn, -1).scatter_(1, place, drawn)
    counts = torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))
    merged = torch.full_like(log_p, -torch.inf).scatter_(1, place, log_p.gather(1, order))
    return ids, counts, merged
