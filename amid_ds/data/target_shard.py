"""A row's kept part of the teacher's distributions, as the bytes of a shard and back.

Columns of one row with n labelled positions and m entries (topk: m = n·K; sample: the distinct
ids of all positions):

    ids     m × uint8 or uint16    the low bits of the ids
    high    bytes                  of a vocabulary above 65536: the bits above, plane after plane of
                                   ⌈m / 8⌉ bytes, so an id takes ⌈log2 V⌉ bits
    log_p   m × fp16               log p of each; fp32 where K is the whole vocabulary
    rest    n × the same           topk: log of the mass outside
    label   n × the same           log p of the position's own next token
    counts  m × uint8 or uint16    sample: how often it was drawn
    sizes   n × the same           sample: distinct ids of each position
    scale   n × fp32               sample: log Σ p^s

fp16 has 11 significant bits: log p is off by at most |log p| · 2^-11, which is a factor of p of at
most 1 ± 0.0005 |log p|, and the mean of that under p is at most 0.0005 times its entropy. Rounding
is to nearest, so it has no direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from amid_ds.data.arrow_shard import MappedShard, flat_array, list_array, row_checksum
from amid_ds.data.readers import batched_by_size

LISTS = ("ids", "high", "log_p", "rest", "label", "counts", "sizes", "scale")
CHECKSUM = "crc"
# Entries per record batch of an Arrow file.
ARROW_BATCH_ENTRIES = 1 << 22
LARGEST_FP16 = 65504.0
# Of a row beside its positions: the places of its lists, and its checksum.
ROW_BYTES = 36

# A row's arrays, in the order of LISTS.
EncodedRow = tuple[NDArray[Any], ...]


class SelectedRow(NamedTuple):
    """What is kept of a row with n labelled positions.

    ids: [n, K] int64, each id once in a position, -1: no entry.
    log_p: [n, K] fp32; label_log_p: [n] fp32, of the position's own next token.
    log_rest: [n] fp32, topk: log of the mass outside.
    counts: [n, K] integers, sample: draws of each id; log_proposal_sum: [n] fp32, log Σ p^s.
    """

    ids: NDArray[np.int64]
    log_p: NDArray[np.float32]
    label_log_p: NDArray[np.float32]
    log_rest: NDArray[np.float32] | None = None
    counts: NDArray[np.int64] | None = None
    log_proposal_sum: NDArray[np.float32] | None = None


class TargetLayout(NamedTuple):
    """The numbers' sizes in a shard.

    entries: K, or the number of draws; sampled: of which method they are.
    """

    vocab_size: int
    entries: int
    sampled: bool

    @property
    def high_bits(self) -> int:
        """Bits of an id beyond those of `id_type`."""
        return max(0, (self.vocab_size - 1).bit_length() - 16)

    @property
    def id_type(self) -> np.dtype[Any]:
        """Of an id's low bits."""
        return _least_integer(min(self.vocab_size - 1, (1 << 16) - 1))

    @property
    def count_type(self) -> np.dtype[Any]:
        """Of a number of draws."""
        return _least_integer(self.entries)

    @property
    def log_type(self) -> np.dtype[Any]:
        """Of a log-probability: nothing is rounded where nothing is left out."""
        whole = self.entries == self.vocab_size and not self.sampled
        return np.dtype(np.float32 if whole else np.float16)

    @property
    def position_bytes(self) -> float:
        """Bytes of a position: of topk exactly, of sample at most (all draws distinct).

        A row has ROW_BYTES more.
        """
        log = self.log_type.itemsize
        entry = self.id_type.itemsize + self.high_bits / 8 + log
        if not self.sampled:
            return self.entries * entry + 2 * log
        count = self.count_type.itemsize
        return self.entries * (entry + count) + count + log + np.dtype(np.float32).itemsize


def _least_integer(largest: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if largest < 1 << 8 else np.uint16)


