"""The file formats of rows, each read in spans that any process can read by itself.

Preparing in parallel needs files that can be cut without reading them. A span of a line file is a
range of bytes, and a line belongs to the span in which it begins; a span of a Parquet file is a
range of row groups. An Arrow or compressed file can only be read from its start, so it is one span
and one process reads it. This module decides only if a row can be read: one that cannot comes back
with its problem, and its values are checked in sources.py. A damaged file is an error however bad
rows are treated, since nobody knows what it held.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa

from amid_ds.data.tables import (
    ALL_ROWS,
    arrow_rows,
    missing_field,
    parquet_metadata,
    parquet_rows,
    table_columns,
)
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
# A line is held whole, and several times over while it is parsed.
MAX_LINE_BYTES = 1 << 28

_T = TypeVar("_T")


@dataclass(frozen=True)
class DataFile:
    """A file of a source; of an Arrow file it may be the rows [first, stop) alone."""

    path: str
    first: int = 0
    stop: int = ALL_ROWS

    @property
    def is_whole(self) -> bool:
        return self.first == 0 and self.stop == ALL_ROWS


@dataclass(frozen=True)
class FileSpan:
    """A part of one file: [start, stop) in bytes, row groups or rows, and its size in bytes.

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


def split_file(number: int, file: DataFile, target: int) -> Iterator[FileSpan]:
    """Spans of about `target` bytes that cover a file, in order. number: the file's index.

    Raises InputError for a Parquet file that cannot be opened.
    """
    path, size = file.path, os.path.getsize(file.path)
    if file_format(path) in PARQUET_FORMATS:
        groups = parquet_metadata(path)
        for group in range(groups.num_row_groups):
            yield FileSpan(number, path, group, group + 1, groups.row_group(group).total_byte_size)
    elif file_format(path) in ARROW_FORMATS:
        yield FileSpan(number, path, file.first, file.stop, size)
    elif Path(path).suffix in COMPRESSION_CODECS:
        yield FileSpan(number, path, 0, size, size)
    else:
        starts: Sequence[int] = range(0, size, target)
        if file_format(path) in TEXT_FORMATS:
            starts = list(dict.fromkeys([0, *_unindented_lines(path, starts[1:], target)]))
        for start, stop in itertools.pairwise([*starts, size]):
            # A span that lost bytes to the one before is still a shard's worth: lines are counted
            # by shard.
            yield FileSpan(number, path, start, stop,
                           stop - start if stop == size else max(stop - start, target))


def _unindented_lines(path: str, places: Iterable[int], target: int) -> Iterator[int]:
    """The beginnings of lines behind these places where no tokenizer joins what is before.

    Many join a line end with white space after it: so lines without any at their beginning, or,
    in a text without such lines, none.
    """
    with open(path, "rb") as file:
        for place in places:
            file.seek(place - 1)
            start = place - 1 + _pass_line(file)
            while (first := file.read(1)).isspace():
                start += 1 if first == b"\n" else 1 + _pass_line(file)
            if first and start < place + target:
                yield start


def read_raw_rows(span: FileSpan, fields: Sequence[str],
                  optional: Sequence[str] = ()) -> Iterator[RawRow]:
    """The rows of a span, with the values of `fields`.

    Rows may lack the `optional` fields: their values are then None. Raises InputError for a file
    that is damaged, or a table that lacks a column.
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
    else:
        rows = (parquet_rows(span.path, range(span.start, span.stop), fields, optional)
                if name in PARQUET_FORMATS else
                arrow_rows(span.path, span.start, span.stop, fields, optional))
        for number, (values, problem) in enumerate(rows):
            yield RawRow(number, values, problem)


def column_names(path: str) -> list[str]:
    """The columns of a table, or the fields of the first JSON line that has any.

    None of a text file. Raises InputError for a damaged file.
    """
    name = file_format(path)
    if name in (*PARQUET_FORMATS, *ARROW_FORMATS):
        return table_columns(path, name in PARQUET_FORMATS)
    if name in LINE_FORMATS:
        size = os.path.getsize(path)
        for line, problem, _ in _read_lines(FileSpan(0, path, 0, size, size)):
            if problem is None and (row := _parse_json(line)[0]):
                return list(row)
    return []


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
        groups = parquet_metadata(span.path)
        return sum(groups.row_group(group).num_rows for group in range(span.start))
    if file_format(span.path) in ARROW_FORMATS or span.start == 0:
        return span.start
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
        stop = span.start - 1 + _pass_line(file)
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
    number = 0
    try:
        with _open_lines(span.path) as file:
            position = span.start
            if span.start > 0:
                # Pass over the rest of a line that began before, or the line end just before.
                file.seek(span.start - 1)
                position += _pass_line(file, span.stop - span.start + 1) - 1
                if position >= span.stop:
                    return
            line, size = _next_line(file)
            while size and (whole_file or position < span.stop):
                following, following_size = _next_line(file)
                if position == 0 and line is not None:
                    line = _without_mark(span.path, line)
                yield *_decode_line(line, size), not following_size
                number += 1
                position += size
                line, size = following, following_size
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{row_location(span.path, rows_before_span(span) + number)}: the file is "
                         f"damaged or cut short: {error}", "a whole file, as it was written",
                         "write or copy it again") from None


def _next_line(file: IO[bytes]) -> tuple[bytes | None, int]:
    """(the next line, its length); None for a line that is too long to be held."""
    line = file.readline(MAX_LINE_BYTES)
    if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
        return line, len(line)
    return None, len(line) + _pass_line(file)


def _pass_line(file: IO[bytes], most: int = 1 << 62) -> int:
    """Read to the end of the line, or `most` bytes and little more; return how many it were."""
    size = 0
    while size < most and (piece := file.readline(PIECE_BYTES)):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def _without_mark(path: str, line: bytes) -> bytes:
    """A file's first line without the mark of UTF-8. Raises InputError for another encoding's."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise InputError(f"the data file {path} is UTF-16 or UTF-32 by its byte order mark",
                         "UTF-8", f"iconv -f UTF-16 -t UTF-8 {shlex.quote(path)}")
    return line.removeprefix(codecs.BOM_UTF8)


def _decode_line(line: bytes | None, size: int) -> tuple[str, str | None]:
    if line is None:
        return "", (f"a line of {size:,} bytes, which is more than the {MAX_LINE_BYTES:,} of the "
                    "longest that is read")
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
    row, problem = _parse_json(text)
    if problem is None:
        problem = missing_field(row, [field for field in fields if field not in optional])
    if problem is not None:
        return RawRow(number, problem=problem)
    return RawRow(number, tuple(row.get(field) for field in fields))


def _parse_json(text: str) -> tuple[dict[str, object], str | None]:
    """(the object in a line, or an empty one; the line's problem or None)."""
    if not text.strip():
        return {}, "an empty line"
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        # A ValueError also where a number has more digits than Python reads.
        hint = ("; each line is to be an object by itself (`jq -c '.[]'` makes lines of a list)"
                if text.strip() in ("[", "{") else "")
        return {}, f"not JSON: {error}{hint}"
    if not isinstance(row, dict):
        return {}, f"holds {json_type_name(row)} where an object is expected"
    return row, None
