"""One chunk of a source into one shard: rows of text in, rows of tokens in a memory-mapped Arrow file out.

A chunk becomes a shard by itself, so any process can make any shard and the bytes do not depend on who made it. The
price is one shorter row, half of one on average, at each shard's end. A shard in the making is locked, and its counts
are written last: a shard that has them is done. Each row carries a checksum, so damage is found where it is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from amid_ds.config import recipe
from amid_ds.data.encode import Packer
from amid_ds.data.pack import Counts, Document, Packed
from amid_ds.data.readers import Row, Span, by_size
from amid_ds.data.sources import name_of, read_span, shards_of
from amid_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_CHUNK, MAX_CHUNK, CHUNKS = 1 << 20, 64 << 20, 64      # bytes of input per shard; a source has about 64 and more
BATCH_TOKENS = 1 << 20              # written at once


@dataclass(frozen=True)
class Chunk:
    """What becomes one shard."""

    number: int
    source: int
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        return f"{self.number:06d}"

    @property
    def size(self) -> int:
        return sum(span.size for span in self.spans)


@dataclass(frozen=True)
class Maker:
    """All that a process needs to turn chunks into shards."""

    sources: Sequence[recipe.Source]
    isolate: Sequence[bool]         # by source: whether its documents are kept from one another
    seq_length: int
    on_bad_row: str
    tokenizer: PreTrainedTokenizerBase
    token_dtype: Literal["uint16", "uint32"]
    folder: Path
    stop: Any = None                # an event that, once set, ends the work between two batches of texts

    def make(self, chunk: Chunk, wait: bool) -> int | None:
        """Make one shard unless it is there: its tokens, or None where another job is at it and `wait` is False."""
        counted = self.folder / f"{chunk.name}.json"
        with _locked(counted.with_suffix(".lock"), wait) as mine:
            if not mine:
                return None
            if not counted.exists():                      # a shard is done when its counts are there
                write_json(counted, self._write(chunk, counted.with_suffix(".arrow")))
        done = read_json(counted)
        assert done is not None
        return int(done["tokens"])

    def _write(self, chunk: Chunk, path: Path) -> dict[str, Any]:
        """Write the chunk's rows to `path`, whole or not at all; what the shard is made of."""
        counts = Counts()
        rows = self._rows(chunk, counts)
        temporary = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
        write_rows(temporary, rows, np.dtype(self.token_dtype), counts)
        size, digest = temporary.stat().st_size, _sha256(temporary)
        os.replace(temporary, path)
        return {"source": chunk.source, **vars(counts), "bytes": size, "sha256": digest}

    def _rows(self, chunk: Chunk, counts: Counts) -> Iterator[Packed]:
        source = self.sources[chunk.source]
        packer = Packer(source, self.isolate[chunk.source], self.seq_length, self.on_bad_row, self.tokenizer, self.stop)

        def documents() -> Iterator[Document]:
            for span in chunk.spans:
                lines = 0

                def rows(span: Span = span) -> Iterator[Row]:
                    nonlocal lines
                    for row in read_span(span, source):
                        lines += row.count
                        yield row

                yield from packer.documents(rows(), span.file, functools.partial(name_of, span), counts)
                counts.lines.append((span.file, lines))

        return packer.pack(documents(), counts)


def chunks_of(files: Sequence[Sequence[str]]) -> Iterator[Chunk]:
    number = itertools.count()
    for source, paths in enumerate(files):
        target = min(max(sum(map(os.path.getsize, paths)) // CHUNKS, MIN_CHUNK), MAX_CHUNK)
        for spans in shards_of(paths, target):
            yield Chunk(next(number), source, tuple(spans))


def write_rows(path: Path, rows: Iterable[Packed], dtype: np.dtype[Any], counts: Counts) -> None:
    """Write the rows as an Arrow stream, about BATCH_TOKENS at a time, and count them."""
    token_type = pa.list_(pa.from_numpy_dtype(dtype))
    schema = pa.schema([("tokens", token_type), ("learn", pa.list_(pa.int32())),
                        ("begins", pa.list_(pa.int32())), ("file", pa.int32()), ("line", pa.int64()),
                        ("crc", pa.uint32())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in by_size(rows, lambda row: len(row.tokens), BATCH_TOKENS):
            counts.rows += len(batch)
            tokens = [np.array(row.tokens, dtype) for row in batch]
            learn, begins = ([np.array(places, np.int32) for places in kind]
                             for kind in ([row.learn for row in batch], [row.begins for row in batch]))
            counts.places += sum(len(row.tokens) - 1 for row in batch)
            counts.tokens += sum(int(np.sum(spans[1::2] - spans[::2])) for spans in learn)
            writer.write_batch(pa.record_batch([
                _list_array(tokens), _list_array(learn), _list_array(begins),
                pa.array([row.file for row in batch], pa.int32()), pa.array([row.line for row in batch], pa.int64()),
                pa.array(map(checksum, tokens, learn, begins), pa.uint32())], schema=schema))


def require_size(path: Path, size: int) -> None:
    """Raise InputError unless the shard has the bytes that the manifest says. Damage inside is the rows' affair."""
    found = f"{path.stat().st_size} bytes" if path.exists() else "no file"
    if found != f"{size} bytes":
        raise damaged(path, f"it has {found} of {size} bytes")


def require_intact(path: Path, sha256: str) -> None:
    """Raise InputError unless the shard has the checksum that the manifest says. Reads it whole."""
    if _sha256(path) != sha256:
        raise damaged(path, "it does not have the checksum that it was written with")


def damaged(path: Path, what: str) -> InputError:
    return InputError(f"the shard {path} is damaged: {what}", "what was written",
                      f"remove {path.with_suffix('.json')} and the manifest beside {path.parent}, and prepare again")


def checksum(*columns: NDArray[Any]) -> int:
    return functools.reduce(lambda crc, column: zlib.crc32(column.tobytes(), crc), columns, 0)


def _list_array(rows: Sequence[NDArray[Any]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of `path`: False where another process has it. The lock goes when its holder dies, however."""
    with open(path, "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return loaded


def write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
