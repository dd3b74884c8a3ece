"""A folder of targets while it is written: one plan, and shards that jobs claim one by one.

Any number of jobs may work by one plan. Each shard has a lease, held from its first row to its
last: a job takes the shards that nobody has, and at the end waits for those of others, or makes
them if these die. A shard becomes a file at once, when all its rows are there; so a killed job
loses the shards that it had begun. plan.json is the folder's sign.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from amid_ds.data.arrow_shard import file_sha256
from amid_ds.data.manifest import (
    PREPARED_MANIFEST,
    PREPARED_PLAN,
    SHARD_FOLDER,
    damaged_json,
    read_typed,
    write_json,
)
from amid_ds.data.prepared_folder import LEFTOVER_SHARD_FILE, first_difference, remove_own_files
from amid_ds.data.target_shard import EncodedRow, position_count, write_target_rows
from amid_ds.data.targets import (
    TARGET_FORMAT,
    TargetManifest,
    TargetShardCounts,
    plan_json,
    read_target_manifest,
    read_target_plan,
    target_shard_path,
)
from amid_ds.errors import InputError
from amid_ds.files.atomic import fsync
from amid_ds.files.lease import Lease, LeaseHeldError
from amid_ds.files.ownership import require_own_folder

LEFTOVER_LEASE = re.compile(r"\d{6,}\.lease\.json(\..+)?")


class TargetWork:
    """What is left to do in the folder `folder` by the plan `manifest`. On rank 0."""

    def __init__(self, folder: Path, manifest: TargetManifest) -> None:
        self.folder, self.manifest = folder, manifest
        # A folder has thousands of shards: those that were seen finished are not looked at again.
        self._left = list(range(manifest.shards))
        self._digest = hashlib.sha256(json.dumps(plan_json(manifest)).encode()).hexdigest()
        self._held: dict[int, Lease] = {}

    def start(self) -> bool:
        """Make the folder ready for shards of the plan; False: all are there, with their manifest.

        Finished shards of the same plan stay. Raises InputError for a folder of another plan, or
        one that is not ours, or cannot be written.
        """
        try:
            present = read_target_plan(self.folder)
            require_own_folder(self.folder, present is not None, "--out")
            (self.folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
            if not (self.folder / PREPARED_PLAN).exists():
                # Before any shard: it is the sign that the folder is ours.
                write_json(self.folder / PREPARED_PLAN, plan_json(self.manifest))
        except OSError as error:
            raise InputError(f"the folder {self.folder} cannot be written: {error}",
                             "a folder that can be written", "name another with --out") from None
        self._require_plan()
        return read_target_manifest(self.folder) is None

    def _require_plan(self) -> None:
        present = read_target_plan(self.folder)
        if present != self.manifest:
            difference = first_difference(None if present is None else plan_json(present),
                                          plan_json(self.manifest))
            raise InputError(f"{self.folder} is of something else: {difference}",
                             "the data, tokenizer, teacher and options that it was begun with",
                             "name another --out, or remove this folder")

    def missing(self) -> list[int]:
        """The shards that are not finished, by anybody."""
        self._left = [number for number in self._left if not self._is_finished(number)]
        return list(self._left)

    def finished_positions(self) -> int:
        """The labelled positions of all finished shards."""
        left = set(self.missing())
        return sum(self._counts(number)["positions"] for number in range(self.manifest.shards)
                   if number not in left)

    def _is_finished(self, number: int) -> bool:
        return self._counts_path(number).exists()

    def claim(self, wait: bool) -> int | None:
        """A shard that is now this job's to make, its lease held; None: others have all.

        Without `wait` shards with a lease are left alone. With it the holder of one is looked at,
        of another one each time, which takes up to a minute; those of the dead are taken over.
        """
        for number in list(self._left):
            if number in self._held:
                continue
            if self._is_finished(number):
                self._left.remove(number)
                continue
            if self._lease_path(number).exists() and not wait:
                continue
            try:
                self._held[number] = Lease.take(
                    self._lease_path(number), f"the shard {target_shard_path(self.folder, number)}")
            except LeaseHeldError:
                if not wait:
                    continue
                # Behind the others, for the next look.
                self._left.remove(number)
                self._left.append(number)
                return None
            if not self._is_finished(number):
                return number
            # Its last holder has just finished it.
            self.give_back(number)
        return None

    def finish(self, number: int, rows: Sequence[EncodedRow]) -> None:
        """Write a claimed shard, whose rows these are, all or nothing; give back its lease."""
        path = target_shard_path(self.folder, number)
        temporary = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
        try:
            write_target_rows(temporary, rows, self.manifest.layout)
            fsync(temporary)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        size, digest = temporary.stat().st_size, file_sha256(temporary)
        self._held[number].check()
        os.replace(temporary, path)
        counts: TargetShardCounts = {
            "plan": self._digest, "rows": len(rows), "positions": sum(map(position_count, rows)),
            "bytes": size, "sha256": digest}
        write_json(self._counts_path(number), counts)
        self.give_back(number)

    def give_back(self, number: int) -> None:
        """Let go of a claimed shard."""
        self._held.pop(number).release()

    def give_back_all(self) -> None:
        """Let go of all claimed shards, at any end."""
        for number in list(self._held):
            self.give_back(number)

    def publish(self) -> None:
        """Write the manifest once every shard is there, and remove what killed jobs have left.

        Several jobs may: they write the same.
        """
        shards = [self._counts(number) for number in range(self.manifest.shards)]
        self._require_plan()
        write_json(self.folder / PREPARED_MANIFEST, {"plan": plan_json(self.manifest),
                                                     "shards": shards})
        for pattern in (LEFTOVER_SHARD_FILE, LEFTOVER_LEASE):
            remove_own_files(self.folder / SHARD_FOLDER, pattern)

    def _counts(self, number: int) -> TargetShardCounts:
        path = self._counts_path(number)
        counts = read_typed(path, TargetShardCounts, TARGET_FORMAT)
        if counts is None or counts["rows"] != len(self.manifest.shard_range(number)):
            raise damaged_json(path, "it is not there, or of another number of rows")
        if counts["plan"] != self._digest:
            raise InputError(f"the shard {path} was made by another plan than {self.folder}'s",
                             "one plan in a folder", f"remove {path} and start again")
        return counts

    def _counts_path(self, number: int) -> Path:
        return target_shard_path(self.folder, number).with_suffix(".json")

    def _lease_path(self, number: int) -> Path:
        return target_shard_path(self.folder, number).with_suffix(".lease.json")
