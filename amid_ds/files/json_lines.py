"""JSON lines that survive a crash."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from amid_ds.files.atomic import replace_text


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, without one that a crash cut short; [] without a file."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def truncate_jsonl(path: Path, step: int) -> None:
    """Keep the lines of `path` with a `step` of at most `step`, none that a crash cut short."""
    if path.exists():
        kept = [line for line in read_jsonl(path) if line["step"] <= step]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
