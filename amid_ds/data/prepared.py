"""The rows of a prepared folder by number, memory-mapped.

A run reads its rows in random order from files far larger than memory, from several threads. The
shards are memory-mapped, so a row costs one copy and the operating system's page cache decides
what stays in memory. Each row's checksum is checked on reading: a small cost against training on
damaged tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from amid_ds.data.arrow_shard import OPEN_SHARDS, MappedShard, damaged_shard, row_checksum
from amid_ds.data.batch import Batch, TokenRow, collate_rows
from amid_ds.data.manifest import (
    PREPARED_MANIFEST,
    first_row,
    read_prepared_manifest,
    shard_path,
)
from amid_ds.data.readers import row_location
from amid_ds.errors import InputError
from amid_ds.losses import IGNORE_INDEX


class PreparedDataset:
    """The rows of a prepared folder, numbered source after source and shard after shard.

    counts: the rows of each source. Raises InputError for a folder without a manifest.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_prepared_manifest(folder)
        if manifest is None:
            raise InputError(f"the folder {folder} holds no prepared data",
                             f"a complete one, with {PREPARED_MANIFEST}",
                             "run `amid-ds prepare RECIPE`")
        self.folder = folder
        self.counts = [source["rows"] for source in manifest["sources"]]
        self._shards = manifest["shards"]
        self._files = [[(str(file[0]), first_row(file)) for file in source["files"]]
                       for source in manifest["plan"]["sources"]]
        self._ends = np.cumsum([shard["rows"] for shard in self._shards])
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(_open_shard)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, number: int) -> TokenRow:
        """Row `number`. Raises InputError for a shard that is damaged there."""
        index = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shards[index]
        row_in_shard = number - int(self._ends[index]) + shard["rows"]
        path = shard_path(self.folder, shard["name"])
        try:
            (tokens, loss_spans, doc_starts), (file, line, crc) = \
                self._open(path, shard["bytes"]).row(row_in_shard)
            if row_checksum(tokens, loss_spans, doc_starts) != crc:
                raise ValueError(f"the checksum of its row {row_in_shard} is wrong")
            name, first = self._files[shard["source"]][file]
            source = row_location(name, first + shard["first_line"][str(file)] + line)
        except InputError:
            raise
        except Exception as error:
            # Damaged bytes end pyarrow with anything.
            raise damaged_shard(path, str(error)) from None
        return TokenRow(tokens, loss_spans, doc_starts, source)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of these numbers as one micro-batch."""
        sources = np.searchsorted(np.cumsum(self.counts), numbers, side="right").tolist()
        return collate_rows([self.row(number) for number in numbers], list(numbers), sources)


def read_batches(folder: Path, batch_size: int, dp_rank: int = 0,
                 dp_size: int = 1) -> Iterator[Batch]:
    """One data-parallel rank's share of a prepared folder, each row once, for evaluation.

    Every rank gets the same number of batches, as collectives need. After the last rows a rank
    gets row 0 without labels; such a batch has no `rows`.
    """
    prepared = PreparedDataset(folder)
    for start in range(0, len(prepared), batch_size * dp_size):
        first = start + dp_rank * batch_size
        numbers = list(range(first, min(first + batch_size, len(prepared))))
        if numbers:
            yield prepared.batch(numbers)
        else:
            filler = prepared.batch([0])
            yield replace(filler, labels=torch.full_like(filler.labels, IGNORE_INDEX), rows=[],
                          sources=[])


def _open_shard(path: Path, size: int) -> MappedShard:
    return MappedShard(path, size, ("tokens", "learn", "begins"), ("file", "line", "crc"))
