"""The JSON files of a prepared folder: their names, their keys, and reading and writing them.

    plan.json             all that the shards' bytes depend on; written first
    shards/000000.json    counts and checksum of one shard; written after its .arrow file
    manifest.json         the plan, the totals and every shard; written last, so it marks completion

The keys are a file format: folders prepared by earlier versions have to open. So they are typed
here as they are on disk (`places` are model inputs: a row of n tokens has n - 1), and checked
against these types when they are read: a file may be cut, or another program's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

# Checking needs it before Python 3.12.
from typing_extensions import TypedDict

from amid_ds.config.typed_json import parse_as
from amid_ds.errors import InputError
from amid_ds.files.atomic import replace_text

# 3: conversations, prompts with their responses, and long texts are encoded whole.
PREPARED_FORMAT = 3
PREPARED_MANIFEST, PREPARED_PLAN, SHARD_FOLDER = "manifest.json", "plan.json", "shards"

_T = TypeVar("_T")
# [name, size in bytes, modification time in ns], and of a part of a file its first row and the one
# after its last. A list, since JSON reads back no tuple.
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
    """The manifest of a prepared folder, or None while it has none. Raises InputError.

    Of one in another format its plan alone is of use: it differs from any plan of today.
    """
    path = folder / PREPARED_MANIFEST
    manifest = read_typed(path, PreparedManifest)
    if manifest is not None and manifest["plan"]["format"] == PREPARED_FORMAT:
        rows = Counter({number: 0 for number in range(len(manifest["sources"]))})
        for shard in manifest["shards"]:
            rows[shard["source"]] += shard["rows"]
        if (list(rows.values()) != [source["rows"] for source in manifest["sources"]]
                or len(manifest["plan"]["sources"]) != len(manifest["sources"])):
            raise damaged_json(path, "its shards do not add up to its sources")
    return manifest


def read_prepared_plan(folder: Path) -> PreparedPlan | None:
    """The plan that a folder's shards are made by, or None in a folder without one."""
    manifest = read_prepared_manifest(folder)
    if manifest is not None:
        return manifest["plan"]
    return read_typed(folder / PREPARED_PLAN, PreparedPlan)


def read_shard_counts(path: Path) -> ShardCounts:
    """The counts of a finished shard. Raises InputError."""
    counts = read_typed(path, ShardCounts)
    if counts is None:
        raise damaged_json(path, "it is not there")
    return counts


def first_row(identity: FileIdentity) -> int:
    """The first row of a file that is read: not 0 in a slice of a split."""
    return int(identity[3]) if len(identity) > 3 else 0


def shard_path(folder: Path, name: str) -> Path:
    """The Arrow file of the shard `name` of a prepared folder."""
    return folder / SHARD_FOLDER / f"{name}.arrow"


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Replace a file by a JSON object: readers see the old content or the new one, no part."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def read_typed(path: Path, kind: type[_T], version: int = PREPARED_FORMAT) -> _T | None:
    """The value in a JSON file, or None without the file. Raises InputError for other content.

    Of a plan in another format than `version`, or a manifest with one, its keys are not checked.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return cast(_T, json.loads(text)) if _is_other(version, text) else parse_as(kind, text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise damaged_json(path, str(error)) from None


def _is_other(version: int, text: str) -> bool:
    """True for a plan, or a manifest with one, of an earlier or later version."""
    value = json.loads(text)
    plan = value.get("plan", value) if isinstance(value, dict) else None
    found = plan.get("format", version) if isinstance(plan, dict) else version
    return isinstance(found, int) and found != version


def damaged_json(path: Path, problem: str) -> InputError:
    """The error for a JSON file of a folder of shards that is not as it was written."""
    return InputError(f"the file {path} is damaged, or another program's: {problem}",
                      "the JSON that `amid-ds prepare` or `amid-ds cache` wrote",
                      "if it is ours, remove it and run that command again; if not, name another "
                      "folder, in data.prepared or --out")
