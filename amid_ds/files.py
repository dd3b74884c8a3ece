"""Files that are whole or not there at all: atomic replacement, JSON lines that survive a
crash, flushing, free space."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from amid_ds.errors import InputError


def truncate_jsonl(path: Path, step: int) -> None:
    """Keep the lines of `path` up to `step`; a last line that a crash cut short goes too. Replaced in one rename."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    replace_text(path, "".join(kept))


def replace_text(path: Path, text: str) -> None:
    """`path` holds either what it held or all of `text`, also after a crash."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, but for one that a crash cut short; none where there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def fsync(path: Path) -> None:
    """A file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_disk_space(folder: Path, needed: int, work: str, otherwise: str) -> None:
    """Raise InputError where the file system of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{work} needs {needed / 1e6:,.1f} MB, {folder} has {free / 1e6:,.1f} MB free",
                         "room for it on that file system", f"make room there, or {otherwise}")
