"""What a run's lives leave behind, for the next life, for the batch script and for whoever asks how it goes.

A run may live many times: pre-empted, out of time, its node dead. `lives.jsonl` in its folder tells their story, one
event per line: `submitted`, `begun`, `stepping` (every rank has reached its first step), `ended`. A rank that fails
leaves its last words in `failures/`, each in a file of its own, because nobody else may be left to write. A rank that
is killed leaves none, and is found by that.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from amid_ds.errors import InputError, Stopped, TrainingError
from amid_ds.files import replace_text


@dataclass(frozen=True)
class Failure:
    """The last words of a rank, or what others say of it. `time` is in seconds since the epoch, by its own clock."""

    rank: int | None
    host: str
    step: int | None      # the optimizer step that it was in; None: before the first
    error: str
    time: float

    def __str__(self) -> str:
        who = "a rank" if self.rank is None else f"rank {self.rank}"
        where = "before its first step" if self.step is None else f"in step {self.step}"
        return f"{who} on {self.host} {where}: {self.error}"


@dataclass
class AttemptRecord:
    """One life, as lives.jsonl tells it."""

    job: str | None              # Slurm's job id; None: not under Slurm
    restart: int                 # how often Slurm had started the job again
    nodes: str = ""
    ranks: int = 0
    began: float = 0.0
    changed: dict[str, Any] = field(default_factory=dict)
    first_step: int | None = None      # where every rank began to step; None: not all of them came so far
    status: int | None = None          # its exit status; None: it lives, or ended without a word
    failure: Failure | None = None     # the first one of the life


def current_attempt() -> tuple[str | None, int]:
    """(job id, restart count) of this process's life, as Slurm numbers them."""
    # SLURM_RESTART_COUNT is unset, not 0, in the first life.
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def append_event(run: Path, event: str, **facts: Any) -> None:
    """One line more in the run's lives.jsonl, whole or not at all."""
    job, restart = current_attempt()
    line = json.dumps({"event": event, "job": job, "restart": restart, "time": time.time(), **facts}) + "\n"
    with open(run / "lives.jsonl", "ab", buffering=0) as file:
        file.write(line.encode())


def read_events(run: Path) -> list[dict[str, Any]]:
    """The lines of lives.jsonl; one that a crash cut short is left out."""
    try:
        text = (run / "lives.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def read_attempts(run: Path) -> list[AttemptRecord]:
    """The run's lives, oldest first. Each `begun` opens one; a batch script whose ranks never came tells of it too."""
    lives: list[AttemptRecord] = []
    for event in read_events(run):
        key = event["job"], event["restart"]
        if event["event"] == "begun" or (event["event"] == "ended" and (
                not lives or (lives[-1].job, lives[-1].restart) != key)):
            lives.append(AttemptRecord(*key, began=event["time"]))
        life = lives[-1] if lives else None
        if life is None or event["event"] == "submitted":
            continue
        if event["event"] == "begun":
            life.nodes, life.ranks, life.changed = event["nodes"], event["ranks"], event["changed"]
        elif event["event"] == "stepping":
            life.first_step = event["step"]
        elif event["event"] == "ended":      # the batch script's word comes after the ranks' and knows more
            life.status = event["status"]
            life.failure = Failure(**event["failure"]) if event["failure"] else None
    return lives


def read_failures(run: Path) -> list[Failure]:
    """What the ranks of the current life that failed have left, the earliest first."""
    found = []
    for path in (run / "failures").glob(f"{_name(*current_attempt())}.*.json"):
        with contextlib.suppress(ValueError, TypeError, OSError):
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda failure: failure.time)


def _name(job: str | None, restart: int) -> str:
    return f"{job or 'local'}.{restart}"


class Attempt:
    """This rank's part in one life of a run. Within it an error that ends the life is written down on the way out."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.run: Path | None = None
        self.step: int | None = None

    def begin(self, run: Path, changed: Mapping[str, Any]) -> None:
        """The run's folder is known. `changed`: the recipe's keys that differ from the life before, [before, now]."""
        self.run = run
        if self.rank == 0:
            (run / "failures").mkdir(exist_ok=True)
            for path in (run / "failures").glob(f"{_name(*current_attempt())}.*.json"):      # without Slurm names come again
                path.unlink(missing_ok=True)
            nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
            append_event(run, "begun", nodes=nodes, ranks=self.size, changed=dict(changed))

    def stepping(self, step: int) -> None:
        """Every rank has come to optimizer step `step` (from 1)."""
        if self.step is None and self.rank == 0 and self.run is not None:
            with self._unharmed():
                append_event(self.run, "stepping", step=step)
        self.step = step

    def fail(self, error: str, rank: int | None = None, host: str | None = None) -> None:
        """Leave last words, this rank's own or about another one."""
        if self.run is None:
            return
        words = Failure(self.rank if rank is None else rank, host or socket.gethostname(), self.step,
                        error.splitlines()[0][:300] if error else "", time.time())
        with self._unharmed():
            path = self.run / "failures" / f"{_name(*current_attempt())}.{self.rank}.json"
            replace_text(path, json.dumps(asdict(words)) + "\n")

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.run is None:
            return
        status = 0 if error is None else 75 if isinstance(error, Stopped) else 2 if isinstance(error, InputError) else 1
        agreed = isinstance(error, TrainingError)      # all ranks raise the same: one tells of it
        if status == 1 and (not agreed or self.rank == 0):
            self.fail(str(error) if agreed else f"{type(error).__name__}: {error}")
        if self.rank == 0:
            with self._unharmed():
                failure = asdict(read_failures(self.run)[0]) if status == 1 else None
                append_event(self.run, "ended", status=status, failure=failure)

    @contextlib.contextmanager
    def _unharmed(self) -> Any:
        """A story that cannot be written (a full disk) does not end the run, nor hide why it ended."""
        try:
            yield
        except (OSError, IndexError) as problem:
            print(f"amid-ds: the story of this life could not be written: {problem}", file=sys.stderr, flush=True)
