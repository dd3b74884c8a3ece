"""The formats that rows come in, each read in parts that any process can read alone.

A span of a line file is a range of bytes, and a line belongs to the span in which it begins; of a Parquet file, a range
of row groups; an Arrow or compressed file is one span, since it can only be read from its start. What a value must be
is not judged here, only whether a row can be had at all: one that cannot comes back with its problem.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

from amid_ds.errors import InputError

T = TypeVar("T")
LINES, TEXT, PARQUET, ARROW = (".jsonl", ".ndjson", ".json"), (".txt",), (".parquet",), (".arrow",)
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}         # of line and text files
KINDS = (*LINES, *TEXT, *PARQUET, *ARROW)
PIECE_BYTES = 1 << 18         # a text file is read, and a long text encoded, in pieces of about this size
TABLE_ROWS = 1000             # read at once from a table
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Span:
    """A part of one file: [start, stop) in bytes or row groups, and its size in bytes. `file` is its place among the
    source's files."""

    file: int
    path: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Row:
    """The values of the source's fields, or why they cannot be had. `number` counts from 0 within the span."""

    number: int
    values: tuple[Any, ...] = ()
    problem: str | None = None
    count: int = 1                           # that many lines of the file, for a piece of a text file
    begins: bool = True                      # False: the document began in an earlier row
    ends: bool = True                        # False: the document goes on in the next row


def kind_of(path: str) -> str | None:
    """One of KINDS, or None."""
    suffixes = Path(path).suffixes[-2:]
    kind = suffixes[0] if len(suffixes) == 2 and suffixes[1] in COMPRESSED else "".join(suffixes[-1:])
    return kind if kind in KINDS and (suffixes[-1] == kind or kind in (*LINES, *TEXT)) else None


def cut(file: int, path: str, target: int) -> Iterator[Span]:
    """The file in spans of about `target` bytes, in order. Raises InputError where it is no file of its kind."""
    size = os.path.getsize(path)
    if kind_of(path) in PARQUET:
        groups = _parquet(path).metadata
        for group in range(groups.num_row_groups):
            yield Span(file, path, group, group + 1, groups.row_group(group).total_byte_size)
    elif kind_of(path) in ARROW or Path(path).suffix in COMPRESSED:
        yield Span(file, path, 0, size, size)
    else:
        for start in range(0, size, target):
            stop = min(start + target, size)
            yield Span(file, path, start, stop, stop - start)


