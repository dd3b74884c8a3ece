"""New values for tensors of safetensors files, put into their places: every other byte stays.

The inverse of reading by range: a weight is boxes of the files' tensors (weight_reader.py), however
its model's class has stacked, split or transposed them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from amid_ds.models.weight_files import WeightTable
from amid_ds.models.weight_reader import ParameterSource, chunks


class WeightPatcher:
    """Writes weights into a folder that holds a copy of a table's files; a context manager."""

    def __init__(self, folder: Path, table: WeightTable) -> None:
        self._paths = [folder / file.name for file in table.files]
        self._opened: dict[int, int] = {}

    def __enter__(self) -> WeightPatcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)
        self._opened.clear()

    def write(self, source: ParameterSource, value: Tensor) -> None:
        """Put `value`, of the source's shape, where its elements lie, in the file's dtype.

        Takes the memory of a chunk (READ_CHUNK_BYTES). Raises OSError.
        """
        assert tuple(value.shape) == source.shape
        for whole in source.boxes:
            for box, read in chunks(whole):
                item = box.dtype.itemsize
                raw = torch.empty(read.elements * item, dtype=torch.uint8)
                memory = memoryview(raw.numpy().data)
                spans = [(box.offset + offset * item,
                          memory[index * read.span * item:(index + 1) * read.span * item])
                         for index, offset in enumerate(read.offsets())]
                descriptor = self._descriptor(box.file)
                # A stretch may hold elements of others between its own.
                for offset, span in spans:
                    _all_of(os.preadv, descriptor, span, offset)
                piece = value[tuple(slice(start, start + size) for start, size in
                                    zip(box.starts, box.sizes, strict=True))]
                raw.view(box.dtype).as_strided(box.sizes, read.strides).copy_(piece)
                for offset, span in spans:
                    _all_of(os.pwritev, descriptor, span, offset)

    def _descriptor(self, file: int) -> int:
        if file not in self._opened:
            self._opened[file] = os.open(self._paths[file], os.O_RDWR | os.O_CLOEXEC)
        return self._opened[file]


def _all_of(move: Callable[[int, list[memoryview], int], int], descriptor: int,
            span: memoryview, offset: int) -> None:
    """Read or write a whole stretch, in as many calls as it takes."""
    while span:
        count = move(descriptor, [span], offset)
        if count == 0:
            raise OSError(f"a file ends before byte {offset}")
        span, offset = span[count:], offset + count
