"""One writer at a time: a lease, a small file that says who works in a place.

It is created exclusively. Its holder writes a heartbeat into it every BEAT_S seconds and
removes it at the end. Whoever finds one

    takes over at once   its process is gone, on this machine, or it is of an earlier restart of
                         this same Slurm job
    is refused at once   its process lives on this machine
    otherwise looks on   until the heartbeat moves (refused), or has not moved for STALE_S seconds
                         (taken over); 3 heartbeats are enough if the file itself is older than that

Only the change of a heartbeat is looked at, never the difference of two clocks: those of two nodes,
or of a node and the file server, may differ by more than any limit. A file server that stands still
stops the observer too.

A holder may be cut off, be replaced, and come back. So it compares its token with the file's before
each thing that it commits (`Fence.check`), and its files under way carry the token in their names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from amid_ds.errors import InputError, TrainingError

BEAT_S = 5.0
STALE_S = 60.0
WATCH_S = 0.5

logger = logging.getLogger(__name__)


class LeaseLostError(TrainingError):
    """Another process has taken over: this one must write nothing more."""


class LeaseHeldError(InputError):
    """Another process has the lease, and lives."""


@dataclass(frozen=True)
class Fence:
    """A holder's right to write, on any rank: `check` raises LeaseLostError when it is lost.

    token: the lease's, for names of files under way. check: does nothing on ranks that commit
    nothing.
    """

    token: str
    check: Callable[[], None]


# For writers in a place that nobody else knows.
UNFENCED = Fence("alone", lambda: None)


def current_attempt() -> tuple[str | None, int]:
    """(job id, restart count) of this process's attempt, as Slurm numbers them."""
    # SLURM_RESTART_COUNT is unset, not 0, in the first attempt.
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as the file has it.

    machine: this boot of the machine and this namespace of process ids; pids of another one say
    nothing. started: the process's start, in the kernel's ticks. since, heartbeat: seconds since
    the epoch, by the holder's clock.
    """

    host: str
    machine: str
    pid: int
    started: int | None
    job: str | None
    restart: int
    token: str
    since: int
    heartbeat: int

    @classmethod
    def this_process(cls) -> Holder:
        job, restart = current_attempt()
        now = int(time.time())
        pid = os.getpid()
        return cls(os.uname().nodename, _machine(), pid, process_start_ticks(pid), job, restart,
                   uuid.uuid4().hex[:16], now, now)

    def lives_here(self) -> bool | None:
        """True if the process lives on this machine, False if it is gone, None for another one."""
        if not self.machine or self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return process_start_ticks(self.pid) == self.started

    def is_earlier_restart(self) -> bool:
        """True if this process is a later restart of the holder's Slurm job."""
        job, restart = current_attempt()
        return job is not None and job == self.job and restart > self.restart

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job is not None else ""
        return (f"process {self.pid} on {self.host}{job}, since {_clock(self.since)}, "
                f"last heartbeat {_clock(self.heartbeat)}")


