"""A run's attempts, as recorded for the next one, for the batch script and for `amid-ds status`.

A run may take several attempts: one is pre-empted, runs out of time or loses a node, and the next
one resumes. `attempts.jsonl` in the run's folder has one line per event: `submitted`, `begun`,
`stepping` (every rank has reached its first step), `saved` (its first checkpoint), `ended`. A rank
that fails writes a file of its own in `failures/`, because no other rank may be left to do it. A
rank that is killed writes none.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, TypeAlias, TypedDict, cast

from amid_ds.errors import ExitStatus, TrainingError, exit_status, print_error
from amid_ds.files.append import append_line
from amid_ds.files.atomic import replace_text
from amid_ds.files.json_lines import is_number, read_jsonl
from amid_ds.files.lease import LeaseLostError, current_attempt
from amid_ds.run.folder import RunFolder

# How a step that hangs is recorded; requeueing recognises it.
HANG_ERROR = "the step has not ended"
Types: TypeAlias = Mapping[str, type | tuple[type, ...]]
# The types of what an event has beside its header.
FACTS_OF_EVENT: Mapping[str, Types] = {
    "submitted": {"jobs": list, "folder": str},
    "begun": {"nodes": str, "ranks": int, "changed": dict},
    "stepping": {"step": int},
    "saved": {"step": int},
    "ended": {"status": int, "failure": (dict, NoneType)},
}
# Characters of an error's first line that a failure keeps.
MAX_ERROR_LENGTH = 300


class _EventHeader(TypedDict):
    event: str
    job: str | None
    restart: int
    time: float


class AttemptEvent(_EventHeader, total=False):
    """One line of attempts.jsonl. `time` is in seconds since the epoch; the keys below are of one
    event each."""

    # submitted
    jobs: list[str]
    folder: str
    # begun
    nodes: str
    ranks: int
    changed: dict[str, list[object]]
    # stepping, saved
    step: int
    # ended
    status: int
    failure: Mapping[str, Any] | None


@dataclass(frozen=True)
class Failure:
    """One rank's failure, as that rank recorded it or as another one observed it."""

    rank: int | None
    host: str
    # The optimizer step under way; None: before the first one.
    step: int | None
    error: str
    # Seconds since the epoch by the host's own clock.
    time: float

    def __str__(self) -> str:
        rank = "a rank" if self.rank is None else f"rank {self.rank}"
        when = "before its first step" if self.step is None else f"in step {self.step}"
        return f"{rank} on {self.host} {when}: {self.error}"


@dataclass
class AttemptRecord:
    """One attempt, put together from its events.

    job: Slurm's job id, None outside Slurm; restart: the times that Slurm had restarted the job.
    changed: the recipe's keys that differ from the attempt before, each with [before, now].
    first_step: the first step that every rank reached, None if they have not.
    status: the exit status, None while the attempt runs or if it was killed.
    failure: the attempt's first failure.
    """

    job: str | None
    restart: int
    nodes: str = ""
    ranks: int = 0
    began: float = 0.0
    changed: dict[str, list[object]] = field(default_factory=dict)
    first_step: int | None = None
    status: int | None = None
    failure: Failure | None = None


def append_event(run: Path, event: str, **facts: object) -> None:
    """Append one line to the run's attempts.jsonl."""
    job, restart = current_attempt()
    header = {"event": event, "job": job, "restart": restart, "time": time.time()}
    append_line(RunFolder(run).attempts, json.dumps({**header, **facts}))


def read_events(run: Path) -> list[AttemptEvent]:
    """All events of a run, oldest first; what a crash has damaged is left out.

    A run that began under version 0.1 has its first events in lives.jsonl.
    """
    folder = RunFolder(run)
    lines = [line for path in (folder.old_attempts, folder.attempts)
             for line in read_jsonl(path, "event", _is_event)]
    return cast("list[AttemptEvent]", lines)


def _is_event(line: Mapping[str, Any]) -> bool:
    """True for a line that has the facts of its event."""
    if not (_has_types(line, {"job": (str, NoneType), "restart": int})
            and is_number(line.get("time"))):
        return False
    kind = line["event"]
    if kind == "ended" and line.get("failure") is not None and _failure(line["failure"]) is None:
        return False
    return isinstance(kind, str) and _has_types(line, FACTS_OF_EVENT.get(kind, {}))


def _has_types(values: Mapping[str, Any], types: Types) -> bool:
    return all(key in values and isinstance(values[key], kind) for key, kind in types.items())


def _failure(values: object) -> Failure | None:
    """The failure that was recorded as `values`; None for anything else."""
    kinds: Types = {"rank": (int, NoneType), "host": str, "step": (int, NoneType), "error": str}
    if (not isinstance(values, dict) or values.keys() != {*kinds, "time"}
            or not _has_types(values, kinds) or not is_number(values["time"])):
        return None
    return Failure(**values)


