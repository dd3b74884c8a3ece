"""A checkpoint's manifest: its state and the size and checksum of every file; listing,
verifying and choosing checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from amid_ds.distributed.world import World
from amid_ds.errors import InputError, TrainingError
from amid_ds.files import (
    fsync,
    replace_text,
)

MANIFEST = "manifest.json"       # state, layout, and every file's size and checksum; written last


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a folder that is complete, with a checksum of itself."""
    text = json.dumps(content, sort_keys=True)
    sealed = {"content": content, "xxh3_128": xxhash.xxh3_128(text.encode()).hexdigest()}
    replace_text(folder / MANIFEST, json.dumps(sealed, indent=1))
    fsync(folder)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """{"state", "files"} of a checkpoint. Raises ValueError, saying what is wrong, where it is gone or damaged."""
    try:
        sealed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        content: dict[str, Any] = sealed["content"]
        text = json.dumps(content, sort_keys=True)
        intact = sealed["xxh3_128"] == xxhash.xxh3_128(text.encode()).hexdigest()
    except OSError as error:
        raise ValueError(f"no manifest: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError("the manifest is damaged") from None
    if not intact:
        raise ValueError("the manifest is damaged")
    return content


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, good or damaged."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit())


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint; None where every file is as it was written. Reads every `parts`-th file whole,
    from `part` on, so that ranks can share the work."""
    try:
        files = read_manifest(checkpoint)["files"]
    except ValueError as error:
        return str(error)
    for name, facts in list(files.items())[part::parts]:
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts["bytes"]:
            return f"{name} is missing" if size is None else f"{name} has {size} bytes of {facts['bytes']}"
        if _checksum(path) != facts["xxh3_128"]:
            return f"{name} does not have the checksum that it was written with"
    return None


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint to resume from (None: there is none at all) and the newer ones that were passed over."""

    checkpoint: Path | None
    damaged: frozenset[Path]


def find_latest_valid(folder: Path, world: World, warn: Callable[[str], None]) -> ResumePoint:
    """The newest checkpoint that is good. Collective; each rank reads its share of the files.

    Each damaged one is named loudly. Raises TrainingError where there are some and none is good: starting over would
    throw away what may still be rescued.
    """
    passed: list[Path] = []
    for checkpoint in world.run_on_main(lambda: list_checkpoints(folder))[::-1]:
        wrong = [found for found in world.gather(verify(checkpoint, world.rank, world.size)) if found]
        if not wrong:
            return ResumePoint(checkpoint, frozenset(passed))
        warn(f"WARNING: the checkpoint {checkpoint} is damaged and passed over: {wrong[0]}")
        passed.append(checkpoint)
    if passed:
        raise TrainingError(f"none of the {len(passed)} checkpoint(s) in {folder} is good; the newest: "
                            f"{verify(passed[0])}\n  the run does not start over by itself: restore one, or move the "
                            f"folder away to begin again")
    return ResumePoint(None, frozenset())


def load_checkpoint(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Bring weights, optimizer and state back in the layout that they were saved in. Collective. Returns the state."""
    state: dict[str, Any] = read_manifest(checkpoint)["state"]
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
    if loaded is None:
        raise TrainingError(f"DeepSpeed could not load {checkpoint}")
    return state


def current_layout(world: World, zero_stage: int, student_dtype: str) -> dict[str, Any]:
    """What decides how DeepSpeed lays a model out over its files."""
    return {"ranks": world.size, "tensor_parallel": world.tp_size, "zero_stage": zero_stage,
            "student_dtype": student_dtype}


def layout_of(checkpoint: Path) -> dict[str, Any]:
    """The layout that a good checkpoint was saved in."""
    state = read_manifest(checkpoint)["state"]
    return {key: state[key] for key in ("ranks", "tensor_parallel", "zero_stage", "student_dtype")}


def describe_layout(layout: Mapping[str, Any]) -> str:
    return (f"{layout['ranks']} rank(s), tensor_parallel {layout['tensor_parallel']}, ZeRO stage "
            f"{layout['zero_stage']}, {layout['student_dtype']}")


def print_checkpoints(run: str) -> None:
    """`amid-ds checkpoints RUN`: each with step, size, layout and verdict."""
    from rich.console import Console
    from rich.table import Table

    folder = Path(run) / "checkpoints"
    if not (Path(run) / "recipe.yaml").is_file():
        raise InputError(f"{run} is not the folder of a run", "a folder with recipe.yaml and checkpoints/",
                         "check the path")
    table = Table(title=str(folder))
    for column in ("checkpoint", "step", "MB", "layout", "verdict"):
        table.add_column(column, justify="right" if column in ("step", "MB") else "left", overflow="fold")
    for path in list_checkpoints(folder):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        try:
            shown = describe_layout(layout_of(path))
        except ValueError:
            shown = "?"
        table.add_row(path.name, str(checkpoint_step(path)), f"{size / 1e6:,.1f}", shown, verify(path) or "good")
    Console(width=None).print(table)