def read(span: Span, fields: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a span. Of a JSON object the `optional` fields may be missing: their values are then None."""
    kind = kind_of(span.path)
    if kind in TEXT:
        yield from _text_rows(_lines(span), span.start == 0)
    elif kind in LINES:
        for number, (line, problem, _) in enumerate(_lines(span)):
            yield Row(number, problem=problem) if problem else _json_row(number, line, fields, optional)
    else:
        batches = _parquet_batches(span, fields) if kind in PARQUET else _arrow_batches(span, fields)
        yield from _table_rows(batches, fields)


def place(path: str, number: int) -> str:
    """How a row is named to the user: lines count from 1, rows of a table from 0 as in `datasets`."""
    return f"{path} line {number + 1}" if kind_of(path) in (*LINES, *TEXT) else f"{path} row {number}"


def rows_before(span: Span) -> int:
    """How many rows of the file come before the span's. Reads a line file up to the span."""
    if kind_of(span.path) in PARQUET:
        groups = _parquet(span.path).metadata
        return sum(groups.row_group(group).num_rows for group in range(span.start))
    if span.start == 0:
        return 0
    before = 0
    with open(span.path, "rb") as file:
        left = span.start
        while left > 0 and (block := file.read(min(left, PIECE_BYTES))):
            before += block.count(b"\n")
            left -= len(block)
        file.seek(span.start - 1)            # a line that began before the span and ends in it is not the span's
        return before + (file.read(1) != b"\n")


def _open(path: str) -> IO[bytes]:
    if Path(path).suffix in COMPRESSED:
        return io.BufferedReader(pa.CompressedInputStream(path, COMPRESSED[Path(path).suffix]))
    return open(path, "rb")


def _lines(span: Span) -> Iterator[tuple[str, str | None, bool]]:
    """(line, or what is wrong with it, whether it is the file's last) of each line that begins in the span."""
    whole = Path(span.path).suffix in COMPRESSED
    try:
        with _open(span.path) as file:
            position = span.start
            if span.start > 0:               # the rest of a line that began before, or the line end just before
                file.seek(span.start - 1)
                position += len(file.readline()) - 1
            line = file.readline()
            while line and (whole or position < span.stop):
                following = file.readline()
                yield *_decode(line.removeprefix(BYTE_ORDER_MARK) if position == 0 else line), not following
                position += len(line)
                line = following
    except OSError as error:
        yield "", f"the file is damaged or cut short: {error}", False


def _decode(line: bytes) -> tuple[str, str | None]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte {line[error.start]:#04x} at position {error.start}"
    return ("", "holds a NUL byte") if "\0" in text else (text, None)


def _text_rows(lines: Iterable[tuple[str, str | None, bool]], begins: bool) -> Iterator[Row]:
    """A text file is one document, in pieces that end where a line ends. A bad line is left out of its piece."""
    piece: list[str] = []
    size = first = 0
    for number, (text, problem, last) in enumerate(lines):
        if problem is not None:
            yield Row(number, problem=problem, count=0)
        piece.append(text)
        size += len(text)
        if size >= PIECE_BYTES or last:
            yield Row(first, ("".join(piece),), count=len(piece), begins=begins, ends=last)
            piece, size, first, begins = [], 0, number + 1, False
    if piece:
        yield Row(first, ("".join(piece),), count=len(piece), begins=begins, ends=False)


def _json_row(number: int, text: str, fields: Sequence[str], optional: Sequence[str]) -> Row:
    if not text.strip():
        return Row(number, problem="an empty line")
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return Row(number, problem=f"not JSON: {error}")
    if not isinstance(row, dict):
        return Row(number, problem=f"holds {type_name(row)} where an object is expected")
    if missing := _lacking(row, [field for field in fields if field not in optional]):
        return Row(number, problem=missing)
    return Row(number, tuple(row.get(field) for field in fields))


def _lacking(names: Iterable[str], fields: Sequence[str]) -> str | None:
    missing = [field for field in fields if field not in names]
    return f"lacks the field {missing[0]!r}; it has {', '.join(map(repr, names)) or 'none'}" if missing else None


def _parquet(path: str) -> pa.parquet.ParquetFile:
    try:
        return pa.parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _not_a_table(path, error) from None


def _parquet_batches(span: Span, fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
    file = _parquet(span.path)
    _require_columns(span.path, file.schema_arrow.names, fields)
    return file.iter_batches(TABLE_ROWS, row_groups=range(span.start, span.stop), columns=list(fields))


def _arrow_batches(span: Span, fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Record batches of an Arrow file in either of its formats: the stream, as `datasets` writes it, or the file."""
    with pa.memory_map(span.path) as source:
        try:
            table: Any = pa.ipc.open_stream(source)
            batches = iter(table)
        except pa.ArrowInvalid:
            try:
                table = pa.ipc.open_file(source)
            except pa.ArrowInvalid as error:
                raise _not_a_table(span.path, error) from None
            batches = map(table.get_batch, range(table.num_record_batches))
        _require_columns(span.path, table.schema.names, fields)
        yield from batches


def _require_columns(path: str, names: Sequence[str], fields: Sequence[str]) -> None:
    if missing := _lacking(names, fields):
        raise InputError(f"the table {path} {missing}", f"the columns {', '.join(fields)}",
                         "name the source's columns in the recipe: `text`, or `prompt` and `response`, or `messages`")


def _table_rows(batches: Iterable[pa.RecordBatch], fields: Sequence[str]) -> Iterator[Row]:
    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, TABLE_ROWS):
                columns = [batch.column(field).slice(start, TABLE_ROWS).to_pylist() for field in fields]
                for values in zip(*columns, strict=True):
                    yield Row(number, values)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        yield Row(number, problem=f"the file is damaged or cut short: {error}")


def _not_a_table(path: str, error: Exception) -> InputError:
    return InputError(f"the data file {path} cannot be read: {error}", f"a {kind_of(path)} file", "write it again")


def type_name(value: Any) -> str:
    """What a value of JSON or of a table is called to the user."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def by_size(items: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Lists of items, each of at least `limit` in all, but for the last."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
