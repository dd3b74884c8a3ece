"""Ranks from any launcher, the few collectives that training makes outside DeepSpeed, and agreement between ranks.

One class for 1 or N ranks. What goes wrong on one rank is told to all before any of them acts on it: the first exit
status that a launcher sees makes it kill the others, so ranks agree first and leave together.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from amid_ds.errors import InputError, Stopped, TrainingError, tell

T = TypeVar("T")
STILL_AT_IT_S = 20.0      # how often rank 0 is heard of while the others wait for it


@dataclass(frozen=True)
class World:
    """This process among its peers. `device` is where its model lives.

    Neighbouring ranks form a tensor-parallel group: `tp_size` of them share one copy of the models and see the same
    tokens. Data follow `dp_rank`.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    tp_size: int = 1
    tp_group: dist.ProcessGroup | None = None      # None: nobody to share with
    agreement: dist.ProcessGroup | None = None     # all ranks, apart from the group that training's collectives use
    failures: Failures | None = None               # None: nobody to tell

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        return self.size // self.tp_size

    def split(self, tp_size: int) -> World:
        """The same world in tensor-parallel groups of `tp_size`, which divides `size`. Collective."""
        group = dist.new_subgroups(group_size=tp_size)[0] if tp_size > 1 else None
        return replace(self, tp_size=tp_size, tp_group=group)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over the data-parallel ranks, in float64. One collective, of all ranks.

        Tensor-parallel peers work on the same tokens, so each of them counts as one part in `tp_size`; what any rank
        alone says (a request to stop) still shows.
        """
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return (tensor / self.tp_size).tolist()

    def sum_beside(self, values: Sequence[float], own: Sequence[float]) -> tuple[list[float], list[list[float]]]:
        """`sum` of `values`, and every rank's `own` numbers, by rank, in the same collective."""
        places = [0.0] * (len(own) * self.size)
        places[self.rank * len(own):(self.rank + 1) * len(own)] = [value * self.tp_size for value in own]
        total = self.sum([*values, *places])
        rows = total[len(values):]
        return total[:len(values)], [rows[i:i + len(own)] for i in range(0, len(rows), len(own))]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (anything that pickles), by rank. One collective of objects: for set-up, not steps."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.agreement)
        return everyone

    def barrier(self) -> None:
        self.gather(None)

    def measured_sum(self, ranks: Sequence[int], size_bytes: int) -> tuple[float, float]:
        """Σ (rank + 1) over `ranks` by way of a tensor of `size_bytes`, and the bytes per second of the all-reduce, the
        best of a few. Called by all ranks; those that are not among `ranks` get (0, 0)."""
        group = dist.new_group(list(ranks))
        if self.rank not in ranks:
            return 0.0, 0.0
        fastest = float("inf")
        for _ in range(4):      # the first one pays for the connections
            tensor = torch.full((size_bytes // 4,), self.rank + 1.0, device=self.device)
            dist.barrier(group)
            began = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            total = float(tensor[-1])      # also waits for a GPU
            fastest = min(fastest, time.perf_counter() - began)
        dist.destroy_process_group(group)
        return (total if bool((tensor == total).all()) else float("nan")), size_bytes / fastest

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if it raises on any, raise on all what the lowest rank raised.

        A rank that fails between two collectives of `work` leaves the others in the second: `failures` ends those.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        own = error if error is None or isinstance(error, (InputError, TrainingError)) else _foreign(self.rank, error)
        if own is not None and self.failures is not None:
            self.failures.tell(str(own))
        everyone = self.gather(own)
        if own is not None and self.failures is not None:
            self.failures.take_back()
        for found in everyone:
            if found is not None:
                raise found from error
        return result   # type: ignore[return-value]

    def leave(self, error: InputError | TrainingError | Stopped) -> None:
        """Say, once, what all ranks have agreed on, and leave together.

        A launcher that sees one rank end with a status other than 0 kills the rest: the one that was about to say why
        must not be among them, nor may a rank that is on its way out die of SIGTERM, which would hide its status.
        """
        if self.is_main:
            tell(error)
        if self.size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)      # Slurm may send it more than once
        with contextlib.suppress(RuntimeError):      # a rank that did not agree is ended by `failures`
            if self.failures is not None:
                self.failures.tell(str(error) or type(error).__name__)
            self.barrier()
            if self.failures is not None:
                self.failures.take_back()

    def main_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone, tell everyone its result. An error there is raised on every rank."""
        result = self.together(lambda: work() if self.is_main else None)
        return self.gather(result)[0]   # type: ignore[return-value]


    def main_at_length(self, work: Callable[[], object]) -> None:
        """Run `work` on rank 0 alone for as long as it takes. An error there is raised on every rank.

        A collective waits so long and no longer: rank 0 works in a thread and says every now and then that it still is.
        """
        if self.size == 1:
            work()
            return
        failed: list[Exception] = []

        def run() -> None:
            try:
                work()
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        if self.is_main:
            thread.start()
        working = True
        while working:
            if self.is_main:
                thread.join(STILL_AT_IT_S)
            working = self.gather(thread.is_alive())[0]

        def tell_all() -> None:
            if failed:
                raise failed[0]

        self.together(tell_all)


class Failures:
    """Ends a rank that waits, in a collective that cannot complete, for a rank that has failed.

    A failed rank says so in the rendezvous store, which works while collectives do not. Every rank looks there now and
    then, from a thread; one that has not come to its own end GRACE_S later is ended, with exit status 1.
    """

    LOOK_EVERY_S = 2.0
    GRACE_S = 15.0

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.store, self.rank = dist.PrefixStore("amid_ds", store), rank
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="failures", daemon=True)
        self.thread.start()

    def tell(self, message: str) -> None:
        with contextlib.suppress(RuntimeError):      # rank 0 holds the store: it may be gone
            self.store.set("failed", message.splitlines()[0])

    def take_back(self) -> None:
        """Every rank has heard of it: nobody is left waiting."""
        with contextlib.suppress(RuntimeError):
            self.store.delete_key("failed")

    def leave(self) -> None:
        """The end. A thread that is in the store while the interpreter goes down would abort the process."""
        self.left.set()
        self.thread.join(self.LOOK_EVERY_S)

    def _watch(self) -> None:
        while not self.left.wait(self.LOOK_EVERY_S):
            if self._message() is not None and not self.left.wait(self.GRACE_S) and (message := self._message()):
                print(f"amid-ds: rank {self.rank} ends, it was waiting for a rank that failed: {message}",
                      file=sys.stderr, flush=True)
                os._exit(1)

    def _message(self) -> str | None:
        try:
            return self.store.get("failed").decode() if self.store.check(["failed"]) else None
        except RuntimeError:
            return "rank 0 is gone"


def _foreign(rank: int, error: Exception) -> TrainingError:
    traceback.print_exception(error)      # here, where it happened; the other ranks get one line
    return TrainingError(f"rank {rank} failed: {type(error).__name__}: {error}")


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, rows: slice, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.shape, ctx.rows, ctx.group = whole.shape, rows, group
        return whole[rows]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradient.new_zeros(ctx.shape)
        total[ctx.rows] = gradient
        dist.all_reduce(total, group=ctx.group)
        return total, None, None


def rows_of(whole: torch.Tensor, rows: slice, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's `rows` of a tensor that every rank of `group` holds whole, each using rows of its own.

    Its gradient comes back whole on every rank, like that of a tensor all of them use alike. One collective, backward.
    """
    return _Rows.apply(whole, rows, group)


def launched_rank() -> int:
    """This process's rank as its launcher says, before any group exists; 0 for a process by itself."""
    return int(next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
                     if name in os.environ), "0"))


