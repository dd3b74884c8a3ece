"""A recipe's sources: which files they are, how they are cut into shards, and which of their rows can be used.

A source is a file, a folder or a glob of files (sorted), or a data set of the hub. Files: JSON lines (.jsonl, .ndjson,
.json) and .txt, also compressed (.gz, .zst); .parquet; .arrow, so a folder of `save_to_disk` is one too. A .txt FILE
is one document. A row that cannot be used comes back with its problem instead of its values; whether that ends the
job is for the reader to say (`data.on_bad_row`).
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from amid_ds.config import recipe
from amid_ds.config.prompt_templates import fill_template
from amid_ds.data.readers import (
    COMPRESSED,
    KINDS,
    TEXT,
    Row,
    Span,
    by_size,
    cut,
    kind_of,
    place,
    read,
    rows_before,
    type_name,
)
from amid_ds.errors import InputError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
OF_DATASETS = ("dataset_dict.json", "dataset_info.json", "state.json")     # beside what `save_to_disk` writes
FIRST_ROWS = 10               # that many are looked at before a run starts
OPTIONAL = ("input",)         # what an instruction may do without


def files_of(source: recipe.Source) -> list[str]:
    """The files of a source, sorted. Raises InputError where there is none, or one is empty or of no known kind."""
    path = source.path
    if os.path.isdir(path):
        found = [str(file) for file in sorted(Path(path).rglob("*"))
                 if file.is_file() and kind_of(file.name) and file.name not in OF_DATASETS]
    elif os.path.exists(path):
        found = [path]
    elif is_hub_id(path):
        found = _hub_files(source)
    else:
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not found:
        raise InputError(f"the data source {path!r} is not there, or has no files of a known kind",
                         f"a file, a folder or a glob of files ending in {_known()}, or a data set on the hub",
                         f"check the path; relative paths are relative to {os.getcwd()}")
    for file in found:
        _require_usable(file, source)
    return found


def is_hub_id(path: str) -> bool:
    """Whether a path that is not there is to be asked of the hub: `name` or `owner/name`, and nothing that looks local
    (a known ending, or an owner that is a folder here), since the hub answers a mistyped path only after many tries."""
    owner = path.rpartition("/")[0]
    return (HUB_ID.fullmatch(path) is not None and kind_of(path) is None
            and not os.path.exists(path) and not os.path.isdir(owner))


def identity(source: recipe.Source, files: Sequence[str]) -> list[list[Any]]:
    """What tells whether the source's files are still the same: name, size and time of change.

    A data set of the hub is known by the end of its cache's path, which holds its commit, wherever the cache is.
    """
    if is_hub_id(source.path):
        return [["/".join(Path(file).parts[-3:]), os.path.getsize(file), 0] for file in files]
    return [[file, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]


def shards_of(files: Sequence[str], target: int) -> Iterator[list[Span]]:
    """The files cut into spans and gathered into lists of about `target` bytes, in order; each list is one shard."""
    spans = itertools.chain.from_iterable(cut(number, path, target) for number, path in enumerate(files))
    return by_size(spans, lambda span: span.size, target)


def read_span(span: Span, source: recipe.Source, fields: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a span, each judged; of the source's fields only those in `fields`, where given."""
    fields = source.fields if fields is None else fields
    names = ("text",) if kind_of(span.path) in TEXT else fields
    for row in read(span, fields, OPTIONAL if source.template is not None else ()):
        yield judged(row, names, source)


def judged(row: Row, names: Sequence[str], source: recipe.Rows) -> Row:
    """The row, or what is wrong with it in the place of its values, which are those of the columns `names`; of an
    instruction they become its prompt and its responses, one or several."""
    if source.template is not None:
        return _prompted(row, source.template)
    judge = _text_problem if source.messages is None else _messages_problem
    problems = (f"the field {name!r} {problem}" for name, value in zip(names, row.values, strict=False)
                if (problem := judge(value)))
    problem = row.problem or next(problems, None)
    return row if problem is None else replace(row, problem=problem, values=())


def _prompted(row: Row, template: str) -> Row:
    if row.problem is not None:
        return row
    instruction, context, *output = row.values      # no output where prompts alone are read
    outputs = output[0] or [None] if output and isinstance(output[0], list) else output
    checked = [("instruction", instruction), *(("output", text) for text in outputs),
               *([("input", context)] if context else [])]
    for name, value in checked:
        if problem := _text_problem(value):
            return replace(row, problem=f"the field {name!r} {problem}", values=())
    return replace(row, values=(fill_template(template, instruction, context or ""), *outputs))


def answered_prompts_of(source: recipe.Source, on_bad_row: str) -> Iterator[tuple[str, list[str]]]:
    """(prompt, its references) of every usable row of a source of prompts."""
    for prompt, *references in _usable(source, on_bad_row):
        yield prompt, references


def prompts_of(source: recipe.Source, on_bad_row: str) -> Iterator[str]:
    """The prompt of every row of a source that has a usable one; nothing else is looked at."""
    fields = source.fields[:2 if source.template is not None else 1]
    for prompt, in _usable(source, on_bad_row, fields):
        yield prompt


