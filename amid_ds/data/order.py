"""The row that each sample of a run reads, as a pure function of row counts, weights and seed.

A shuffled list of 10^12 rows fits nowhere, and a shuffle buffer has to be saved and replayed. Here
nothing is stored: sample 10^12 costs as much as sample 0, every rank of any layout computes its
own samples, and a resumed run needs only its step. Samples are assigned to the sources by
cumulative quotas. Within a source every epoch is a keyed permutation of its rows: a Feistel
network over the next power of four, applied again until the result is below the row count (Black
and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So each row is read exactly once per
epoch. The price is the arithmetic per sample, and reads that jump across the prepared files.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from amid_ds.config.schedule import SPLITMIX64_GAMMA, splitmix64

UInt64Array = NDArray[np.uint64]
Int64Array = NDArray[np.int64]

FEISTEL_ROUNDS = 6


def permute_indices(indices: Int64Array, size: int, keys: UInt64Array) -> Int64Array:
    """Map each index [B] below `size` through the permutation of range(size) that its key names.

    Indices under one key keep distinct. O(B) time and memory for any `size`.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    out = np.asarray(indices, dtype=np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    # The network permutes at most 4 × size values, so this ends after fewer than four rounds on
    # average.
    while outside.any():
        out[outside] = _feistel_network(out[outside], keys[outside], half_bits, half_mask)
        outside = out >= np.uint64(size)
    return out.astype(np.int64)


def _feistel_network(values: UInt64Array, keys: UInt64Array, half_bits: np.uint64,
                     half_mask: np.uint64) -> UInt64Array:
    left, right = values >> half_bits, values & half_mask
    for number in range(FEISTEL_ROUNDS):
        round_keys = _mix(keys + np.uint64(number))
        left, right = right, left ^ (_mix(right ^ round_keys) & half_mask)
    return (left << half_bits) | right


def _mix(values: UInt64Array) -> UInt64Array:
    """SplitMix64's next output after each of the states `values`, so that 0 is no fixed point."""
    return splitmix64(values + np.uint64(SPLITMIX64_GAMMA))


def assign_source(samples: Sequence[int], weights: Sequence[float]) -> list[tuple[int, int]]:
    """(source, number of earlier samples of that source) of each sample number.

    Sources are split off one after another: of the first m samples that reach source k, it gets
    ⌊m · share⌋, where share is its weight over the weights still left. So after any number of
    samples every source has had its share to within the number of sources, and the count needs no
    history. Exact fractions: no drift.
    """
    shares = _remaining_shares(weights)
    return [_assign_one(sample, shares) for sample in samples]


def samples_per_source(samples: int, weights: Sequence[float]) -> list[int]:
    """Number of samples of each source among the first `samples` samples."""
    counts = []
    for share in _remaining_shares(weights):
        counts.append(samples * share.numerator // share.denominator)
        samples -= counts[-1]
    return counts


def _remaining_shares(weights: Sequence[float]) -> list[Fraction]:
    """Each source's weight over the sum of its own and all later weights; the last is 1."""
    exact = [Fraction(weight) for weight in weights]
    return [weight / sum(exact[k:]) for k, weight in enumerate(exact)]


def _assign_one(sample: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    for source, share in enumerate(shares):
        earlier = sample * share.numerator // share.denominator
        if (sample + 1) * share.numerator // share.denominator > earlier:
            return source, earlier
        sample -= earlier
    raise AssertionError("the last source's share is 1")


def rows_for_samples(samples: Sequence[int], counts: Sequence[int], weights: Sequence[float],
                     seed: int) -> Int64Array:
    """Row numbers [B] that the samples read.

    counts: rows of each source. The rows of a source are numbered after those of the sources
    before it.
    """
    first_row = np.concatenate([[0], np.cumsum(counts)])
    out = np.empty(len(samples), dtype=np.int64)
    assigned = np.array(assign_source(samples, weights), dtype=np.int64).reshape(-1, 2)
    for source, count in enumerate(counts):
        selected = assigned[:, 0] == source
        epochs, indices = np.divmod(assigned[selected, 1], count)
        keys = _mix(_mix(np.full(len(epochs), seed, np.uint64)) ^ np.uint64(source))
        keys = _mix(keys ^ epochs.astype(np.uint64))
        out[selected] = first_row[source] + permute_indices(indices, count, keys)
    return out
