"""A recipe's sources: the spans that become shards, and the rows that can be used.

Corpora hold bad rows, and a job must name them without ending at the first: a row that cannot be
used comes back with its problem instead of its values, and the reader decides (`data.on_bad_row`).
A .txt FILE is one document. The files themselves are found in locate.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from amid_ds.config.prompt_templates import fill_template
from amid_ds.config.recipe import Data, Rows, Source
from amid_ds.data.chat import REASONING_KEYS
from amid_ds.data.locate import first_line_of, is_hub_id, source_files
from amid_ds.data.readers import (
    TEXT_FORMATS,
    DataFile,
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

# Checked before a run starts.
CHECKED_FIRST_ROWS = 10
# Fields that an instruction may lack.
OPTIONAL_FIELDS = ("input",)
# Longer than any file: one span per file where the format allows it.
WHOLE_FILE = 1 << 62


def shard_spans(files: Sequence[DataFile], target: int) -> Iterator[list[FileSpan]]:
    """The spans of each shard of a source, in order: about `target` bytes in each list."""
    spans = itertools.chain.from_iterable(
        split_file(number, file, target) for number, file in enumerate(files))
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
    for row in read_raw_rows(span, fields, optional):
        yield check_row(row, names, source)


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


def source_columns(source: Source) -> list[str]:
    """The columns of a source's first file. Raises InputError."""
    return column_names(source_files(source)[0].path)


def bad_row_error(location: str, problem: str) -> InputError:
    """The error for a row that cannot be used."""
    return InputError(f"{location}: {problem}", "a row that can be used",
                      "fix the row or remove it, or name other columns; data.on_bad_row=skip in a "
                      "recipe, or --on-bad-row skip, leaves such rows out")


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
        raise InputError(f"the data source {source.path!r} cannot be streamed: "
                         f"{first_line_of(error)}",
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
    for number, file in enumerate(source_files(source)):
        for span in split_file(number, file, WHOLE_FILE):
            for row in read_checked_rows(span, source, fields):
                if row.problem is None:
                    yield row.values
                elif on_bad_row == "error":
                    raise bad_row_error(span_row_location(span, row.number), row.problem)


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
