"""A recipe's sources: their files, the spans that become shards, and the rows that can be used.

A source is a file, a folder or a glob of files (sorted), or a data set of the hub. Files: JSON
lines (.jsonl, .ndjson, .json) and .txt, also compressed (.gz, .zst); .parquet; .arrow, so a folder
of `save_to_disk` is one too. A .txt FILE is one document. Corpora hold bad rows, and a job must
name them without ending at the first: a row that cannot be used comes back with its problem
instead of its values, and the reader decides (`data.on_bad_row`).
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from amid_ds.config.prompt_templates import fill_template
from amid_ds.config.recipe import Data, Rows, Source
from amid_ds.data.chat import REASONING_KEYS
from amid_ds.data.manifest import FileIdentity
from amid_ds.data.readers import (
    COMPRESSION_CODECS,
    FILE_FORMATS,
    LINE_FORMATS,
    TEXT_FORMATS,
    FileSpan,
    RawRow,
    batched_by_size,
    column_names,
    file_format,
    json_type_name,
    read_raw_rows,
    row_location,
    rows_before_span,
    split_file,
)
from amid_ds.errors import InputError

HUB_ID_PATTERN = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Written by `save_to_disk` beside the data.
SAVE_TO_DISK_METADATA = ("dataset_dict.json", "dataset_info.json", "state.json")
# Checked before a run starts.
CHECKED_FIRST_ROWS = 10
# Fields that an instruction may lack.
OPTIONAL_FIELDS = ("input",)
# Longer than any file: one span per file where the format allows it.
WHOLE_FILE = 1 << 62


def source_files(source: Source) -> list[str]:
    """The paths of a source's files, sorted.

    Raises InputError if there are none, or one is empty or of an unknown format.
    """
    path = source.path
    if os.path.isdir(path):
        files = [str(file) for file in sorted(Path(path).rglob("*"))
                 if file.is_file() and file_format(file.name)
                 and file.name not in SAVE_TO_DISK_METADATA]
    elif os.path.exists(path):
        files = [path]
    elif is_hub_id(path):
        files = _hub_files(source)
    else:
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not files:
        raise InputError(
            f"the data source {path!r} is not there, or has no files of a known kind",
            f"a file, a folder or a glob of files ending in {_known_formats()}, or a data set on "
            "the hub", f"check the path; relative paths are relative to {os.getcwd()}")
    for file in files:
        _require_usable_file(file, source)
    return files


def is_hub_id(path: str) -> bool:
    """True for a path to look up on the hub: `name` or `owner/name`, and nothing local.

    A path with a known ending, or whose owner is a folder here, is taken for a mistyped local one:
    the hub answers those only after many tries.
    """
    owner = path.rpartition("/")[0]
    return (HUB_ID_PATTERN.fullmatch(path) is not None and file_format(path) is None
            and not os.path.exists(path) and not os.path.isdir(owner))


def file_identities(source: Source, files: Sequence[str]) -> list[FileIdentity]:
    """[name, size, modification time] of each file: equal while the files are the same.

    A file of the hub is named by the end of its path in the cache, which holds the data set's
    commit, and has no time: the cache may be anywhere, and be written again.
    """
    if is_hub_id(source.path):
        return [["/".join(Path(file).parts[-3:]), os.path.getsize(file), 0] for file in files]
    return [[file, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]


def shard_spans(files: Sequence[str], target: int) -> Iterator[list[FileSpan]]:
    """The spans of each shard of a source, in order: about `target` bytes in each list."""
    spans = itertools.chain.from_iterable(
        split_file(number, path, target) for number, path in enumerate(files))
    return batched_by_size(spans, lambda span: span.size, target)


def read_checked_rows(span: FileSpan, source: Source,
                      fields: Sequence[str] | None = None) -> Iterator[RawRow]:
    """The rows of a span, each checked.

    fields: the columns to read, None for the source's; those of a conversation's template that
    are not the source's may be missing.
    """
    fields = source.fields if fields is None else fields
    names = ("text",) if file_format(span.path) in TEXT_FORMATS else fields
    optional: Sequence[str] = OPTIONAL_FIELDS if source.template is not None else ()
    if source.messages is not None:
        optional = tuple(field for field in fields if field not in source.fields)
    for row in _read_rows(span, fields, optional):
        yield check_row(row, names, source)


def _read_rows(span: FileSpan, fields: Sequence[str], optional: Sequence[str]) -> Iterator[RawRow]:
    """The rows of a span, None for the values of optional fields that a table lacks."""
    if not optional or file_format(span.path) in (*LINE_FORMATS, *TEXT_FORMATS):
        yield from read_raw_rows(span, fields, optional)
        return
    columns = column_names(span.path)
    present = [field for field in fields if field in columns or field not in optional]
    for row in read_raw_rows(span, present):
        values = dict(zip(present, row.values, strict=False))
        yield replace(row, values=tuple(values.get(field) for field in fields))


def check_row(row: RawRow, names: Sequence[str], source: Rows) -> RawRow:
    """The row with its values, or with its problem if one of them cannot be used.

    names: the column of each value. The values of an instruction become its prompt and its
    responses, one or several.
    """
    if source.template is not None:
        return _fill_prompt(row, source.template)
    if row.problem is not None:
        return row
    check = _text_problem
    if source.messages is not None:
        # The template's columns are checked as they are given to it.
        check, names = _messages_problem, names[:1]
    # A text file's row has one value, `text`, for whichever column the recipe names.
    for name, value in zip(names, row.values, strict=False):
        if problem := check(value):
            return replace(row, problem=f"the field {name!r} {problem}", values=())
    return row


def _fill_prompt(row: RawRow, template: str) -> RawRow:
    if row.problem is not None:
        return row
    # Without an output if prompts alone are read; with a list of them if there are references.
    instruction, context, *output = row.values
    outputs = output[0] or [None] if output and isinstance(output[0], list) else output
    texts = [("instruction", instruction), *(("output", text) for text in outputs)]
    if context:
        texts.append(("input", context))
    for name, value in texts:
        if problem := _text_problem(value):
            return replace(row, problem=f"the field {name!r} {problem}", values=())
    return replace(row, values=(fill_template(template, instruction, context or ""), *outputs))


def read_prompts_with_references(source: Source,
                                 on_bad_row: str) -> Iterator[tuple[str, list[str]]]:
    """(prompt, its reference responses) of every usable row of a source of prompts."""
    for prompt, *references in _usable_values(source, on_bad_row):
        yield prompt, references


def read_prompts(source: Source, on_bad_row: str) -> Iterator[str]:
    """The prompt of every row of a source that has a usable one; no other field is read."""
    fields = source.fields[:2 if source.template is not None else 1]
    for prompt, in _usable_values(source, on_bad_row, fields):
        yield prompt


def bad_row_error(location: str, problem: str) -> InputError:
    """The error for a row that cannot be used."""
    return InputError(f"{location}: {problem}", "a row that can be used",
                      "fix the row or remove it; a recipe's data.on_bad_row=skip leaves out and "
                      "counts such rows")


def span_row_location(span: FileSpan, number: int) -> str:
    """The file and line of row `number` of a span, for the user. Reads the file up to the span."""
    return row_location(span.path, rows_before_span(span) + number)


def check_sources(data: Data) -> None:
    """Check every source's files and first rows, before anything costly is done.

    Raises InputError. Data sets of the hub are left to `prepare`: every rank checks, and a
    thousand ranks must not ask the hub at once.
    """
    for source in (source for part in data.parts().values() for source in part.train):
        if is_hub_id(source.path):
            continue
        first = next(split_file(0, source_files(source)[0], WHOLE_FILE))
        for row in itertools.islice(read_checked_rows(first, source), CHECKED_FIRST_ROWS):
            if row.problem is not None and data.on_bad_row == "error":
                raise bad_row_error(span_row_location(first, row.number), row.problem)


def sample_texts(data: Data, characters: int) -> Iterator[str]:
    """Texts of about `characters` in all: the beginning of every source, in its weight's share."""
    total_weight = sum(source.weight for source in data.train)
    for source in data.train:
        left = characters * source.weight / total_weight
        for values in _usable_values(source, data.on_bad_row):
            texts = values
            if source.messages is not None:
                texts = tuple(message.get("content") for message in values[0])
            for text in filter(None, texts):
                yield text
                left -= len(text)
            if left <= 0:
                break


