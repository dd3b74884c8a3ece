"""A checkpoint's manifest: the run's state, the shards' layout, and every file's size and checksum.

The manifest is written last, so a folder that has a good one is complete, and a file that differs
from what was written is found before anything is loaded from it. The checksums are against
accidents, not against people: whoever can write into the folder can seal it anew (engine/
tensor_files.py is what keeps such a file from running anything).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypedDict

import torch
import xxhash

from amid_ds.checkpoint.state import Layout, TrainState
from amid_ds.distributed.world import World
from amid_ds.errors import InputError, TrainingError
from amid_ds.files.atomic import fsync, replace_text
from amid_ds.run.folder import RunFolder

MANIFEST_FILE = "manifest.json"
# The folder of whole tensors that a checkpoint may hold beside its files (reshard.py).
CONSOLIDATED = "whole"
CHUNK_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class FileRecord(TypedDict):
    """Size and checksum of a file as it was written."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's own description.

    identity: what the run learns from, as flat keys (training/compatibility.py). files: by name.
    """

    state: TrainState
    layout: Layout
    identity: Mapping[str, object]
    files: Mapping[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Write the manifest of a folder that is complete, with a checksum of itself."""
        state = {**self.state.to_json(), "identity": self.identity, **self.layout.to_json()}
        content = {"state": state, "files": self.files}
        signed = {"content": content, "xxh3_128": _text_checksum(content)}
        replace_text(folder / MANIFEST_FILE, json.dumps(signed, indent=1))
        fsync(folder)

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises ValueError, with the reason, where it is missing or damaged.
        """
        try:
            signed = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
            content = signed["content"]
            if signed["xxh3_128"] != _text_checksum(content):
                raise ValueError
            state = content["state"]
            manifest = cls(TrainState.from_json(state), Layout.from_json(state), state["identity"],
                           content["files"])
            if not manifest._is_sound():
                raise ValueError
            return manifest
        except OSError as error:
            raise ValueError(f"no manifest: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError("the manifest is damaged") from None

    def _is_sound(self) -> bool:
        """True where the values can be a checkpoint's: some files, each by a plain name."""
        layout = self.layout
        counts = (layout.ranks, layout.tensor_parallel, layout.head_row_multiple)
        return (all(type(count) is int and count > 0 for count in counts)
                and layout.ranks % layout.tensor_parallel == 0
                and layout.zero_stage in (0, 1, 2, 3) and layout.student_dtype in ("bf16", "fp32")
                and layout.decayed in ("all", "matrices")
                and type(self.state.step) is int and self.state.step >= 0
                and type(self.state.tokens) is int and isinstance(self.identity, dict)
                and bool(self.files)
                and all(name == Path(name).name != MANIFEST_FILE and not name.startswith(".")
                        and type(record["bytes"]) is int and isinstance(record["xxh3_128"], str)
                        for name, record in self.files.items()))


def _text_checksum(content: object) -> str:
    return str(xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest())


class _HashingFile:
    """A file that computes the checksum of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, xxhash.xxh3_128(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, content: object) -> FileRecord:
    """Save `content` with torch.save, flushed to disk; returns its size and checksum."""
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        torch.save(content, hashing)   # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.size, "xxh3_128": hashing.hash.hexdigest()}


def checkpoint_name(step: int) -> str:
    """The folder's name of the checkpoint after optimizer step `step`."""
    return f"step_{step:08d}"


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, by its folder's name."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, good or damaged."""
    return sorted(path for path in folder.glob("step_*")
                  if path.is_dir() and path.name[5:].isdecimal())


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """The damage of a checkpoint in words; None where every file is as it was written.

    Reads every `parts`-th file whole, from `part` on, so that ranks can share the work. A file
    that the manifest does not list is damage too; hidden ones, which nothing opens, are not.
    """
    try:
        files = Manifest.read(checkpoint).files
        unlisted = sorted(path.name for path in checkpoint.iterdir()
                          if path.name not in (*files, MANIFEST_FILE, CONSOLIDATED)
                          and not path.name.startswith("."))
    except (ValueError, OSError) as error:
        return str(error)
    if unlisted:
        return f"{', '.join(unlisted)} is not in its manifest; move it out of the folder"
    for name, record in list(files.items())[part::parts]:
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return f"{name} is missing"
        if size != record["bytes"]:
            return f"{name} has {size} bytes of {record['bytes']}"
        if _file_checksum(path) != record["xxh3_128"]:
            return f"{name} does not have the checksum that it was written with"
    return None


def verify_together(checkpoint: Path, world: World) -> str | None:
    """`verify` by all ranks, each with its share of the files: the damage that the first found.

    Collective; a file that one rank cannot read is an error on every rank.
    """
    return world.first(world.run_checked(lambda: verify(checkpoint, world.rank, world.size)))


def _file_checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint to resume from (None: there is none at all) and the damaged newer ones."""

    checkpoint: Path | None
    damaged: frozenset[Path]


def find_latest_valid(folder: Path, world: World) -> ResumePoint:
    """The newest checkpoint that is good. Collective; each rank reads its share of the files.

    Each damaged one is named in a warning. Raises TrainingError where there are some and none is
    good: starting over would throw away what may still be rescued.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in world.run_on_main(lambda: list_checkpoints(folder))[::-1]:
        damage = verify_together(checkpoint, world)
        if damage is None:
            return ResumePoint(checkpoint, frozenset(damaged))
        logger.warning("the checkpoint %s is damaged and skipped: %s", checkpoint, damage)
        damaged[checkpoint] = damage
    if damaged:
        raise TrainingError(
            f"none of the {len(damaged)} checkpoint(s) in {folder} is good; "
            f"the newest: {next(iter(damaged.values()))}\n"
            "  the run does not start over by itself: restore one, "
            "or move the folder away to begin again")
    return ResumePoint(None, frozenset())


def manifest_of(checkpoint: Path) -> Manifest | None:
    """The checkpoint's manifest; None where that is damaged."""
    try:
        return Manifest.read(checkpoint)
    except ValueError:
        return None


def newest_state(run: RunFolder) -> TrainState | None:
    """The state of the run's newest checkpoint whose manifest can be read; None without one."""
    manifests = map(manifest_of, list_checkpoints(run.checkpoints)[::-1])
    return next((manifest.state for manifest in manifests if manifest is not None), None)


def print_checkpoints(run: str) -> None:
    """`amid-ds checkpoints RUN`: each with step, size, layout and verdict, the best one marked."""
    from rich.table import Table

    from amid_ds.run.console import PlainConsole

    folder = RunFolder(Path(run))
    if not folder.exists:
        raise InputError(f"{run} is not the folder of a run",
                         "a folder with recipe.yaml and checkpoints/", "check the path")
    table = Table(title=str(folder.checkpoints))
    for column in ("checkpoint", "step", "MB", "layout", "verdict"):
        table.add_column(column, justify="right" if column in ("step", "MB") else "left",
                         overflow="fold")
    newest = newest_state(folder)
    best = None if newest is None else newest.best
    for path in list_checkpoints(folder.checkpoints):
        manifest = manifest_of(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        step, verdict = checkpoint_step(path), verify(path) or "good"
        if best is not None and best["step"] == step:
            verdict += ", the best evaluation's"
        table.add_row(path.name, str(step), f"{size / 1e6:,.1f}",
                      "?" if manifest is None else str(manifest.layout), verdict)
    PlainConsole().print(table)
