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
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from amid_ds.data.batch import Batch, TokenRow, collate_rows
from amid_ds.data.manifest import (
    PREPARED_MANIFEST,
    first_row,
    read_prepared_manifest,
    shard_path,
)
from amid_ds.data.readers import row_location
from amid_ds.data.shard import damaged_shard, require_shard_size, row_checksum
from amid_ds.errors import InputError
from amid_ds.losses import IGNORE_INDEX

# Memory-mapped at once.
OPEN_SHARDS = 4096


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
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(_MappedShard)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, number: int) -> TokenRow:
        """Row `number`. Raises InputError for a shard that is damaged there."""
        index = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shards[index]
        row_in_shard = number - int(self._ends[index]) + shard["rows"]
        path = shard_path(self.folder, shard["name"])
        try:
            tokens, loss_spans, doc_starts, file, line, crc = \
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


class _MappedShard:
    """One memory-mapped shard: numpy views of its columns, by record batch."""

    def __init__(self, path: Path, size: int) -> None:
        require_shard_size(path, size)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            batches = list(reader)
        # A wrong size or offset would lead outside the file's memory. Reads no token.
        for batch in batches:
            batch.validate(full=True)
        self._ends = np.cumsum([batch.num_rows for batch in batches])
        self._batches = [([_list_views(batch[name]) for name in ("tokens", "learn", "begins")],
                          [_view(batch[name]) for name in ("file", "line", "crc")])
                         for batch in batches]

    def row(self, number: int) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int32],
                                        int, int, int]:
        """(tokens, loss spans, document starts, file, line, checksum) of one row."""
        index = int(np.searchsorted(self._ends, number, side="right"))
        lists, columns = self._batches[index]
        number -= int(self._ends[index]) - len(columns[0])
        tokens, loss_spans, doc_starts = (values[offsets[number]:offsets[number + 1]]
                                          for values, offsets in lists)
        file, line, crc = (int(column[number]) for column in columns)
        return tokens, loss_spans, doc_starts, file, line, crc


def _list_views(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[np.int32]]:
    return _view(column.values), _view(column.offsets)


def _view(column: pa.Array) -> NDArray[Any]:
    """The same memory as a numpy array. `to_numpy` would import pandas first."""
    return np.from_dlpack(column)
