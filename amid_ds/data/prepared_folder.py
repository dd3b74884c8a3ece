"""A prepared folder among those who work in it: whose it is, and by which plan.

plan.json is the folder's sign and its lease. Several processes and jobs may work by one plan; who
has another one needs the folder alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path

from amid_ds.data.manifest import (
    PREPARED_MANIFEST,
    PREPARED_PLAN,
    SHARD_FOLDER,
    PreparedPlan,
    read_prepared_plan,
    write_json,
)
from amid_ds.errors import InputError
from amid_ds.files.lease import Lease
from amid_ds.files.ownership import require_own_folder

# The names that we write in the folder of shards: locks and temporary files of HOST.PID, also those
# of killed jobs; and the shards with their counts.
LEFTOVER_SHARD_FILE = re.compile(r"\d{6,}\.lock|\.?\d{6,}\.(json\.)?[\w.-]+\.\d+")
OWN_SHARD_FILE = re.compile(rf"\d{{6,}}\.(arrow|json)|{LEFTOVER_SHARD_FILE.pattern}")


def require_own_prepared(folder: Path) -> None:
    """Raise InputError unless `folder` may be prepared in: new, empty, or with a plan.json of ours.

    The parts of the data in it have plans of their own; locks alone are nobody's data.
    """
    plan = read_prepared_plan(folder)
    is_own = plan is not None and {"seq_length", "tokenizer", "sources"} <= plan.keys()

    def is_spared(entry: Path) -> bool:
        return entry.name in ("eval", "auxiliary") or (entry.name == SHARD_FOLDER and all(
            LEFTOVER_SHARD_FILE.fullmatch(file.name) for file in entry.iterdir()))

    require_own_folder(folder, is_own, "the folder for the prepared data", is_spared)


@contextlib.contextmanager
def shared_folder(folder: Path, plan: PreparedPlan, named: bool,
                   run_lease: Path | None) -> Iterator[None]:
    """Make the folder ready for shards of this plan, and share it with all who work by this plan.

    Finished shards of the same plan stay. The operating system frees the lock on plan.json when its
    holder dies. run_lease: see `prepare_all`.
    """
    with contextlib.ExitStack() as held:
        try:
            _start_plan(folder, plan, named, run_lease)
            file = held.enter_context(open(folder / PREPARED_PLAN, "rb"))
            fcntl.flock(file, fcntl.LOCK_SH)
            (folder / SHARD_FOLDER).mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {folder} for the prepared data cannot be written: "
                             f"{error}", "a folder that can be written",
                             "name another in data.prepared or output_dir") from None
        require_plan(folder, plan)
        yield


def require_plan(folder: Path, plan: PreparedPlan) -> None:
    """Raise InputError if another start, at the same time, has another plan for the folder."""
    present = read_prepared_plan(folder)
    if present != plan:
        raise _other_plan(folder, present, plan, "name another folder in data.prepared")


def _start_plan(folder: Path, plan: PreparedPlan, named: bool, run_lease: Path | None) -> None:
    """Write the plan, unless the folder has it already."""
    require_own_prepared(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = read_prepared_plan(folder)
    if not (folder / PREPARED_PLAN).exists():
        # Before anything else: it is the sign that the folder is ours.
        write_json(folder / PREPARED_PLAN, present or plan)
    if present is None or present == plan:
        return
    if named:
        raise _other_plan(folder, present, plan,
                          "name another folder in data.prepared, or remove this one")
    with Lease.held(run_lease, "the run") if run_lease else contextlib.nullcontext():
        _replace_plan(folder, plan)


def _replace_plan(folder: Path, plan: PreparedPlan) -> None:
    """Replace the plan, and remove the shards that the old one had; refused while they are made."""
    with open(folder / PREPARED_PLAN, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is being prepared by another process, from other data, or "
                             "with another tokenizer or seq_length",
                             "one preparation of a folder at a time",
                             "wait for it, or name another folder in data.prepared") from None
        (folder / PREPARED_MANIFEST).unlink(missing_ok=True)
        remove_own_files(folder / SHARD_FOLDER, OWN_SHARD_FILE)
        write_json(folder / PREPARED_PLAN, plan)


def _other_plan(folder: Path, present: PreparedPlan | None, plan: PreparedPlan,
                remedy: str) -> InputError:
    if present is not None and present["format"] != plan["format"]:
        return InputError(f"{folder} was prepared by another version of amid-ds: its format is "
                          f"{present['format']}, this version's {plan['format']}",
                          "a folder that this version prepared", remedy)
    return InputError(f"{folder} was prepared differently: {first_difference(present, plan)}",
                      "a folder prepared from this recipe's data, tokenizer and seq_length", remedy)


def first_difference(present: object, wanted: object, name: str = "") -> str:
    """The first value that differs between two JSON values, by its path."""
    if isinstance(present, dict) and isinstance(wanted, dict) and present.keys() == wanted.keys():
        key = next(key for key in wanted if present[key] != wanted[key])
        return first_difference(present[key], wanted[key], f"{name}.{key}".lstrip("."))
    if isinstance(present, list) and isinstance(wanted, list) and len(present) == len(wanted):
        index = next(index for index in range(len(wanted)) if present[index] != wanted[index])
        return first_difference(present[index], wanted[index], f"{name}[{index}]")
    return f"`{name}` is {present!r} there and {wanted!r} in this recipe"


def remove_own_files(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the files of `folder` that have such names."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if names.fullmatch(file.name):
            file.unlink(missing_ok=True)
