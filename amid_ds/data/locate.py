"""The files of a source: a file, a folder, a glob, what `datasets` saved, or a data set of the hub.

What `datasets` wrote is read as `datasets` would: the files that it lists, in its order, and of
these the rows of the split. Beside them it leaves files of its own, which hold other rows.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from typing_extensions import NotRequired, TypedDict

from amid_ds.config.recipe import Source
from amid_ds.config.typed_json import parse_as
from amid_ds.data.manifest import FileIdentity
from amid_ds.data.readers import (
    COMPRESSION_CODECS,
    FILE_FORMATS,
    TEXT_FORMATS,
    DataFile,
    file_format,
)
from amid_ds.data.tables import count_arrow_rows
from amid_ds.errors import InputError

HUB_ID_PATTERN = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Written by `datasets` beside the data.
SAVED_DICT, SAVED_STATE, SAVED_INFO = "dataset_dict.json", "state.json", "dataset_info.json"
# The results of `map`, `filter` and `shuffle`, which it keeps beside a data set's own files.
DATASETS_CACHE = re.compile(r"cache-[0-9a-f]{16}\w*\.arrow")
# Python's and archivers' own folders; `datasets` passes over them too.
SPECIAL_FOLDER = "__"
_T = TypeVar("_T")


class _SavedDict(TypedDict):
    """What is read of SAVED_DICT."""

    splits: list[str]


class _SavedFile(TypedDict):
    filename: str


class _SavedState(TypedDict):
    """What is read of SAVED_STATE."""

    _data_files: list[_SavedFile]
    _split: NotRequired[str | None]
    _indices_files: NotRequired[object]
    _indices_data_files: NotRequired[object]


def source_files(source: Source) -> list[DataFile]:
    """The files of a source: in the order that `datasets` gives, or else sorted.

    Raises InputError if there are none, one is empty or of an unknown format, or `split` names
    rows that cannot be told.
    """
    path = source.path
    if _is_saved(path):
        files = _saved_files(path, source)
    elif is_hub_id(path):
        files = _split_files(source.split, _hub_splits(source), path)
    else:
        _require_no_split(source)
        files = list(_plain_files(source))
    if not files:
        raise InputError(
            f"the data source {path!r} is not there, or has no files of a known kind",
            f"a file, a folder or a glob of files ending in {_known_formats()}, or a data set on "
            "the hub; hidden files are passed over unless named",
            f"check the path; relative paths are relative to {os.getcwd()}")
    for file in files:
        _require_usable_file(file.path, source)
    return files


def is_hub_id(path: str) -> bool:
    """True for a path to look up on the hub: `name` or `owner/name`, and nothing local.

    A path with a known ending, or whose owner is a folder here, is taken for a mistyped local one:
    the hub answers those only after many tries.
    """
    owner = path.rpartition("/")[0]
    return (HUB_ID_PATTERN.fullmatch(path) is not None and file_format(path) is None
            and not os.path.exists(path) and not os.path.isdir(owner))


def file_identities(source: Source, files: Sequence[DataFile]) -> list[FileIdentity]:
    """[name, size, modification time] of each file, and of a part of one its first row and the one
    after its last: equal while the rows are the same.

    A file of the hub is named by the end of its path in the cache, which holds the data set's
    commit, and has no time: the cache may be anywhere, and be written again.
    """
    identities: list[FileIdentity] = []
    for file in files:
        status = os.stat(file.path)
        name, time = file.path, status.st_mtime_ns
        if is_hub_id(source.path):
            name, time = "/".join(Path(file.path).parts[-3:]), 0
        rows = [] if file.is_whole else [file.first, file.stop]
        identities.append([name, status.st_size, time, *rows])
    return identities


def _plain_files(source: Source) -> Iterator[DataFile]:
    """The files of a file, a folder or a glob. Hidden ones must be named."""
    path = source.path
    if os.path.isdir(path):
        yield from _folder_files(path, source)
    elif os.path.exists(path):
        yield DataFile(path)
    else:
        for file in sorted(glob.glob(path, recursive=True)):
            if os.path.isfile(file) and not _is_special(file, path):
                yield DataFile(file)


def _folder_files(folder: str, source: Source) -> Iterator[DataFile]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name
        if name.startswith(".") or _is_special(entry.path, os.path.join(folder, "*")):
            continue
        if entry.is_dir(follow_symlinks=False):
            if name.startswith(SPECIAL_FOLDER):
                continue
            yield from (_saved_files if _is_saved(entry.path) else _folder_files)(entry.path,
                                                                                 source)
        elif (entry.is_file() and file_format(name)
              and name not in (SAVED_DICT, SAVED_STATE, SAVED_INFO)):
            yield DataFile(str(Path(entry.path)))


def _is_special(file: str, pattern: str) -> bool:
    """True for a file that nobody means by a pattern: in a special folder, or a cache of `datasets`
    that the pattern does not name."""
    def special_folders(path: str) -> int:
        return sum(part.startswith(SPECIAL_FOLDER) for part in Path(path).parts[:-1])

    name = os.path.basename(file)
    is_cache = DATASETS_CACHE.fullmatch(name) and not os.path.basename(pattern).startswith("cache-")
    return bool(is_cache) or special_folders(file) > special_folders(pattern)


def _is_saved(folder: str) -> bool:
    """True for a folder that `save_to_disk` made."""
    has = {name for name in (SAVED_DICT, SAVED_STATE, SAVED_INFO)
           if os.path.isfile(os.path.join(folder, name))}
    return SAVED_DICT in has or {SAVED_STATE, SAVED_INFO} <= has


def _saved_files(folder: str, source: Source) -> list[DataFile]:
    """What `load_from_disk` gives of the source's split: the files that the folder lists."""
    if not os.path.isfile(os.path.join(folder, SAVED_DICT)):
        name, files = _saved_split(folder)
        # The folder is one split, and its path names it well enough.
        return _split_files(source.split,
                            {"train" if source.split == "train" else name: files}, folder)
    names = _read_saved(_SavedDict, folder, SAVED_DICT)["splits"]
    splits = {name: _saved_split(os.path.join(folder, name))[1] for name in names}
    if not source.names_split and len(splits) > 1:
        raise InputError(f"the data set in {folder} has the splits {', '.join(splits)}, and the "
                         "source names none", "the split to read",
                         "name it: `split: train` in the recipe, `--split train` in `eval`")
    return _split_files(source.split, splits, folder)


