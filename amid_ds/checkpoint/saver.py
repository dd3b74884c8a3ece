"""Checkpoints that cannot be lost, written while the training goes on.

DeepSpeed decides what its shards hold; we decide how they reach the disk. `Saver.start` has them
copied to host memory, which is all that training waits for; a thread writes the copy into a hidden
folder, flushes every file and computes its checksum on the way. When every rank's files are on
disk, one rename commits the folder, then `latest` moves, then a thread removes old ones. So a
checkpoint is there whole or not at all, whenever a rank or the machine dies. The price is host
memory for one copy of a rank's shards, on a CPU while it is written, on a GPU always; a save that
is due before the last one is written waits. The teacher is in none of them.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from amid_ds.checkpoint.manifest import (
    FileRecord,
    Manifest,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    write_file,
)
from amid_ds.checkpoint.state import Layout, TrainState
from amid_ds.config.recipe import CheckpointPolicy
from amid_ds.engine.backend import recovery_script
from amid_ds.engine.engine import Engine
from amid_ds.errors import TrainingError
from amid_ds.files.atomic import fsync, replace_text
from amid_ds.files.lease import UNFENCED, Fence, LeaseLostError

# What a save is called while it is written, replaced or removed; `tmp` without a token is of runs
# before there were any.
UNFINISHED = re.compile(r"\.(?P<final>step_\d+)(\.\w+)?\.(?P<state>tmp|replaced|old)")
# After so many saves in a row that failed the run stops.
FAILURES_IN_A_ROW = 3

logger = logging.getLogger(__name__)


@dataclass
class _Save:
    """A save under way: the state that it keeps, its thread, and this rank's outcome."""

    state: TrainState
    staging: Path
    thread: threading.Thread | None = None
    written: dict[str, FileRecord] = field(default_factory=dict)
    error: str | None = None


