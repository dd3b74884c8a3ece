"""Rows from the user's files, one at a time, each with its place and each checked.

A corpus is read in parallel and in a fixed order, so its files are cut into spans that any process can read alone: a
span of a line file is a range of bytes, and a line belongs to the span in which it begins. A row that cannot be used
comes back with its problem instead of its values; whether that ends the job is for the reader to say
(`data.on_bad_row`).

Files: .jsonl (.ndjson, .json: one object per line), and .txt, where a FILE is one document. A folder or a glob is all
its files of these kinds, in sorted order.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amid_ds import config
from amid_ds.errors import InputError

JSON_LINES = (".jsonl", ".ndjson", ".json")
TEXT = (".txt",)
KINDS = (*JSON_LINES, *TEXT)
PIECE_BYTES = 1 << 20         # a .txt file is read, and a long line encoded, in pieces of about this size
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FIRST_ROWS = 10               # that many are looked at before a run starts


@dataclass(frozen=True)
class Span:
    """A part of one file: bytes [start, stop). `file` is its place in the source's list of files."""

    file: int
    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """One row: the values of the source's fields, or what is wrong with it. `line` counts from 0 within the span."""

    line: int
    values: tuple[Any, ...] = ()             # texts; of a messages source, one list of {role, content}
    problem: str | None = None
    lines: int = 1                           # that many lines of the file
    begins: bool = True                      # False: the document began in an earlier row
    ends: bool = True                        # False: the document goes on in the next row


def files_of(source: config.Source) -> list[str]:
    """The files of a source, sorted. Raises InputError where there is none, or one is empty or of no known kind."""
    path = source.path
    if os.path.isdir(path):
        found = [str(file) for file in sorted(Path(path).rglob("*")) if file.suffix in KINDS and file.is_file()]
    elif os.path.exists(path):
        found = [path]
    else:
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not found:
        raise InputError(f"the data source {path!r} is not there, or has no files of a known kind",
                         f"a file, a folder or a glob of files ending in {', '.join(KINDS)}",
                         f"check the path; relative paths are relative to {os.getcwd()}")
    for file in found:
        if Path(file).suffix not in KINDS:
            raise InputError(f"the data file {file!r} is of a kind that is not known", f"one of {', '.join(KINDS)}",
                             "convert it, or rename it if it is one of these")
        if os.path.getsize(file) == 0:
            raise InputError(f"the data file {file!r} is empty", "at least one row", "remove the file or fill it")
        if Path(file).suffix in TEXT and not source.is_text:
            raise InputError(f"the data file {file!r} is plain text, and its source names the columns {source.fields}",
                             f"one of {', '.join(JSON_LINES)}", "name no columns, or give a file that has them")
    return found


def spans_of(files: Sequence[str], target: int) -> Iterator[list[Span]]:
    """The files cut into spans and gathered into lists of about `target` bytes, in order; each list is one shard."""
    gathered: list[Span] = []
    size = 0
    for number, path in enumerate(files):
        end = os.path.getsize(path)
        for start in range(0, end, target):
            stop = min(start + target, end)
            gathered.append(Span(number, path, start, stop))
            size += stop - start
            if size >= target:
                yield gathered
                gathered, size = [], 0
    if gathered:
        yield gathered


def read_span(span: Span, source: config.Source) -> Iterator[Row]:
    """The rows that begin in a span."""
    if Path(span.path).suffix in TEXT:
        return _text_rows(span)
    return (_json_row(number, line, source) for number, (line, _) in enumerate(_lines(span)))


def line_number(span: Span, line: int) -> int:
    """The line of the file, from 1, of a line counted within the span. Reads the file up to the span."""
    before = 0
    with open(span.path, "rb") as file:
        left = span.start
        while left > 0 and (block := file.read(min(left, PIECE_BYTES))):
            before += block.count(b"\n")
            left -= len(block)
        if span.start > 0:                   # a line that began before the span and ends in it is not the span's
            file.seek(span.start - 1)
            before += file.read(1) != b"\n"
    return before + line + 1


