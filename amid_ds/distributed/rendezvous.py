"""Finds this process's rank from any launcher's variables and joins the process group."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from amid_ds.distributed.devices import choose_device, introduce
from amid_ds.distributed.failures import FailureMonitor
from amid_ds.distributed.launch import free_port, slurm_port
from amid_ds.distributed.rank_logging import PACKAGE_LOGGER, set_up_logging
from amid_ds.distributed.world import World
from amid_ds.errors import InputError, RankError, RankInputError, Stopped, TrainingError

# slurm/train_mpi.sbatch sets AMID_DS_MPI_RANKS: not every MPI under Slurm has one of the others.
MPI_SIZE_VARIABLES = ("AMID_DS_MPI_RANKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Seconds in which all ranks must have come: a job with a rank missing holds its nodes no longer.
MEET_S = 600.0
# Of the store in rank 0: one for torch's groups, one for FailureMonitor. And the files of its own.
CONNECTIONS_PER_RANK = 2
OWN_FILES = 1024
# How often this process has met its peers before: a program may train several times.
_MEETINGS = itertools.count()

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def init_distributed(timeout_s: float) -> Iterator[World]:
    """Join the process group that the launcher laid out, or be a group of one.

    Launchers: deepspeed, torchrun, srun, mpirun. A collective waits at most `timeout_s` for its
    peers, and the ranks at most MEET_S to meet. On a clean exit, and on an error that all ranks
    have agreed on, the ranks leave together; any other error is reported to the peers, whose
    FailureMonitor ends them. Raises TrainingError where the launcher's variables make no sense or
    one node lacks its GPUs, InputError where two ranks share a GPU, RankError where the ranks do
    not meet.
    """
    # A program that calls train() may have its own, or none.
    if not PACKAGE_LOGGER.hasHandlers():
        set_up_logging()
    rank, size, local_rank = _discover()
    device = choose_device(local_rank)
    if device.type == "cpu":
        _share_cores(size)
    timeout, patience = timedelta(seconds=timeout_s), timedelta(seconds=min(timeout_s, MEET_S))
    with (_rank_variables(rank, size, local_rank if device.index is None else device.index),
          _timeout_of_groups(timeout)):
        if rank == 0:
            _allow_connections(size)
        store = _meet(rank, size, patience)
        store.set_timeout(timeout)
        # On a connection of its own: NCCL and gloo wait for keys in theirs.
        failures = (FailureMonitor(store.clone(), rank, size)   # type: ignore[attr-defined]
                    if size > 1 else None)
        world = World(rank, size, device, failures=failures)
        try:
            with _time_limit(world, patience):
                world, wrong = _join(world, store)
            with _leaving_together(world):
                if wrong is not None:
                    raise wrong
                yield world
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            if failures is not None:
                failures.stop()


@contextlib.contextmanager
def _leaving_together(world: World) -> Iterator[None]:
    """Ranks that have agreed on an error leave together; another one is reported to the peers."""
    try:
        yield
    except RankError:
        raise
    except (InputError, TrainingError, Stopped) as error:
        world.leave(error)
        raise
    except Exception as error:
        explained = world.explained(error)
        if explained is not error:
            raise explained from None
        if world.failures is not None:
            world.failures.report(f"rank {world.rank}: {type(error).__name__}: {error}")
        raise


def _meet(rank: int, size: int, patience: timedelta) -> dist.Store:
    """The store that all ranks share, once all of them have come to it."""
    if size == 1:
        return dist.HashStore()
    try:
        store: dist.Store = next(dist.rendezvous("env://", rank, size, timeout=patience))[0]
        again = next(_MEETINGS)
        # torchrun's store still holds what the ranks told each other the last time.
        return dist.PrefixStore(f"again_{again}", store) if again else store
    except (RuntimeError, OSError) as error:
        raise _did_not_meet(rank, error) from None


def _allow_connections(size: int) -> None:
    """Let this process, which holds the store, have two connections of each rank, if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = CONNECTIONS_PER_RANK * size + OWN_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        logger.warning("this process may open %d files, and the store for %d ranks needs %d: raise "
                       "the limit (ulimit -Hn) on rank 0's node", hard, size, needed)
        needed = hard
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def _time_limit(world: World, limit: timedelta) -> Iterator[None]:
    """A context that ends all ranks if it takes longer: NCCL's connecting has no limit itself."""
    if world.failures is None:
        yield
        return
    seconds = limit.total_seconds()
    late = _did_not_meet(world.rank, TimeoutError(f"they are not connected after {seconds:g} s"))
    timer = threading.Timer(seconds, world.failures.report, [str(late)])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _join(world: World, store: dist.Store) -> tuple[World, InputError | TrainingError | None]:
    """Join the default group; returns (the world with its groups, what is wrong with the devices).

    The default group has gloo for tensors on the CPU and NCCL for those on a GPU; where something
    is wrong, gloo alone, for the ranks to leave by. It is bound to the GPU: NCCL connects now,
    where a failure is one of meeting, and its barriers know their GPU. Every later group with NCCL
    is then a split of it, which takes all ranks: one of gloo alone must have all ranks, or those
    left out would wait in NCCL for the others. A rank by itself is not bound: it has no peers.
    """
    rank, size = world.rank, world.size
    try:
        known = introduce(store, rank, size, world.device)
        on_gpu = world.device.type == "cuda" and known.wrong is None
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=rank,
                                world_size=size, store=store,
                                device_id=world.device if on_gpu and size > 1 else None)
        agreement = dist.new_group(backend="gloo") if size > 1 else None
        world = replace(world, agreement=agreement, hosts=known.hosts, on_host=known.on_host,
                        is_first_on_host=known.is_first_on_host)
        # gloo connects with the first message: now, where a failure is one of meeting.
        world.barrier()
        return world, known.wrong
    except (RuntimeError, OSError) as error:
        reported = _did_not_meet(rank, error)
        if world.failures is not None:
            # Peers may wait in NCCL, whose connecting has no time limit.
            world.failures.report(str(reported))
        raise reported from None