class Saver:
    """The saves of one attempt.

    Every method but `writing` is collective: all ranks call it at the same step. identity: what the
    run learns from, for the manifest. damaged: checkpoints that do not count. fence: the right to
    write in `folder`. on_commit: called on rank 0 with the step of each checkpoint that is there;
    on_failure: on every rank with the step of each that could not be saved.
    """

    def __init__(self, engine: Engine, folder: Path, policy: CheckpointPolicy,
                 identity: Mapping[str, object], damaged: frozenset[Path] = frozenset(),
                 fence: Fence = UNFENCED,
                 on_commit: Callable[[int], None] = lambda step: None,
                 on_failure: Callable[[int], None] = lambda step: None) -> None:
        self.fence, self.on_commit, self.on_failure = fence, on_commit, on_failure
        self.engine, self.folder, self.policy, self.identity = engine, folder, policy, identity
        self.world, self.damaged = engine.world, damaged
        self.layout = layout_of(engine)
        self.failures = 0
        self._save: _Save | None = None
        # Removes what the last commit has replaced or made superfluous, on rank 0.
        self._removal: threading.Thread | None = None
        self.world.run_on_main(self._remove_unfinished)
        self.file_system = _file_system(folder)

    @property
    def writing(self) -> bool:
        """True while this rank is still writing; asked at every step."""
        return (self._save is not None and self._save.thread is not None
                and self._save.thread.is_alive())

    @property
    def pending(self) -> bool:
        """True from `start` until `finish`, on every rank alike."""
        return self._save is not None

    def start(self, state: TrainState, extra_files: Mapping[str, object] | None = None) -> None:
        """Copy what a checkpoint holds to host memory and begin to write it.

        `state` goes into the manifest. extra_files: contents by file name that this rank adds; they
        must not change from here on.
        """
        if self.pending:
            logger.info("the previous save is still being written: waiting for it")
            # On a GPU the next copy takes the place of the last one.
            self.finish()
        contents = {**self.engine.stage_checkpoint(), **(extra_files or {})}
        # No other attempt writes under this name, not even one that was cut off and came back.
        name = f".{checkpoint_name(state.step)}.{self.fence.token}.tmp"
        save = _Save(replace(state), self.folder / name)
        save.thread = threading.Thread(target=self._write, args=(save, contents),
                                       name="checkpoint", daemon=True)
        self._save = save
        save.thread.start()

    def _write(self, save: _Save, contents: dict[str, object]) -> None:
        """Write this rank's files into the hidden folder, in the background.

        `finish` reports an error.
        """
        try:
            if _file_system(self.folder) != self.file_system:
                raise OSError(f"{self.folder} is on another file system than when the run began: "
                              "it is no longer mounted")
            self._wait_for_removal()
            save.staging.mkdir(exist_ok=True)
            for name in list(contents):
                save.written[name] = write_file(save.staging / name, contents.pop(name))
        except Exception as error:
            save.error = f"rank {self.world.rank}: {type(error).__name__}: {error}"

    def join(self) -> None:
        """Wait until this rank has written."""
        if self._save is not None and self._save.thread is not None:
            self._save.thread.join()

    def finish(self) -> None:
        """Wait until every rank has written, then commit.

        A failure is logged and the training goes on: older checkpoints are untouched. Raises
        TrainingError after the third failure in a row, LeaseLostError where another process has
        taken over the run.
        """
        save = self._save
        if save is None:
            return
        self.join()
        problem: str | LeaseLostError | None = self.world.first(save.error)
        if problem is None:
            # Rank 0 alone writes the manifest.
            written = self.world.collect(save.written)
            problem = self.world.broadcast(self._commit(save, written or []))
            if isinstance(problem, LeaseLostError):
                raise problem
        self._save = None
        if problem is None:
            self.failures = 0
            return
        self.failures += 1
        self.on_failure(save.state.step)
        if self.world.is_main:
            shutil.rmtree(save.staging, ignore_errors=True)
        # No rank begins the next save while this one is removed.
        self.world.barrier()
        message = (f"SAVE FAILED after step {save.state.step} ({self.failures} in a row): "
                   f"{problem}")
        logger.warning(message)
        if self.failures == FAILURES_IN_A_ROW:
            raise TrainingError(f"{message}\n  the last good checkpoint is untouched; make room or "
                                f"fix the file system under {self.folder} and start again")

    def close(self) -> None:
        """`finish`, and wait until old checkpoints are removed."""
        self.finish()
        self._wait_for_removal()

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()

    def _commit(self, save: _Save,
                written: Sequence[Mapping[str, FileRecord]]) -> str | LeaseLostError | None:
        """On rank 0, the one rename. Returns None, or the reason why it failed.

        written: by rank, on rank 0.
        """
        if not self.world.is_main:
            return None
        files = {name: record for of_rank in written for name, record in of_rank.items()}
        final = self.folder / checkpoint_name(save.state.step)
        try:
            self.fence.check()
            if not (self.folder / "zero_to_fp32.py").exists():
                shutil.copy(recovery_script(), self.folder / "zero_to_fp32.py")
            Manifest(save.state, self.layout, self.identity, files).write(save.staging)
            replaced = self.folder / f".{final.name}.replaced"
            if final.exists():
                # A damaged one of this step, or this step once more: the new one replaces it.
                os.replace(final, replaced)
            os.replace(save.staging, final)
            fsync(self.folder)
            replace_text(self.folder / "latest", final.name)
            self.damaged -= {final}
            self.on_commit(save.state.step)
            self.fence.check()
            self._remove([replaced, *self._hide_old(save.state)])
        except OSError as error:
            return f"rank 0, commit: {error}"
        except LeaseLostError as error:
            return error
        return None

    def _hide_old(self, state: TrainState) -> list[Path]:
        """Hide all but the newest `keep` good ones, the milestones, and the best by `state`;
        returns the new paths.

        A half-removed one must not be taken for a good one.
        """
        best = None if state.best is None else state.best["step"]
        good = [path for path in list_checkpoints(self.folder) if path not in self.damaged]
        hidden = []
        for path in good[:-self.policy.keep]:
            step, milestones = checkpoint_step(path), self.policy.keep_every
            if step != best and (not milestones or step % milestones):
                hidden.append(path.with_name(f".{path.name}.old"))
                os.replace(path, hidden[-1])
        return hidden

    def _remove(self, folders: list[Path]) -> None:
        """Remove the folders in a thread: training would wait longer for that than for the rest of
        the commit."""
        def remove() -> None:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

        self._removal = threading.Thread(target=remove, name="old checkpoints", daemon=True)
        self._removal.start()

    def _remove_unfinished(self) -> None:
        """Remove what earlier attempts left half-written or half-removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            name = UNFINISHED.fullmatch(path.name)
            if name is None:
                continue
            final = self.folder / name["final"]
            if name["state"] == "replaced" and not final.exists():
                # The attempt died between two renames of `_commit`.
                os.replace(path, final)
            else:
                shutil.rmtree(path, ignore_errors=True)


def layout_of(engine: Engine) -> Layout:
    """The layout in which `engine` saves."""
    return Layout.of(engine.world, engine.zero_stage, engine.student_dtype, engine.decayed,
                     engine.split_kinds)


def _file_system(folder: Path) -> int | None:
    """The number of the file system that `folder` is on; None where it cannot be read."""
    try:
        return folder.stat().st_dev
    except OSError:
        return None