def open_streaming_dataset(source: Source) -> Any:
    """The source as an IterableDataset of `datasets`.

    Raises InputError if it cannot be opened, is empty, or lacks one of the columns.
    """
    import datasets

    try:
        stream: Any = datasets.load_dataset(source.path, source.config, split=source.split,
                                            revision=source.revision, streaming=True)
        first = next(iter(stream), None)
    except Exception as error:
        # datasets and the hub raise whatever their many loaders raise.
        raise InputError(f"the data source {source.path!r} cannot be streamed: {_summary(error)}",
                         "a data set on the hub, or a folder of jsonl or parquet files",
                         "check the path, `config`, `split` and `revision`") from None
    problem = None
    if first is None:
        problem = "has no rows"
    elif missing := [field for field in source.fields if field not in first]:
        problem = f"lacks the field {missing[0]!r}; it has {', '.join(map(repr, first))}"
    if problem is not None:
        raise InputError(f"the data source {source.path!r} {problem}",
                         "rows with the columns that the recipe names",
                         "fix the recipe's data section")
    return stream


def _usable_values(source: Source, on_bad_row: str,
                   fields: Sequence[str] | None = None) -> Iterator[tuple[Any, ...]]:
    """The values of a source's usable rows, in order."""
    for number, path in enumerate(source_files(source)):
        for span in split_file(number, path, WHOLE_FILE):
            for row in read_checked_rows(span, source, fields):
                if row.problem is None:
                    yield row.values
                elif on_bad_row == "error":
                    raise bad_row_error(span_row_location(span, row.number), row.problem)


