"""Checkpoints that cannot be lost: save, find the newest good one, resume.

DeepSpeed decides what its shards hold; we decide how they reach the disk. `Saver.start` lets it "save" into host
memory, which is all that training waits for; a thread writes the copy into a hidden folder, flushes every file and
takes its checksum on the way. When every rank's files are on disk, one rename commits the folder, then `latest` moves,
then old ones go. So a checkpoint is there whole or not at all, whenever a rank or the machine dies. The price is host
memory for one copy of a rank's shards while it is written; a save that is due before the last one is written waits.
The teacher is in none of them.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from amid_ds.checkpoint.manifest import (
    checkpoint_name,
    checkpoint_step,
    current_layout,
    list_checkpoints,
    write_manifest,
)
from amid_ds.config.recipe import CheckpointPolicy
from amid_ds.distributed.world import World
from amid_ds.errors import TrainingError
from amid_ds.files import (
    fsync,
    replace_text,
)

FAILURES_IN_A_ROW = 3            # after as many saves that failed the run stops


class Saver:
    """The saves of one life of a run. Every method but `writing` is collective: all ranks call it at the same step."""

    def __init__(self, engine: Any, folder: Path, policy: CheckpointPolicy, world: World, say: Callable[[str], None],
                 damaged: frozenset[Path] = frozenset()) -> None:
        self.engine, self.folder, self.policy, self.world, self.say = engine, folder, policy, world, say
        self.damaged = damaged
        self.failures = 0
        self.state: dict[str, Any] | None = None      # of the save that is under way
        self.thread: threading.Thread | None = None
        self.written: dict[str, dict[str, Any]] | str = {}
        world.run_on_main(self._clean_up)
        self.device = _device(folder)

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing; asked at every step."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def pending(self) -> bool:
        return self.state is not None

    def start(self, state: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> None:
        """Copy what a checkpoint holds to host memory and begin to write it. `state` goes into the manifest; `more` is
        what this rank adds, by file name, and must not change from here on."""
        if self.pending:
            self.say("the save before this one is still being written: waiting for it")
            self.finish()
        staged = {**stage(self.engine), **(more or {})}
        dtype = "bf16" if self.engine.bfloat16_enabled() else "fp32"
        self.state = {**state, **current_layout(self.world, self.engine.zero_optimization_stage(), dtype)}
        self.thread = threading.Thread(target=self._write, args=(staged,), name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self, staged: dict[str, Any]) -> None:
        """In the background: this rank's files into the hidden folder; what came of it goes to `written`."""
        try:
            if _device(self.folder) != self.device:
                raise OSError(f"{self.folder} is on another file system than when the run began: a mount has gone")
            self._aside.mkdir(exist_ok=True)
            self.written = {name: write_file(self._aside / name, staged.pop(name)) for name in list(staged)}
        except Exception as error:      # told to all ranks by `finish`, as loud as in the foreground
            self.written = f"rank {self.world.rank}: {type(error).__name__}: {error}"

    def finish(self) -> None:
        """Wait until every rank has written, then commit, or say what failed. Raises TrainingError after the third
        failure in a row; the training goes on after the first two, and older checkpoints are untouched by any."""
        if self.thread is None or self.state is None:
            return
        self.thread.join()
        everyone = self.world.gather(self.written)
        wrong = [outcome for outcome in everyone if isinstance(outcome, str)]
        if not wrong:
            files = {name: facts for outcome in everyone for name, facts in outcome.items()}   # type: ignore[union-attr]
            outcome = self.world.gather(self._commit(files) if self.world.is_main else None)[0]
            wrong = [outcome] if outcome is not None else []
        step, self.state, self.thread = self.state["step"], None, None
        if not wrong:
            self.failures = 0
            return
        self.failures += 1
        if self.world.is_main:
            shutil.rmtree(self.folder / f".{checkpoint_name(step)}.tmp", ignore_errors=True)
        self.world.barrier()      # nobody begins the next save while this one is swept away
        message = f"SAVE FAILED after step {step} ({self.failures} in a row): {'; '.join(wrong)}"
        self.say(message)
        if self.failures == FAILURES_IN_A_ROW:
            raise TrainingError(f"{message}\n  the last good checkpoint is untouched; make room or mend the file "
                                f"system under {self.folder} and start again")

    @property
    def _aside(self) -> Path:
        assert self.state is not None
        return self.folder / f".{checkpoint_name(self.state['step'])}.tmp"

    def _commit(self, files: dict[str, dict[str, Any]]) -> str | None:
        """On rank 0: the one rename. None, or what went wrong."""
        assert self.state is not None
        final = self.folder / checkpoint_name(self.state["step"])
        try:
            write_manifest(self._aside, {"state": self.state, "files": files})
            replaced = self.folder / f".{final.name}.replaced"
            if final.exists():      # a damaged one of this step, or this step once more: the new one takes its place
                os.replace(final, replaced)
            os.replace(self._aside, final)
            fsync(self.folder)
            replace_text(self.folder / "latest", final.name)
            shutil.rmtree(replaced, ignore_errors=True)
            self.damaged -= {final}
            self._prune()
            _copy_recovery_script(self.folder)
        except OSError as error:
            return f"rank 0, commit: {error}"
        return None

    def _prune(self) -> None:
        """Keep the newest `keep` good ones and the milestones."""
        good = [path for path in list_checkpoints(self.folder) if path not in self.damaged]
        for path in good[:-self.policy.keep]:
            if not self.policy.keep_every or checkpoint_step(path) % self.policy.keep_every:
                hidden = path.with_name(f".{path.name}.old")      # a half-removed one must not be taken for a good one
                os.replace(path, hidden)
                shutil.rmtree(hidden, ignore_errors=True)

    def _clean_up(self) -> None:
        """Sweep away what earlier lives left half-written or half-removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".step_*"):
            if path.name.endswith(".replaced") and not (self.folder / path.name[1:].removesuffix(".replaced")).exists():
                os.replace(path, self.folder / path.name[1:].removesuffix(".replaced"))      # died between two renames
            else:
                shutil.rmtree(path, ignore_errors=True)


class _Staging:
    """Stands in for DeepSpeed's checkpoint engine during one save: what it is given to write goes to host memory."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.files: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are made where the files are written."""

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = _to_host(state_dict, {})