def encode_targets(row: SelectedRow, layout: TargetLayout) -> EncodedRow:
    """The row's arrays as a shard has them."""
    kept = row.ids >= 0
    ids = row.ids[kept]
    high = [np.packbits((ids >> bit & 1).astype(np.uint8))
            for bit in range(16, 16 + layout.high_bits)]
    none = np.zeros(0, layout.count_type)
    counts, sizes = none, none
    if row.counts is not None:
        counts = row.counts[kept].astype(layout.count_type)
        sizes = kept.sum(-1).astype(layout.count_type)
    scale = row.log_proposal_sum
    return ((ids & 0xFFFF).astype(layout.id_type),
            np.concatenate(high) if high else np.zeros(0, np.uint8),
            _rounded(row.log_p[kept], layout),
            _rounded(np.zeros(0) if row.log_rest is None else row.log_rest, layout),
            _rounded(row.label_log_p, layout), counts, sizes,
            np.zeros(0, np.float32) if scale is None else scale.astype(np.float32))


def position_count(row: EncodedRow) -> int:
    """The labelled positions of a row."""
    return len(row[LISTS.index("label")])


def _rounded(values: NDArray[Any], layout: TargetLayout) -> NDArray[Any]:
    """To nearest. A log-probability that is none of zero stays none of zero."""
    if layout.log_type == np.float16:
        values = np.where(np.isfinite(values), np.maximum(values, -LARGEST_FP16), values)
    return values.astype(layout.log_type)


def decode_targets(columns: Sequence[NDArray[Any]], layout: TargetLayout) -> SelectedRow:
    """The row of its arrays, log-probabilities as they were rounded."""
    low, high, log_p, rest, label, counts, sizes, scale = columns
    ids = low.astype(np.int64)
    for bit, plane in enumerate(np.split(high, layout.high_bits) if layout.high_bits else (), 16):
        ids |= np.unpackbits(plane, count=len(ids)).astype(np.int64) << bit
    positions = len(label)
    label = label.astype(np.float32)
    if not layout.sampled:
        shape = positions, layout.entries
        return SelectedRow(ids.reshape(shape), log_p.astype(np.float32).reshape(shape), label,
                           rest.astype(np.float32))
    widest = int(sizes.max(initial=0))
    kept = np.arange(widest) < sizes[:, None]
    padded: list[NDArray[Any]] = []
    for values, dtype, empty in ((ids, np.int64, -1), (log_p, np.float32, -np.inf),
                                 (counts, np.int64, 0)):
        whole = np.full(kept.shape, empty, dtype)
        whole[kept] = values
        padded.append(whole)
    return SelectedRow(padded[0], padded[1], label, counts=padded[2],
                       log_proposal_sum=scale.astype(np.float32))


def write_target_rows(path: Path, rows: Iterable[EncodedRow], layout: TargetLayout) -> None:
    """Write rows as an Arrow stream, about ARROW_BATCH_ENTRIES entries at a time."""
    dtypes = (layout.id_type, np.uint8, layout.log_type, layout.log_type, layout.log_type,
              layout.count_type, layout.count_type, np.float32)
    schema = pa.schema([*((name, pa.list_(pa.from_numpy_dtype(dtype)))
                          for name, dtype in zip(LISTS, dtypes, strict=True)),
                        (CHECKSUM, pa.uint32())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batched_by_size(rows, lambda row: len(row[0]), ARROW_BATCH_ENTRIES):
            checksums = np.array([row_checksum(*row) for row in batch], np.uint32)
            columns = [list_array(list(column)) for column in zip(*batch, strict=True)]
            writer.write_batch(pa.record_batch([*columns, flat_array(checksums)], schema=schema))


class TargetShard:
    """A memory-mapped shard of targets. Raises InputError for one that is not `size` bytes."""

    def __init__(self, path: Path, size: int, layout: TargetLayout) -> None:
        self._mapped, self.layout = MappedShard(path, size, LISTS, (CHECKSUM,)), layout

    def row(self, number: int) -> SelectedRow:
        """One of its rows. Raises ValueError for one that is damaged."""
        columns, (checksum,) = self._mapped.row(number)
        if row_checksum(*columns) != checksum:
            raise ValueError(f"the checksum of its row {number} is wrong")
        return decode_targets(columns, self.layout)