def _clock(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _machine() -> str:
    """This boot of this machine and this namespace of process ids; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start_ticks(pid: int) -> int | None:
    """The start of a process in the kernel's ticks; None for one that is gone or a zombie."""
    try:
        # The command's name, in brackets, may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else int(fields[18])


@dataclass
class Lease:
    """A lease that this process holds on the place that `work` names, until `release`."""

    path: Path
    work: str
    holder: Holder
    _file: int
    _released: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @classmethod
    def take(cls, path: Path, work: str) -> Lease:
        """Create the file `path`, or take it over. Raises InputError where another process lives.

        The folder is there. `work` names what the lease is for, in messages.
        """
        lease = None
        while lease is None:
            try:
                lease = cls._create(path, work)
            except FileExistsError:
                lease = cls._take_over(path, work)
            except OSError as error:
                raise InputError(f"{work} cannot be written: {error}",
                                 "a folder that can be written",
                                 "make room there, or name another folder") from None
        lease._thread = threading.Thread(target=lease._beat, name="lease", daemon=True)
        lease._thread.start()
        return lease

    @classmethod
    @contextlib.contextmanager
    def held(cls, path: Path, work: str) -> Iterator[Lease]:
        """`take` at the beginning, `release` at any end."""
        lease = cls.take(path, work)
        try:
            yield lease
        finally:
            lease.release()

    @classmethod
    def _create(cls, path: Path, work: str) -> Lease:
        """The new file, with its first heartbeat; none where the disk is full."""
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        lease = cls(path, work, Holder.this_process(), descriptor)
        try:
            lease._write()
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return lease

    @classmethod
    def _take_over(cls, path: Path, work: str) -> Lease | None:
        """The lease of a dead holder, now ours. None if another start was quicker.

        Two starts may find the same dead holder. Each file has one successor: the lease beside it
        that is named after its token. Who has that one looks again, since the first successor's
        is gone as soon as it has become the file itself.
        """
        found = _read(path)
        if found is None:
            return None
        holder = found[1]
        _refuse_if_alive(path, found, work)
        successor = cls.take(path.with_name(f"{path.name}.{holder.token if holder else 'damaged'}"),
                             work)
        with contextlib.suppress(FileNotFoundError):
            if _read(path) == found:
                logger.info("%s: its last user was killed (%s); going on", work,
                            holder or "unknown")
                os.replace(successor.path, path)
                successor.path = path
                return successor
        successor.release()
        return None

    def check(self) -> None:
        """Raise LeaseLostError if another process has taken over.

        Where the file cannot be read, neither can what is committed beside it be written.
        """
        try:
            found = _read(self.path)
        except OSError:
            return
        except InputError:
            found = (b"", None)
        if found is None or found[1] is None or found[1].token != self.holder.token:
            now = "gone" if found is None else f"that of {found[1] or 'an unknown process'}"
            raise LeaseLostError(f"{self.work} is no longer this process's: {self.path} is {now}\n"
                                 "  it was cut off for too long; it stops, and writes nothing more")

    def release(self) -> None:
        """Remove the file, unless another process has taken over."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self._file)
        with contextlib.suppress(OSError, LeaseLostError):
            self.check()
            self.path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            # A full disk or a file server that is away: the holder is known by its process too.
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        """Write the holder, with a heartbeat, into our own file: never into another's."""
        now = {"heartbeat": int(time.time())}
        os.pwrite(self._file, (json.dumps(asdict(self.holder) | now) + "\n").encode(), 0)
        os.fsync(self._file)


def _read(path: Path) -> tuple[bytes, Holder | None] | None:
    """(content, holder) of a lease; the holder is None in a damaged one. None without a file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return content, Holder(**json.loads(content))
    except (ValueError, TypeError):
        if content.strip(b"\0"):
            raise InputError(f"{path} is not a lease of amid-ds", "no such file, or its own",
                             "move it away") from None
        # All that a power failure leaves of one.
        return content, None


def _refuse_if_alive(path: Path, found: tuple[bytes, Holder | None], work: str) -> None:
    """Raise InputError if the holder of the lease that was found lives."""
    content, holder = found
    lives = None if holder is None else holder.lives_here()
    is_dead = lives is False or (holder is not None and holder.is_earlier_restart())
    if not is_dead and lives is None:
        is_dead = _stands_still(path, content, work)
    if not is_dead:
        raise LeaseHeldError(f"{work} is in use by {holder or 'an unknown process'}",
                             "one process or job at a time",
                             f"wait for it, or stop it; {path} goes when it ends")


def _stands_still(path: Path, content: bytes, work: str) -> bool:
    """Look on until the heartbeat has moved (False) or has not for too long (True)."""
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    rounds = round((3 * BEAT_S if age > STALE_S else STALE_S) / WATCH_S)
    logger.info("%s was in use elsewhere (%s): looking for its next heartbeat, for at most %g s",
                work, path, rounds * WATCH_S)
    for _ in range(rounds):
        time.sleep(WATCH_S)
        found = _read(path)
        if found is None or found[0] != content:
            return found is None
    return True