@contextlib.contextmanager
def _timeout_of_groups(timeout: timedelta) -> Iterator[None]:
    """Every process group that is made meanwhile has this timeout, DeepSpeed's own too.

    DeepSpeed gives its groups none, and torch's default (30 minutes, 10 for NCCL alone) would end a
    collective before the hang watchdog does.
    """
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


def _did_not_meet(rank: int, error: Exception) -> TrainingError:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    message = (f"rank {rank} on {socket.gethostname()} did not meet the others at {address}: "
               f"{reason}\n  expected: all ranks started, and a free port that every node reaches\n"
               "  remedy:   see whether all ranks run (`amid-ds doctor` under the same launcher "
               "checks it); choose another MASTER_PORT; on nodes with several networks set "
               "MASTER_ADDR to the right one's name")
    # Rank 0 has the port: if it was there, it has seen what any other rank has.
    reached = isinstance(error, dist.DistNetworkError) or rank == 0
    return RankError(message) if reached else TrainingError(message)


@contextlib.contextmanager
def _rank_variables(rank: int, size: int, device_index: int) -> Iterator[None]:
    """RANK, WORLD_SIZE and LOCAL_RANK in the environment, where DeepSpeed looks for them.

    It takes LOCAL_RANK for the index of this rank's GPU, and insists that Open MPI's variable,
    where there is one, says the same. gloo connects a rank to each other one that it exchanges
    something with, and not to all: the addresses alone would be 8 MB a group and rank on 1,024
    ranks, 2 GB on 16,384. Restored at the end: a process started later is no rank of a group that
    is gone.
    """
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(device_index),
                 "TORCH_GLOO_LAZY_INIT": os.environ.get("TORCH_GLOO_LAZY_INIT", "1")}
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        variables["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device_index)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _share_cores(size: int) -> None:
    """Give each rank of a CPU node its share of the cores; by default torch uses all per rank."""
    if "OMP_NUM_THREADS" not in os.environ:
        # LOCAL_SIZE is deepspeed's, LOCAL_WORLD_SIZE torchrun's.
        local_size = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or size
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local_size)))