def bad_row(place: str, problem: str) -> InputError:
    return InputError(f"{place}: {problem}", "a row that can be used",
                      "mend the row, or set data.on_bad_row=skip to leave such rows out and count them")


def check_sources(data: config.Data) -> None:
    """Look at every source's files and first rows, before anything costly is done. Raises InputError."""
    for source in data.train:
        files = files_of(source)
        if data.on_bad_row == "skip":
            continue
        first = Span(0, files[0], 0, os.path.getsize(files[0]))
        for row in itertools.islice(read_span(first, source), FIRST_ROWS):
            if row.problem is not None:
                raise bad_row(f"{first.path} line {row.line + 1}", row.problem)


def _lines(span: Span) -> Iterator[tuple[bytes, bool]]:
    """(line, whether it is the file's last) of each line that begins in the span."""
    with open(span.path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(span.start - 1, 0))
        if span.start > 0:
            file.readline()                  # the rest of a line that began before, or the line end just before
        elif file.peek(3).startswith(BYTE_ORDER_MARK):
            file.seek(3)
        while file.tell() < span.stop and (line := file.readline()):
            yield line, file.tell() == size


def _text_rows(span: Span) -> Iterator[Row]:
    """A text file is one document, read in pieces that end where a line ends."""
    piece: list[str] = []
    size = first = 0
    for number, (line, last) in enumerate(_lines(span)):
        text, problem = _decode(line)
        if problem is not None:
            yield Row(number, problem=problem, lines=0)
        piece.append(text)
        size += len(line)
        if size >= PIECE_BYTES or last:
            yield Row(first, ("".join(piece),), lines=len(piece), begins=span.start == first == 0, ends=last)
            piece, size, first = [], 0, number + 1
    if piece:
        yield Row(first, ("".join(piece),), lines=len(piece), begins=span.start == first == 0, ends=False)


def _json_row(number: int, line: bytes, source: config.Source) -> Row:
    text, problem = _decode(line)
    if problem is not None:
        return Row(number, problem=problem)
    if not text.strip():
        return Row(number, problem="an empty line")
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return Row(number, problem=f"not JSON: {error}")
    if not isinstance(row, dict):
        return Row(number, problem=f"holds {_type_name(row)} where an object is expected")
    problem = _problem(row, source)
    return Row(number, problem=problem) if problem else Row(number, tuple(row[field] for field in source.fields))


def _problem(row: dict[str, Any], source: config.Source) -> str | None:
    """Why a row cannot be used, if it cannot."""
    for field in source.fields:
        if field not in row:
            return f"lacks the field {field!r}; it has {', '.join(map(repr, row)) or 'none'}"
        problem = (_text_problem if source.messages is None else _messages_problem)(row[field])
        if problem is not None:
            return f"the field {field!r} {problem}"
    return None


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"holds {_type_name(value)} where text is expected"
    if not value:
        return "is empty"
    if "\0" in value:
        return "holds a NUL character"
    return None if _encodable(value) else "holds half a surrogate pair, which is no character"


def _messages_problem(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"holds {_type_name(value)} where a list of messages is expected"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return f"holds {_type_name(message)} as message {number} where an object is expected"
        if not isinstance(message.get("role"), str):
            return f"has no role in message {number}"
        if message.get("content") is not None and (problem := _text_problem(message["content"])):
            return f"has a message {number} whose content {problem}"
    if not any(message["role"] == "assistant" for message in value):
        return "has no message of the role 'assistant'"
    return None


def _decode(line: bytes) -> tuple[str, str | None]:
    """The line's text, or what is wrong with its bytes."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte {line[error.start]:#04x} at position {error.start}"
    return ("", "holds a NUL byte") if "\0" in text else (text, None)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:               # JSON can spell half a surrogate pair
        return False
    return True


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