def stage(engine: Any) -> dict[str, Any]:
    """What this rank has to write, by file name, copied to host memory."""
    staging = _Staging(engine.checkpoint_engine)
    engine.checkpoint_engine = staging
    try:
        with tempfile.TemporaryDirectory() as elsewhere:      # DeepSpeed also copies its recovery scripts there
            engine.save_checkpoint(elsewhere, tag="staged", save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = staging.real
    return staging.files


def _to_host(value: Any, seen: dict[int, torch.Tensor]) -> Any:
    """A copy in host memory that the next optimizer step cannot change; a tensor that is there twice is copied once."""
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.detach().to("cpu", copy=True)
        return seen[id(value)]
    if isinstance(value, dict):
        twin = copy.copy(value)
        for key, item in value.items():
            twin[key] = _to_host(item, seen)
        return twin
    return type(value)(_to_host(item, seen) for item in value) if type(value) in (list, tuple) else value


class _Hashing:
    """A file that takes the checksum of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, xxhash.xxh3_128(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, content: Any) -> dict[str, Any]:
    with open(path, "wb") as file:
        hashing = _Hashing(file)
        torch.save(content, hashing)   # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.size, "xxh3_128": hashing.hash.hexdigest()}


def _device(folder: Path) -> int | None:
    try:
        return folder.stat().st_dev
    except OSError:
        return None


def _copy_recovery_script(folder: Path) -> None:
    """DeepSpeed's own way out of its shards, beside them, as its users expect it."""
    from deepspeed.utils import zero_to_fp32

    if not (folder / "zero_to_fp32.py").exists():
        shutil.copy(zero_to_fp32.__file__, folder / "zero_to_fp32.py")