def _discover() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the launcher's variables.

    Sets MASTER_ADDR and MASTER_PORT where the launcher has not.
    """
    env = os.environ
    # deepspeed, torchrun
    if "RANK" in env and "WORLD_SIZE" in env:
        found = _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", "0")
    # mpirun, srun --mpi
    elif any(name in env for name in MPI_SIZE_VARIABLES):
        return _discover_mpi()
    # srun
    elif "SLURM_PROCID" in env and _number("SLURM_NTASKS", "1") > 1:
        found = _discover_slurm()
    elif "RANK" in env or env.get("WORLD_SIZE", "1") != "1":
        missing = "WORLD_SIZE" if "RANK" in env else "RANK"
        raise RankError(str(_launch_error(f"the variable {missing} is missing")))
    else:
        return 0, 1, 0
    rank, size, _ = found
    if rank >= size:
        # There may be no rank 0 to say it.
        raise RankError(str(_launch_error(f"this is rank {rank} of {size}")))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not env.get(name):
            raise _launch_error(f"the variable {name} is missing")
    if size > 1 and not 0 < _number("MASTER_PORT") < 2**16:
        raise _launch_error(f"MASTER_PORT is {env['MASTER_PORT']}")
    return found


def _number(name: str, default: str | None = None) -> int:
    """The variable's number."""
    value = os.environ.get(name, default)
    if value is None or not value.strip().isdecimal():
        raise _launch_error(f"the variable {name} is " + ("missing" if value is None else
                                                          f"{value!r}"))
    return int(value)


def _launch_error(found: str) -> TrainingError:
    return TrainingError(
        f"{found}\n  expected: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as "
        "deepspeed and torchrun set them, or what srun or mpirun set\n  remedy:   start the ranks "
        "with one of these launchers, or one process without any of their variables")


def _discover_slurm() -> tuple[int, int, int]:
    """`_discover` by the variables of srun."""
    env = os.environ
    # A batch script has a rank and a size too, but is one process.
    if not any(name in env for name in ("SLURM_STEP_ID", "SLURM_STEPID")):
        raise TrainingError(
            f"a job of {env['SLURM_NTASKS']} tasks has started this once, without srun\n"
            "  expected: a process for each task\n"
            "  remedy:   put `srun` before the command, as slurm/train.sbatch does; `srun -n 1` "
            "for a single process")
    nodes = env.get("SLURM_JOB_NODELIST", "")
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True,
                               text=True, check=True).stdout.split()
        env.setdefault("MASTER_ADDR", hosts[0])
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise _launch_error(f"`scontrol show hostnames {nodes}` names no host: {error}") from None
    env.setdefault("MASTER_PORT", str(slurm_port(_number("SLURM_JOB_ID"))))
    return _number("SLURM_PROCID"), _number("SLURM_NTASKS"), _number("SLURM_LOCALID")


def _discover_mpi() -> tuple[int, int, int]:
    """`_discover` by MPI itself. Two collectives of MPI's world.

    Raises RankInputError if it counts other ranks than its launcher did.
    """
    expected = _number(next(name for name in MPI_SIZE_VARIABLES if name in os.environ))
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise _launch_error(f"mpi4py cannot be used: {error}") from None
    world = MPI.COMM_WORLD
    # Under the wrong kind of MPI each process is a world by itself, and would train alone.
    if world.Get_size() != expected:
        raise RankInputError(
            f"MPI gives this process a world of {world.Get_size()} rank(s)", f"one of {expected}",
            "start it with the MPI that mpi4py was built for; under Slurm with the matching "
            "`srun --mpi=TYPE` (pmi2 for MPICH, pmix for Open MPI; see `srun --mpi=list`)")
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    host, port = world.bcast((socket.gethostname(), free_port(host="")), root=0)
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))
    return world.Get_rank(), world.Get_size(), local.Get_rank()
