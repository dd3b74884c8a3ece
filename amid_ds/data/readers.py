"""The file formats of rows, each read in spans that any process can read by itself.

Preparing in parallel needs files that can be cut without reading them. A span of a line file is a
range of bytes, and a line belongs to the span in which it begins; a span of a Parquet file is a
range of row groups. An Arrow or compressed file can only be read from its start, so it is one span
and one process reads it. This module decides only if a row can be read: one that cannot comes back
with its problem. Its values are checked in sources.py.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

from amid_ds.errors import InputError

LINE_FORMATS = (".jsonl", ".ndjson", ".json")
TEXT_FORMATS = (".txt",)
PARQUET_FORMATS = (".parquet",)
ARROW_FORMATS = (".arrow",)
FILE_FORMATS = (*LINE_FORMATS, *TEXT_FORMATS, *PARQUET_FORMATS, *ARROW_FORMATS)
# Of line and text files only: the others compress inside.
COMPRESSION_CODECS = {".gz": "gzip", ".zst": "zstd"}

# A text file is read, and a long text encoded, in pieces of about this size.
PIECE_BYTES = 1 << 18
TABLE_BATCH_ROWS = 1000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_T = TypeVar("_T")


@dataclass(frozen=True)
class FileSpan:
    """A part of one file: [start, stop) in bytes or row groups, and its size in bytes.

    file: the file's index among the source's files.
    """

    file: int
    path: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class RawRow:
    """The values of the source's fields in one row, or the problem that keeps them from being read.

    number: counts from 0 within the span. A text file is one document in several rows:
    line_count: the lines of the file in this row; starts_document and ends_document: False where
    the document continues an earlier row, or goes on in the next one.
    """

    number: int
    values: tuple[Any, ...] = ()
    problem: str | None = None
    line_count: int = 1
    starts_document: bool = True
    ends_document: bool = True


def file_format(path: str) -> str | None:
    """The format of a file by its name, one of FILE_FORMATS, or None if it is none of them."""
    suffixes = Path(path).suffixes[-2:]
    if not suffixes:
        return None
    compressed = len(suffixes) == 2 and suffixes[1] in COMPRESSION_CODECS
    name = suffixes[0] if compressed else suffixes[-1]
    if compressed and name not in (*LINE_FORMATS, *TEXT_FORMATS):
        return None
    return name if name in FILE_FORMATS else None


def split_file(file: int, path: str, target: int) -> Iterator[FileSpan]:
    """Spans of about `target` bytes that cover a file, in order.

    Raises InputError for a Parquet file that cannot be opened.
    """
    size = os.path.getsize(path)
    if file_format(path) in PARQUET_FORMATS:
        groups = _open_parquet(path).metadata
        for group in range(groups.num_row_groups):
            yield FileSpan(file, path, group, group + 1, groups.row_group(group).total_byte_size)
    elif file_format(path) in ARROW_FORMATS or Path(path).suffix in COMPRESSION_CODECS:
        yield FileSpan(file, path, 0, size, size)
    else:
        starts: Sequence[int] = range(0, size, target)
        if file_format(path) in TEXT_FORMATS:
            starts = list(dict.fromkeys([0, *_unindented_lines(path, starts[1:], target)]))
        for start, stop in itertools.pairwise([*starts, size]):
            # A span that lost bytes to the one before is still a shard's worth: lines are counted
            # by shard.
            yield FileSpan(file, path, start, stop,
                           stop - start if stop == size else max(stop - start, target))


def _unindented_lines(path: str, places: Iterable[int], target: int) -> Iterator[int]:
    """The beginnings of lines behind these places where no tokenizer joins what is before.

    Many join a line end with white space after it: so lines without any at their beginning, or,
    in a text without such lines, none.
    """
    with open(path, "rb") as file:
        for place in places:
            file.seek(place - 1)
            file.readline()
            start = file.tell()
            while (line := file.readline()) and line[:1].isspace():
                start = file.tell()
            if line and start < place + target:
                yield start


def read_raw_rows(span: FileSpan, fields: Sequence[str],
                  optional: Sequence[str] = ()) -> Iterator[RawRow]:
    """The rows of a span, with the values of `fields`.

    A JSON object may lack the `optional` fields: their values are then None. Raises InputError for
    a table that cannot be opened or lacks a column.
    """
    name = file_format(span.path)
    if name in TEXT_FORMATS:
        yield from _text_rows(_read_lines(span), span.start == 0)
    elif name in LINE_FORMATS:
        for number, (line, problem, _) in enumerate(_read_lines(span)):
            if problem is not None:
                yield RawRow(number, problem=problem)
            else:
                yield _json_row(number, line, fields, optional)
    elif name in PARQUET_FORMATS:
        yield from _table_rows(_parquet_batches(span, fields), fields)
    else:
        yield from _table_rows(_arrow_batches(span, fields), fields)


def column_names(path: str) -> list[str]:
    """The columns of a table. Raises InputError if it cannot be opened."""
    if file_format(path) in PARQUET_FORMATS:
        return list(_open_parquet(path).schema_arrow.names)
    with pa.memory_map(path) as source:
        return list(_open_arrow(path, source).schema.names)


def row_location(path: str, number: int) -> str:
    """The name of row `number` of a file for the user, "a.jsonl line 17" or "a.parquet row 16".

    Lines count from 1 as in an editor, rows of a table from 0 as in `datasets`.
    """
    if file_format(path) in (*LINE_FORMATS, *TEXT_FORMATS):
        return f"{path} line {number + 1}"
    return f"{path} row {number}"


def rows_before_span(span: FileSpan) -> int:
    """Number of rows of the file before the span's. Reads a line file up to the span."""
    if file_format(span.path) in PARQUET_FORMATS:
        groups = _open_parquet(span.path).metadata
        return sum(groups.row_group(group).num_rows for group in range(span.start))
    if span.start == 0:
        return 0
    line_ends = 0
    with open(span.path, "rb") as file:
        left = span.start
        while left > 0 and (block := file.read(min(left, PIECE_BYTES))):
            line_ends += block.count(b"\n")
            left -= len(block)
        # A line that began before the span and ends in it is not one of the span's.
        file.seek(span.start - 1)
        return line_ends + (file.read(1) != b"\n")