@contextlib.contextmanager
def joined(timeout_s: float) -> Iterator[World]:
    """Join the group that the launcher laid out (deepspeed, torchrun, srun, mpirun), or be a group of one.

    `timeout_s` is how long a collective may wait for its peers. On a clean exit the ranks leave together.
    """
    rank, size, local_rank = _discover()
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"      # DeepSpeed's own switch
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        _share_cores(size)
    # MPI's or a lone process's variables are set for whoever asks the environment meanwhile, DeepSpeed above all.
    ours = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    timeout = timedelta(seconds=timeout_s)
    store = dist.HashStore() if size == 1 else next(dist.rendezvous("env://", rank, size, timeout=timeout))[0]
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=rank, world_size=size, timeout=timeout,
                            store=store)
    agreement = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
    failures = Failures(store, rank) if size > 1 else None
    world = World(rank, size, local_rank, device, agreement=agreement, failures=failures)
    try:
        yield world
    except (InputError, TrainingError, Stopped) as error:
        world.leave(error)
        raise
    except Exception as error:
        if failures is not None:
            failures.tell(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if failures is not None:
            failures.leave()
        for name, value in before.items():      # what this process starts next is no rank of a group that is gone
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _share_cores(size: int) -> None:
    """On a CPU, give each of the node's ranks its share of the cores: torch's default is all of them for every rank."""
    if "OMP_NUM_THREADS" not in os.environ:
        # LOCAL_SIZE is deepspeed's, LOCAL_WORLD_SIZE torchrun's
        here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or size)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))


def _discover() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the launcher's variables; MASTER_ADDR and MASTER_PORT are set on the way."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:                       # deepspeed, torchrun
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    if any(name in env for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "AMID_DS_MPI_RANKS")):   # mpirun, srun --mpi
        return _discover_mpi()
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        hosts = subprocess.run(["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]],
                               capture_output=True, text=True, check=True).stdout.split()
        env.setdefault("MASTER_ADDR", hosts[0])
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def _discover_mpi() -> tuple[int, int, int]:
    import socket

    from mpi4py import MPI

    world = MPI.COMM_WORLD
    expected = next(int(os.environ[name]) for name in ("AMID_DS_MPI_RANKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
                    if name in os.environ)
    if world.Get_size() != expected:      # the wrong kind of MPI: many worlds, each alone with its data
        raise InputError(f"MPI gives this process a world of {world.Get_size()} rank(s)", f"one of {expected}",
                         "start it with the MPI that mpi4py was built for; under Slurm with the matching "
                         "`srun --mpi=TYPE` (pmi2 for MPICH, pmix for Open MPI; see `srun --mpi=list`)")
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    with socket.socket() as probe:
        probe.bind(("", 0))
        host, port = world.bcast((socket.gethostname(), probe.getsockname()[1]), root=0)
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))
    return world.Get_rank(), world.Get_size(), local.Get_rank()
