"""The JSON files of a prepared folder: their names, their keys, and reading and writing them.

    plan.json             all that the shards' bytes depend on; written first
    shards/000000.json    counts and checksum of one shard; written after its .arrow file
    manifest.json         the plan, the totals and every shard; written last, so it marks completion

The keys are a file format: folders prepared by earlier versions have to open. So they are typed
here as they are on disk (`places` are model inputs: a row of n tokens has n - 1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

from amid_ds.errors import InputError
from amid_ds.files.atomic import replace_text

# 3: conversations, prompts with their responses, and long texts are encoded whole.
PREPARED_FORMAT = 3
PREPARED_MANIFEST, PREPARED_PLAN, SHARD_FOLDER = "manifest.json", "plan.json", "shards"

# [name, size in bytes, modification time in ns]. A list, since JSON reads back no tuple.
FileIdentity = list["str | int"]


class SourcePlan(TypedDict):
    """One source of a plan."""

    path: str
    fields: list[str]
    template: list[str] | str | dict[str, str] | None
    truncate: str
    isolate: bool
    files: list[FileIdentity]


class PreparedPlan(TypedDict):
    """The content of plan.json."""

    format: int
    seq_length: int
    tokenizer: str
    sources: list[SourcePlan]


class _Counts(TypedDict):
    rows: int
    places: int
    tokens: int
    documents: int
    truncated: int
    dropped: int
    skipped: int
    shown: list[str]
    noted: dict[str, int]


class ShardCounts(_Counts):
    """The content of one shard's JSON file. lines: [file, number of its lines in the shard]."""

    source: int
    lines: list[tuple[int, int]]
    bytes: int
    sha256: str


class SourceTotals(_Counts):
    """The counts of one source over all its shards."""

    path: str


class ShardEntry(TypedDict):
    """One shard of a manifest. first_line: by file, the lines of it in earlier shards."""

    name: str
    source: int
    rows: int
    first_line: dict[str, int]
    bytes: int
    sha256: str


class PreparedManifest(TypedDict):
    """The content of manifest.json."""

    plan: PreparedPlan
    sources: list[SourceTotals]
    shards: list[ShardEntry]


def read_prepared_manifest(folder: Path) -> PreparedManifest | None:
    """The manifest of a prepared folder, or None while it has none."""
    return cast("PreparedManifest | None", read_json(folder / PREPARED_MANIFEST))


def read_prepared_plan(folder: Path) -> PreparedPlan | None:
    """The plan that a folder's shards are made by, or None in a folder without one."""
    manifest = read_prepared_manifest(folder)
    if manifest is not None:
        return manifest["plan"]
    return cast("PreparedPlan | None", read_json(folder / PREPARED_PLAN))


def read_shard_counts(path: Path) -> ShardCounts:
    """The counts of a finished shard."""
    counts = read_json(path)
    assert counts is not None, f"{path} belongs to a finished shard"
    return cast(ShardCounts, counts)


def shard_path(folder: Path, name: str) -> Path:
    """The Arrow file of the shard `name` of a prepared folder."""
    return folder / SHARD_FOLDER / f"{name}.arrow"


def read_json(path: Path) -> Mapping[str, object] | None:
    """The JSON object in a file, or None without the file. Raises InputError for other content."""
    try:
        loaded: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"the file {path} is damaged: {error}", "the JSON that was written",
                         "remove it, and prepare again") from None
    return loaded


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Replace a file by a JSON object: readers see the old content or the new one, no part."""
    replace_text(path, json.dumps(value, indent=1) + "\n")