def text_before_span(span: FileSpan, most: int) -> str:
    """The last characters, `most` bytes of them, before the first line of a span of lines."""
    if span.start == 0:
        return ""
    with open(span.path, "rb") as file:
        file.seek(span.start - 1)
        file.readline()
        stop = file.tell()
        file.seek(max(stop - most, 0))
        return file.read(min(most, stop)).decode("utf-8", errors="ignore")


def json_type_name(value: object) -> str:
    """The type of a value of JSON or of a table, in the user's words."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number",
             float: "a number", str: "text"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def batched_by_size(items: Iterable[_T], size_of: Callable[[_T], int],
                    limit: int) -> Iterator[list[_T]]:
    """Lists of consecutive items, each of a total size of at least `limit` except the last."""
    batch: list[_T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open_lines(path: str) -> IO[bytes]:
    suffix = Path(path).suffix
    if suffix in COMPRESSION_CODECS:
        return io.BufferedReader(pa.CompressedInputStream(path, COMPRESSION_CODECS[suffix]))
    return open(path, "rb")


def _read_lines(span: FileSpan) -> Iterator[tuple[str, str | None, bool]]:
    """(line, its problem or None, True for the last of the file) of each line of the span."""
    whole_file = Path(span.path).suffix in COMPRESSION_CODECS
    try:
        with _open_lines(span.path) as file:
            position = span.start
            if span.start > 0:
                # Pass over the rest of a line that began before, or the line end just before.
                file.seek(span.start - 1)
                position += len(file.readline()) - 1
            line = file.readline()
            while line and (whole_file or position < span.stop):
                following = file.readline()
                content = line.removeprefix(BYTE_ORDER_MARK) if position == 0 else line
                yield *_decode_line(content), not following
                position += len(line)
                line = following
    except OSError as error:
        yield "", f"the file is damaged or cut short: {error}", False


def _decode_line(line: bytes) -> tuple[str, str | None]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte {line[error.start]:#04x} at position {error.start}"
    return ("", "holds a NUL byte") if "\0" in text else (text, None)


def _text_rows(lines: Iterable[tuple[str, str | None, bool]],
               starts_document: bool) -> Iterator[RawRow]:
    """A text file as one document, in pieces that end at a line end. A bad line is left out."""
    piece: list[str] = []
    size = first = 0
    for number, (text, problem, last) in enumerate(lines):
        if problem is not None:
            yield RawRow(number, problem=problem, line_count=0)
        piece.append(text)
        size += len(text)
        if size >= PIECE_BYTES or last:
            yield RawRow(first, ("".join(piece),), line_count=len(piece),
                         starts_document=starts_document, ends_document=last)
            piece, size, first, starts_document = [], 0, number + 1, False
    if piece:
        yield RawRow(first, ("".join(piece),), line_count=len(piece),
                     starts_document=starts_document, ends_document=False)


def _json_row(number: int, text: str, fields: Sequence[str], optional: Sequence[str]) -> RawRow:
    if not text.strip():
        return RawRow(number, problem="an empty line")
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return RawRow(number, problem=f"not JSON: {error}")
    if not isinstance(row, dict):
        return RawRow(number, problem=f"holds {json_type_name(row)} where an object is expected")
    if problem := _missing_field(row, [field for field in fields if field not in optional]):
        return RawRow(number, problem=problem)
    return RawRow(number, tuple(row.get(field) for field in fields))


def _missing_field(names: Iterable[str], fields: Sequence[str]) -> str | None:
    missing = [field for field in fields if field not in names]
    if not missing:
        return None
    return f"lacks the field {missing[0]!r}; it has {', '.join(map(repr, names)) or 'none'}"


def _open_parquet(path: str) -> pa.parquet.ParquetFile:
    try:
        return pa.parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable_table(path, error) from None


def _parquet_batches(span: FileSpan, fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
    file = _open_parquet(span.path)
    _require_columns(span.path, file.schema_arrow.names, fields)
    return file.iter_batches(TABLE_BATCH_ROWS, row_groups=range(span.start, span.stop),
                             columns=list(fields))


def _arrow_batches(span: FileSpan, fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Record batches of an Arrow file in either format: the stream that `datasets` writes, or the
    file."""
    with pa.memory_map(span.path) as source:
        table = _open_arrow(span.path, source)
        _require_columns(span.path, table.schema.names, fields)
        if isinstance(table, pa.ipc.RecordBatchFileReader):
            yield from map(table.get_batch, range(table.num_record_batches))
        else:
            yield from table


def _open_arrow(path: str, source: pa.MemoryMappedFile) -> Any:
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        try:
            return pa.ipc.open_file(source)
        except pa.ArrowInvalid as error:
            raise _unreadable_table(path, error) from None


def _require_columns(path: str, names: Sequence[str], fields: Sequence[str]) -> None:
    if problem := _missing_field(names, fields):
        raise InputError(f"the table {path} {problem}", f"the columns {', '.join(fields)}",
                         "name the source's columns in the recipe: `text`, or `prompt` and "
                         "`response`, or `messages`")


def _table_rows(batches: Iterable[pa.RecordBatch], fields: Sequence[str]) -> Iterator[RawRow]:
    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, TABLE_BATCH_ROWS):
                columns = [batch.column(field).slice(start, TABLE_BATCH_ROWS).to_pylist()
                           for field in fields]
                for values in zip(*columns, strict=True):
                    yield RawRow(number, values)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        yield RawRow(number, problem=f"the file is damaged or cut short: {error}")


def _unreadable_table(path: str, error: Exception) -> InputError:
    return InputError(f"the data file {path} cannot be read: {error}",
                      f"a {file_format(path)} file", "write it again")