def read_attempts(run: Path) -> list[AttemptRecord]:
    """The run's attempts, oldest first.

    Each `begun` opens one. So does the batch script's `ended` for ranks that never began.
    """
    records: list[AttemptRecord] = []
    for event in read_events(run):
        kind, key = event["event"], (event["job"], event["restart"])
        is_last = bool(records) and (records[-1].job, records[-1].restart) == key
        if kind == "begun" or (kind == "ended" and not is_last):
            records.append(AttemptRecord(*key, began=event["time"]))
        if records:
            _add_event(records[-1], event)
    return records


def _add_event(record: AttemptRecord, event: AttemptEvent) -> None:
    if event["event"] == "begun":
        record.nodes, record.ranks = event["nodes"], event["ranks"]
        record.changed = event["changed"]
    elif event["event"] == "stepping":
        record.first_step = event["step"]
    elif event["event"] == "ended":
        # The batch script's `ended` comes after rank 0's and replaces it: it knows more.
        record.status, record.failure = event["status"], _failure(event["failure"])


def has_saved(run: Path) -> bool:
    """True if an attempt says that it saved a checkpoint: every one that ended in order has."""
    return any(event["event"] == "saved"
               or event.get("status") in (ExitStatus.DONE, ExitStatus.RESTART)
               for event in read_events(run))


def read_failures(run: Path) -> list[Failure]:
    """The failures that ranks of the current attempt have recorded, earliest first."""
    failures = []
    for path in _failure_files(run):
        with contextlib.suppress(ValueError, RecursionError, OSError):
            failures.append(_failure(json.loads(path.read_bytes())))
    return sorted(filter(None, failures), key=lambda failure: failure.time)


def _failure_files(run: Path) -> Iterator[Path]:
    """The files in failures/ under the current attempt's name."""
    return RunFolder(run).failures.glob(f"{_attempt_name()}.*.json")


def _attempt_name() -> str:
    job, restart = current_attempt()
    return f"{job or 'local'}.{restart}"


class Attempt:
    """This rank's part in one attempt at a run, as a context that records how the attempt ends."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.run: Path | None = None
        self.step: int | None = None
        self.has_saved = False

    def begin(self, run: Path, changed: Mapping[str, list[Any]]) -> None:
        """Record, on rank 0, that the attempt has begun in the folder `run`.

        `changed`: the recipe's keys that differ from the attempt before, each with [before, now].
        """
        self.run = run
        if self.rank == 0:
            RunFolder(run).failures.mkdir(exist_ok=True)
            # Outside Slurm every attempt has the same name.
            for path in _failure_files(run):
                path.unlink(missing_ok=True)
            nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
            append_event(run, "begun", nodes=nodes, ranks=self.size, changed=dict(changed))

    def stepping(self, step: int) -> None:
        """Note that every rank has reached optimizer step `step` (from 1); record the first one."""
        if self.step is None and self.rank == 0 and self.run is not None:
            with _printing_os_errors():
                append_event(self.run, "stepping", step=step)
        self.step = step

    def saved(self, step: int) -> None:
        """Record, on rank 0, the attempt's first checkpoint, that of `step`."""
        if not self.has_saved and self.run is not None:
            with _printing_os_errors():
                append_event(self.run, "saved", step=step)
        self.has_saved = True

    def record_failure(self, error: str, rank: int | None = None, host: str | None = None) -> None:
        """Write the failure of this rank, or of the other one that it names, to failures/."""
        if self.run is None:
            return
        failure = Failure(self.rank if rank is None else rank, host or socket.gethostname(),
                          self.step, error.partition("\n")[0][:MAX_ERROR_LENGTH], time.time())
        with _printing_os_errors():
            path = RunFolder(self.run).failures / f"{_attempt_name()}.{self.rank}.json"
            replace_text(path, json.dumps(asdict(failure)) + "\n")

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 _: TracebackType | None) -> None:
        # One that was replaced has nothing more to say in the run's folder.
        if self.run is None or isinstance(error, LeaseLostError):
            return
        status = exit_status(error)
        # Every rank raises the same TrainingError: rank 0 alone records it.
        is_shared = isinstance(error, TrainingError)
        if status == ExitStatus.FAILED and (not is_shared or self.rank == 0):
            self.record_failure(str(error) if is_shared else f"{type(error).__name__}: {error}")
        if self.rank == 0:
            with _printing_os_errors():
                failures = read_failures(self.run) if status == ExitStatus.FAILED else []
                append_event(self.run, "ended", status=int(status),
                             failure=asdict(failures[0]) if failures else None)


@contextlib.contextmanager
def _printing_os_errors() -> Iterator[None]:
    """Print an OSError (a full disk): it must not end the run, nor hide the error that does."""
    try:
        yield
    except OSError as error:
        print_error(f"this attempt cannot be recorded in the run's folder: {error}")