def _require_usable_file(file: str, source: Source) -> None:
    name = file_format(file)
    if name is None:
        raise InputError(f"the data file {file!r} is of a kind that is not known",
                         f"one of {_known_formats()}",
                         "convert it, or rename it if it is one of these")
    if os.path.getsize(file) == 0:
        raise InputError(f"the data file {file!r} is empty", "at least one row",
                         "remove the file or fill it")
    if name in TEXT_FORMATS and not source.is_text:
        raise InputError(f"the data file {file!r} is plain text, and its source names the columns "
                         f"{source.fields}", "a file that has columns",
                         "name no columns, or give a file that has them")


def _known_formats() -> str:
    codecs = " or ".join(COMPRESSION_CODECS)
    return f"{', '.join(FILE_FORMATS)} (text and JSON also with {codecs})"


def _hub_files(source: Source) -> list[str]:
    """The Arrow files of a hub data set in the cache of `datasets`, downloaded if need be."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.config, split=source.split,
                                       revision=source.revision)
    except Exception as error:
        # datasets and the hub raise whatever their many loaders raise.
        raise InputError(f"the data source {source.path!r} is no file or folder here, and no data "
                         f"set on the hub that can be loaded: {_summary(error)}",
                         "a path, or the id of a data set that can be reached or is in the cache",
                         "check the path, `config`, `split` and `revision`; load it once with a "
                         "network") from None
    return [file["filename"] for file in loaded.cache_files]


def _summary(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _text_problem(value: object) -> str | None:
    if not isinstance(value, str):
        return f"holds {json_type_name(value)} where text is expected"
    if not value:
        return "is empty"
    if "\0" in value:
        return "holds a NUL character"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair.
        return "holds half a surrogate pair, which is no character"
    return None


def _messages_problem(value: object) -> str | None:
    if not isinstance(value, list):
        return f"holds {json_type_name(value)} where a list of messages is expected"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            kind = json_type_name(message)
            return f"holds {kind} as message {number} where an object is expected"
        if not isinstance(message.get("role"), str):
            return f"has no role in message {number}"
        content = message.get("content")
        empty = content is None or (content == "" and _may_be_empty(message))
        if not empty and (problem := _text_problem(content)):
            return f"has a message {number} whose content {problem}"
    if not any(message["role"] == "assistant" for message in value):
        return "has no message of the role 'assistant'"
    return None


def _may_be_empty(message: Mapping[str, object]) -> bool:
    """True for a message that says something without content: all but a plain turn of a user or
    an assistant."""
    return (message["role"] not in ("user", "assistant")
            or any(message.get(key) for key in ("tool_calls", "function_call", *REASONING_KEYS)))
