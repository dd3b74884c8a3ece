"""Which row each sample of a run reads, as a pure function of (row counts, weights, seed, sample number).

No list is shuffled and nothing is remembered: sample 10^12 costs what sample 0 costs, any rank of any layout finds
its samples alone, and a resumed run goes on where it stopped because there is no place but the step. Samples are
dealt to the sources by cumulative quotas, and within a source every epoch is a keyed permutation of its rows (a
Feistel network over the next power of four, walked until it lands below the row count: Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", 2002), so each row is read exactly once per epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

UInt64s = NDArray[np.uint64]
Int64s = NDArray[np.int64]

ROUNDS = 6


def mix(values: UInt64s) -> UInt64s:
    """splitmix64's finaliser: a fixed bijection of 64-bit words that looks random."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: Int64s, size: int, keys: UInt64s) -> Int64s:
    """Where each index [B] below `size` goes under the permutation that its key [B] names. O(B) time and memory."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = np.asarray(indices, dtype=np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():                     # at most 4 × size values: fewer than four rounds on average
        out[outside] = _feistel(out[outside], keys[outside], half, mask)
        outside = out >= np.uint64(size)
    return out.astype(np.int64)


def _feistel(values: UInt64s, keys: UInt64s, half: np.uint64, mask: np.uint64) -> UInt64s:
    left, right = values >> half, values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (mix(right ^ mix(keys + np.uint64(number))) & mask)
    return (left << half) | right


def deal(samples: Sequence[int], weights: Sequence[float]) -> list[tuple[int, int]]:
    """(source, how many earlier samples that source had) of each sample number.

    Sources are split off one after another: of the first m samples that reach source k, it gets ⌊m · share⌋, where
    share is its weight over the weights still left. So after any number of samples every source has its weight's share
    of them to within the number of sources, and the count needs no history. Exact integers: no drift.
    """
    shares = _shares(weights)
    return [_deal_one(sample, shares) for sample in samples]


def dealt(samples: int, weights: Sequence[float]) -> list[int]:
    """How many of the first `samples` samples each source gets."""
    counts = []
    for share in _shares(weights):
        counts.append(samples * share.numerator // share.denominator)
        samples -= counts[-1]
    return counts


def _shares(weights: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(weight) for weight in weights]
    return [weight / sum(exact[k:]) for k, weight in enumerate(exact)]


def _deal_one(sample: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    for source, share in enumerate(shares):
        taken = sample * share.numerator // share.denominator
        if (sample + 1) * share.numerator // share.denominator > taken:
            return source, taken
        sample -= taken
    raise AssertionError("the last source's share is 1")


def rows_of(samples: Sequence[int], counts: Sequence[int], weights: Sequence[float], seed: int) -> Int64s:
    """The row [B] that each sample reads; a source's rows follow those of the sources before it."""
    first_row = np.concatenate([[0], np.cumsum(counts)])
    out = np.empty(len(samples), dtype=np.int64)
    dealt = np.array(deal(samples, weights), dtype=np.int64).reshape(-1, 2)
    for source, count in enumerate(counts):
        mine = dealt[:, 0] == source
        epochs, places = np.divmod(dealt[mine, 1], count)
        keys = mix(mix(np.full(len(epochs), seed, np.uint64)) ^ np.uint64(source))
        out[mine] = first_row[source] + permute(places, count, mix(keys ^ epochs.astype(np.uint64)))
    return out
