"""What is known of a token beside its loss, and the numbers per token that follow from it.

A measure is a sum over the vocabulary of both models' tempered distributions. It is reported (a
statistic), or it sets a number of the objective token by token: `PerToken`. A block's measures take
one reading of its logits and one collective (block.py); what a sequence's tokens decide together
needs the measures of all blocks first (fused.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.errors import InputError
from amid_ds.losses.divergences import finite_number

# Entropies and KL(p‖q) in nats; the teacher's probability of the label, 0 without one; Σ min(p, q).
MEASURES = ("teacher_entropy", "student_entropy", "divergence", "label_probability", "overlap")
# agreement: 1 where both models' first choices are the same id, else 0.
STATISTICS = (*MEASURES, "agreement")
# What top · length may be above a whole number by rounding, and still be that number.
ROUNDING = 1e-9


@dataclass(frozen=True)
class PerToken:
    """A number of the objective that follows from a measure of the token; a constant for gradients.

    by: one of MEASURES.
    linear, at: the value goes in a straight line from linear[0] at at[0] to linear[1] at at[1], and
        is constant outside; an infinite divergence is beyond `at`.
    top: instead of these two, for `token_weight` alone: 1 for the share `top` of a sequence's
        tokens that the measure is highest for (ceil(top · tokens); the earlier of equals), else 0.
    over: `sequence` takes the measure's mean over the sequence's tokens first.
    Tokens of weight 0 do not count in a sequence. Raises InputError for anything else.
    """

    by: str
    linear: tuple[float, float] = (0.0, 1.0)
    at: tuple[float, float] = (0.0, 1.0)
    top: float | None = None
    over: str = "token"

    def __post_init__(self) -> None:
        if self.by not in MEASURES:
            raise InputError(f"by={self.by!r}", f"one of {', '.join(MEASURES)}",
                             "name the measure that the number follows")
        for name in ("linear", "at"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        if not self.at[0] < self.at[1]:
            raise InputError(f"at={list(self.at)}", "two rising values of the measure",
                             "swap both `at` and `linear`")
        if self.over not in ("token", "sequence"):
            raise InputError(f"over={self.over!r}", "token or sequence", "token is the default")
        if self.top is None:
            return
        if not 0 < finite_number("top", self.top) <= 1:
            raise InputError(f"top={self.top}", "a share above 0, at most 1",
                             "1 takes every token")
        if (self.linear, self.at, self.over) != ((0.0, 1.0), (0.0, 1.0), "token"):
            raise InputError(f"top={self.top} beside linear, at or over", "top alone",
                             "top gives 1 or 0 within each sequence; leave the others out")

    @property
    def needs_sequences(self) -> bool:
        """True if the value follows from more than the token itself."""
        return self.top is not None or self.over == "sequence"

    def values(self, measure: Tensor) -> Tensor:
        """[n] values of tokens with this measure [n] (or its sequence's mean), in its dtype."""
        (low, high), (start, end) = self.at, self.linear
        share = ((measure - low) / (high - low)).clamp(0, 1)
        # Exact at both ends, as torch.lerp is.
        return torch.where(share < 0.5, start + share * (end - start),
                           end - (1 - share) * (end - start))

    def values_in_sequences(self, measure: Tensor, sequences: Tensor, counts: Tensor) -> Tensor:
        """[N] values, of all tokens of the `sequences` [N]; counts [N]: False for weight 0."""
        if self.top is None:
            return self.values(sequence_means(measure, sequences, counts))
        return in_top_share(measure, sequences, counts, self.top)


def sequence_means(measure: Tensor, sequences: Tensor, counts: Tensor) -> Tensor:
    """[N] the mean of the measure over the tokens of each token's sequence that count.

    measure [N], sequences [N] any integers, counts [N] bool. In fp64 and in the tokens' order, so
    that it depends on no block; 0/0 = NaN for a sequence without a token that counts.
    """
    order = sequences.argsort(stable=True)
    number = _segments(sequences[order])
    kept = counts[order]
    parts = torch.stack([torch.where(kept, measure[order].double(), 0.0), kept.double()], -1)
    # With accumulate=True it adds in a fixed order on a GPU too; index_add does not.
    sums = torch.zeros_like(parts).index_put_((number,), parts, accumulate=True)
    means = torch.empty_like(sums[:, 0])
    means[order] = (sums[:, 0] / sums[:, 1])[number]
    return means.to(measure.dtype)


def in_top_share(measure: Tensor, sequences: Tensor, counts: Tensor, share: float) -> Tensor:
    """[N] 1 for the `share` of each sequence with the highest measure, else 0; NaN stays NaN.

    ceil(share · tokens that count) of them, the earlier of equals; 0 for one that does not count.
    """
    falling = torch.where(counts, measure, -torch.inf).argsort(stable=True, descending=True)
    order = falling[sequences[falling].argsort(stable=True)]
    number, kept = _segments(sequences[order]), counts[order].double()
    lengths = torch.zeros_like(kept).index_put_((number,), kept, accumulate=True)[number]
    place = torch.arange(len(order), device=order.device)
    first = torch.ones_like(place, dtype=torch.bool)
    first[1:] = number[1:] != number[:-1]
    rank = place - torch.where(first, place, 0).cummax(0).values
    wanted = (share * lengths - ROUNDING).ceil()
    chosen = torch.empty_like(measure)
    # Those that do not count are behind all that do.
    chosen[order] = (rank < wanted).to(measure.dtype)
    return torch.where(measure.isnan(), measure, chosen)


def first_choices(logits: list[Tensor], shard: VocabShard) -> tuple[Tensor, Tensor]:
    """(ids int64, their logits float64), [m, n] each: the highest in each of m logits [n, width].

    The lowest id among equals; a NaN is higher than any number. The same on every rank; one
    collective.
    """
    rows, device = logits[0].shape[0], logits[0].device
    # The best logit and its id; a shard may be empty.
    best = torch.full((2, len(logits), rows), -torch.inf, dtype=torch.float64, device=device)
    for model, raw in enumerate(logits):
        if raw.shape[1]:
            peak, index = raw.max(-1)
            best[0, model], best[1, model] = peak, index + shard.start
    shards = shard.gather(best)
    first = shards[:, 0].argmax(0, keepdim=True)
    peaks, ids = (shards[:, part].gather(0, first)[0] for part in (0, 1))
    return ids.long(), peaks


def _segments(ordered: Tensor) -> Tensor:
    """[N] the number, from 0, of each run of equal integers in `ordered` [N]."""
    changes = torch.zeros_like(ordered)
    changes[1:] = ordered[1:] != ordered[:-1]
    return changes.cumsum(0)


def _pair(name: str, values: object) -> tuple[float, float]:
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise InputError(f"{name}={values!r}", "two numbers", f"e.g. {name}=[0.0, 1.0]")
    first, second = (float(finite_number(name, value)) for value in values)
    return first, second