def _saved_split(folder: str) -> tuple[str, list[str]]:
    """(the name, the files) of the data set in a folder."""
    state = _read_saved(_SavedState, folder, SAVED_STATE)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise InputError(f"the data set in {folder} is a selection of its rows, as early versions "
                         "of `datasets` saved them", "rows without a list of indices",
                         "load it with that version, `flatten_indices()`, and save it again")
    files = [str(Path(folder, file["filename"])) for file in state["_data_files"]]
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise InputError(f"the data set in {folder} has lost its file {missing[0]}",
                         f"every file that its {SAVED_STATE} lists", "copy or save it again")
    return state.get("_split") or "train", files


def _read_saved(kind: type[_T], folder: str, name: str) -> _T:
    path = Path(folder, name)
    try:
        return parse_as(kind, path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the file {path} cannot be read: {error}", "what `save_to_disk` wrote",
                         "copy or save the data set again") from None


def _split_files(split: str, splits: Mapping[str, Sequence[str]], where: str) -> list[DataFile]:
    """The files, or parts of files, of a split or of a slice such as `train[:10%]+test`.

    splits: the files of each.
    """
    import datasets

    if splits.get(split):
        return [DataFile(file) for file in splits[split]]
    counts = {name: [count_arrow_rows(file) for file in files] for name, files in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(
            {name: sum(rows) for name, rows in counts.items()})
    except (ValueError, AssertionError) as error:
        raise InputError(f"the split {split!r} of the data set {where!r}: {error}",
                         f"one of its splits, {', '.join(splits)}, or a slice of them such as "
                         f"{next(iter(splits), 'train')}[:10%]", "name one in `split`") from None
    chosen = []
    for part in parts:
        begin = 0
        for file, rows in zip(splits[part.splitname], counts[part.splitname], strict=True):
            first, stop = max(part.from_ - begin, 0), min(part.to - begin, rows)
            if first < stop:
                chosen.append(DataFile(file, first, stop))
            begin += rows
    if not chosen:
        raise InputError(f"the split {split!r} of the data set {where!r} has no row",
                         "at least one", "name a larger slice in `split`")
    return chosen


def _hub_splits(source: Source) -> dict[str, list[str]]:
    """By split, the Arrow files of a hub data set in the cache of `datasets`, downloaded if need
    be."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.config, revision=source.revision)
    except Exception as error:
        # datasets and the hub raise whatever their many loaders raise.
        raise InputError(f"the data source {source.path!r} is no file or folder here, and no data "
                         f"set on the hub that can be loaded: {first_line_of(error)}",
                         "a path, or the id of a data set that can be reached or is in the cache",
                         "check the path, `config` and `revision`; load it once with a network"
                         ) from None
    return {str(name): [file["filename"] for file in part.cache_files]
            for name, part in loaded.items()}


def _require_no_split(source: Source) -> None:
    """Raise InputError for a split of files that have none. `datasets` finds those of a stream."""
    if source.split != "train" and not source.stream:
        raise InputError(f"`split: {source.split}` of {source.path!r}, whose files have no splits",
                         "a data set on the hub or of `save_to_disk`, or no split",
                         "name the files of the split by a glob, or save the data set with "
                         "`save_to_disk`")


def _require_usable_file(file: str, source: Source) -> None:
    name = file_format(file)
    if name is None:
        raise InputError(f"the data file {file!r} is of a kind that is not known",
                         f"one of {_known_formats()}",
                         "convert it, or rename it if it is one of these")
    if not os.access(file, os.R_OK):
        raise InputError(f"the data file {file!r} may not be read", "a file that may be read",
                         "change its permissions, or name another")
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


def first_line_of(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