def bad_row(name: str, problem: str) -> InputError:
    return InputError(f"{name}: {problem}", "a row that can be used",
                      "mend the row or take it out; a recipe's data.on_bad_row=skip leaves out and counts such rows")


def name_of(span: Span, number: int) -> str:
    """The file and line of a row of a span."""
    return place(span.path, rows_before(span) + number)


def check_sources(data: recipe.Data) -> None:
    """Look at every source's files and first rows, before anything costly is done. Raises InputError.

    Not at data sets of the hub: every rank looks, and a thousand ranks are not to ask it at once. `prepare` will.
    """
    for source in (source for part in data.parts().values() for source in part.train):
        if is_hub_id(source.path):
            continue
        first = next(cut(0, files_of(source)[0], 1 << 62))
        for row in itertools.islice(read_span(first, source), FIRST_ROWS):
            if row.problem is not None and data.on_bad_row == "error":
                raise bad_row(name_of(first, row.number), row.problem)


def texts_of(data: recipe.Data, characters: int) -> Iterator[str]:
    """About `characters` of text: the beginning of every source, as much of it as its weight says."""
    whole = sum(source.weight for source in data.train)
    for source in data.train:
        left = characters * source.weight / whole
        for values in _usable(source, data.on_bad_row):
            texts = values if source.messages is None else [turn.get("content") for turn in values[0]]
            for text in filter(None, texts):
                yield text
                left -= len(text)
            if left <= 0:
                break


def _usable(source: recipe.Source, on_bad_row: str,
            fields: Sequence[str] | None = None) -> Iterator[tuple[Any, ...]]:
    """The values of a source's rows, in order."""
    for number, path in enumerate(files_of(source)):
        for span in cut(number, path, 1 << 62):
            for row in read_span(span, source, fields):
                if row.problem is None:
                    yield row.values
                elif on_bad_row == "error":
                    raise bad_row(name_of(span, row.number), row.problem)


def _require_usable(file: str, source: recipe.Source) -> None:
    if kind_of(file) is None:
        raise InputError(f"the data file {file!r} is of a kind that is not known", f"one of {_known()}",
                         "convert it, or rename it if it is one of these")
    if os.path.getsize(file) == 0:
        raise InputError(f"the data file {file!r} is empty", "at least one row", "remove the file or fill it")
    if kind_of(file) in TEXT and not source.is_text:
        raise InputError(f"the data file {file!r} is plain text, and its source names the columns {source.fields}",
                         "a file that has columns", "name no columns, or give a file that has them")


def _known() -> str:
    return f"{', '.join(KINDS)} (text and JSON also with {' or '.join(COMPRESSED)})"


def _hub_files(source: recipe.Source) -> list[str]:
    """The Arrow files of a data set of the hub in the cache of `datasets`, brought there if need be."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.config, split=source.split, revision=source.revision)
    except Exception as error:     # datasets and the hub raise whatever their many loaders raise
        raise InputError(f"the data source {source.path!r} is no file or folder here, and no data set on the hub that "
                         f"can be loaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                         "a path, or the id of a data set that can be reached or is in the cache",
                         "check the path, `config`, `split` and `revision`; load it once with a network") from None
    return [file["filename"] for file in loaded.cache_files]


def open_stream(source: recipe.Source) -> Any:
    """The source as an IterableDataset. Raises InputError where there is none, or it has not the columns."""
    import datasets

    try:
        stream: Any = datasets.load_dataset(source.path, source.config, split=source.split, revision=source.revision,
                                            streaming=True)
        first = next(iter(stream), None)
    except Exception as error:     # datasets and the hub raise whatever their many loaders raise
        raise InputError(f"the data source {source.path!r} cannot be streamed: "
                         f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
                         "a data set on the hub, or a folder of jsonl or parquet files",
                         "check the path, `config`, `split` and `revision`") from None
    lacking = [field for field in source.fields if first is not None and field not in first]
    if first is None or lacking:
        raise InputError(f"the data source {source.path!r} " + ("has no rows" if first is None else
                         f"lacks the field {lacking[0]!r}; it has {', '.join(map(repr, first))}"),
                         "rows with the columns that the recipe names", "mend the recipe's data section")
    return stream


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"holds {type_name(value)} where text is expected"
    if not value:
        return "is empty"
    if "\0" in value:
        return "holds a NUL character"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:     # JSON can spell half a surrogate pair
        return "holds half a surrogate pair, which is no character"
    return None


def _messages_problem(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"holds {type_name(value)} where a list of messages is expected"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return f"holds {type_name(message)} as message {number} where an object is expected"
        if not isinstance(message.get("role"), str):
            return f"has no role in message {number}"
        if message.get("content") is not None and (problem := _text_problem(message["content"])):
            return f"has a message {number} whose content {problem}"
    if not any(message["role"] == "assistant" for message in value):
        return "has no message of the role 'assistant'"
    return None
