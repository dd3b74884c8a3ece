"""A shard: an Arrow file of rows of numbers that is read memory-mapped, with a checksum a row.

Rows are read in random order from files far larger than memory, from several threads: a row costs
one copy, and the operating system's page cache decides what stays in memory.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from amid_ds.errors import InputError

# Memory-mapped at once, by a reader.
OPEN_SHARDS = 4096


class MappedShard:
    """One memory-mapped shard: numpy views of its columns, by record batch.

    lists, numbers: the names of its columns of lists, and of those of one number a row.
    """

    def __init__(self, path: Path, size: int, lists: Sequence[str], numbers: Sequence[str]) -> None:
        require_shard_size(path, size)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            batches = list(reader)
        # A wrong size or offset would lead outside the file's memory. Reads no token.
        for batch in batches:
            batch.validate(full=True)
        self._ends = np.cumsum([batch.num_rows for batch in batches])
        self._batches = [([_list_views(batch[name]) for name in lists],
                          [_view(batch[name]) for name in numbers]) for batch in batches]

    def row(self, number: int) -> tuple[list[NDArray[Any]], list[int]]:
        """(lists, numbers) of one row, in the order of the names."""
        index = int(np.searchsorted(self._ends, number, side="right"))
        lists, numbers = self._batches[index]
        number -= int(self._ends[index]) - len(numbers[0])
        return ([values[offsets[number]:offsets[number + 1]] for values, offsets in lists],
                [int(column[number]) for column in numbers])


def _list_views(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[np.int32]]:
    return _view(column.values), _view(column.offsets)


def _view(column: pa.Array) -> NDArray[Any]:
    """The same memory as a numpy array. `to_numpy` would import pandas first."""
    return np.from_dlpack(column)


def list_array(rows: Sequence[NDArray[Any]]) -> pa.ListArray:
    """The rows [n_i] as one column of lists."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(flat_array(offsets), flat_array(np.concatenate(rows)))


def flat_array(values: NDArray[Any]) -> pa.Array:
    """The same memory as an Arrow array. `pa.array` would import pandas first."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values),
                                 [None, pa.py_buffer(values)])


def row_checksum(*columns: NDArray[Any]) -> int:
    """The CRC-32 of a row's arrays, one after another."""
    return functools.reduce(lambda crc, column: zlib.crc32(column.tobytes(), crc), columns, 0)


def require_shard_size(path: Path, size: int) -> None:
    """Raise InputError unless the shard has `size` bytes. The rows' checksums cover the inside."""
    actual = f"{path.stat().st_size} bytes" if path.exists() else "no file"
    if actual != f"{size} bytes":
        raise damaged_shard(path, f"it has {actual} of {size} bytes")


def require_shard_checksum(path: Path, sha256: str) -> None:
    """Raise InputError unless the shard has this SHA-256. Reads the whole file."""
    if file_sha256(path) != sha256:
        raise damaged_shard(path, "it does not have the checksum that it was written with")


def damaged_shard(path: Path, problem: str) -> InputError:
    """The error for a shard that is not as it was written."""
    return InputError(f"the shard {path} is damaged: {problem}", "the file as it was written",
                      f"remove {path.with_suffix('.json')} and the manifest beside {path.parent}, "
                      "and run the command again that made it: it makes this shard anew")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
