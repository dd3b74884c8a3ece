"""One chunk of a source into one shard: rows of text into an Arrow file of rows of token ids.

A chunk becomes a shard by itself, so any process can write any shard and the bytes do not depend
on the writer. The price is one shorter row, half of one on average, at each shard's end. A shard
in progress is locked, and its counts are written last: a shard that has them is finished. Each row
carries a checksum, so damage is noticed when the row is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from amid_ds.config.recipe import Source
from amid_ds.data.arrow_shard import file_sha256, flat_array, list_array, row_checksum
from amid_ds.data.encode import SourcePacker
from amid_ds.data.joints import CONTEXT
from amid_ds.data.manifest import ShardCounts, read_shard_counts, write_json
from amid_ds.data.pack import PackedRow, PackingCounts, SourceDocument
from amid_ds.data.readers import (
    TEXT_FORMATS,
    DataFile,
    FileSpan,
    RawRow,
    batched_by_size,
    file_format,
    text_before_span,
)
from amid_ds.data.sources import read_checked_rows, shard_spans, span_row_location

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from transformers import PreTrainedTokenizerBase

# A source is cut into about 64 chunks, or more if they would be larger than MAX_CHUNK bytes.
CHUNKS_PER_SOURCE = 64
MIN_CHUNK, MAX_CHUNK = 1 << 20, 64 << 20
# Tokens per record batch of an Arrow file.
ARROW_BATCH_TOKENS = 1 << 20


@dataclass(frozen=True)
class SourceChunk:
    """The part of a source that becomes one shard. number: counts over all sources."""

    number: int
    source: int
    spans: tuple[FileSpan, ...]

    @property
    def name(self) -> str:
        return f"{self.number:06d}"

    @property
    def size(self) -> int:
        return sum(span.size for span in self.spans)


@dataclass(frozen=True)
class ShardWriter:
    """Everything that a process needs to turn chunks into shards. It is sent to worker processes.

    isolate: by source, True if its documents do not attend to one another; folder: of the shards;
    stop: an event that, once set, ends the work between two batches of texts.
    """

    sources: Sequence[Source]
    isolate: Sequence[bool]
    seq_length: int
    on_bad_row: str
    tokenizer: PreTrainedTokenizerBase
    token_dtype: Literal["uint16", "uint32"]
    folder: Path
    stop: Event | None = None

    def write(self, chunk: SourceChunk, wait: bool) -> int | None:
        """Write one shard unless it is finished, and return its number of predicted tokens.

        While another process writes it: wait for it, or, without `wait`, return None.
        """
        path = self.folder / f"{chunk.name}.json"
        with _locked(path.with_suffix(".lock"), wait) as locked:
            if not locked:
                return None
            if not path.exists():
                write_json(path, self._write_rows(chunk, path.with_suffix(".arrow")))
        return read_shard_counts(path)["tokens"]

    def _write_rows(self, chunk: SourceChunk, path: Path) -> ShardCounts:
        """Write the chunk's rows to `path`, all or nothing, and return the shard's counts."""
        counts = PackingCounts()
        rows = self._rows(chunk, counts)
        temporary = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
        write_shard_rows(temporary, rows, np.dtype(self.token_dtype), counts)
        size, digest = temporary.stat().st_size, file_sha256(temporary)
        os.replace(temporary, path)
        return {"source": chunk.source, "rows": counts.rows, "places": counts.inputs,
                "tokens": counts.tokens, "documents": counts.documents,
                "truncated": counts.truncated, "dropped": counts.dropped,
                "skipped": counts.skipped, "shown": counts.shown,
                "noted": {name: count for name, count in counts.noted.items() if count},
                "lines": counts.lines, "bytes": size, "sha256": digest}

    def _rows(self, chunk: SourceChunk, counts: PackingCounts) -> Iterator[PackedRow]:
        source = self.sources[chunk.source]
        packer = SourcePacker(source, self.isolate[chunk.source], self.seq_length, self.on_bad_row,
                              self.tokenizer, self.stop)

        def documents() -> Iterator[SourceDocument]:
            for span in chunk.spans:
                lines = 0

                def rows(span: FileSpan = span) -> Iterator[RawRow]:
                    nonlocal lines
                    for row in read_checked_rows(span, source, packer.columns):
                        lines += row.line_count
                        yield row

                location_of = functools.partial(span_row_location, span)
                before = ""
                if file_format(span.path) in TEXT_FORMATS:
                    before = text_before_span(span, CONTEXT)
                yield from packer.documents(rows(), span.file, location_of, counts, before)
                counts.lines.append((span.file, lines))

        return packer.pack(documents(), counts)


def plan_chunks(files: Sequence[Sequence[DataFile]]) -> Iterator[SourceChunk]:
    """The chunks of all sources, in order. files: each source's."""
    numbers = itertools.count()
    for source, its_files in enumerate(files):
        size = sum(os.path.getsize(file.path) for file in its_files)
        target = min(max(size // CHUNKS_PER_SOURCE, MIN_CHUNK), MAX_CHUNK)
        for spans in shard_spans(its_files, target):
            yield SourceChunk(next(numbers), source, tuple(spans))


def write_shard_rows(path: Path, rows: Iterable[PackedRow], dtype: np.dtype[Any],
                     counts: PackingCounts) -> None:
    """Write rows as an Arrow stream, about ARROW_BATCH_TOKENS at a time, and count them.

    dtype: of the token ids. The column names are those of the first version: `learn` holds the
    loss_spans, `begins` the doc_starts.
    """
    schema = pa.schema([("tokens", pa.list_(pa.from_numpy_dtype(dtype))),
                        ("learn", pa.list_(pa.int32())), ("begins", pa.list_(pa.int32())),
                        ("file", pa.int32()), ("line", pa.int64()), ("crc", pa.uint32())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batched_by_size(rows, lambda row: len(row.tokens), ARROW_BATCH_TOKENS):
            tokens = [np.array(row.tokens, dtype) for row in batch]
            loss_spans = [np.array(row.loss_spans, np.int32) for row in batch]
            doc_starts = [np.array(row.doc_starts, np.int32) for row in batch]
            counts.rows += len(batch)
            counts.inputs += sum(len(row.tokens) - 1 for row in batch)
            counts.tokens += sum(int(np.sum(spans[1::2] - spans[::2])) for spans in loss_spans)
            crcs = map(row_checksum, tokens, loss_spans, doc_starts)
            writer.write_batch(pa.record_batch([
                list_array(tokens), list_array(loss_spans), list_array(doc_starts),
                flat_array(np.array([row.file for row in batch], np.int32)),
                flat_array(np.array([row.line for row in batch], np.int64)),
                flat_array(np.fromiter(crcs, np.uint32))], schema=schema))


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of `path`; yields False if another process has it.

    The operating system frees the lock when its holder dies.
    """
    with open(path, "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
