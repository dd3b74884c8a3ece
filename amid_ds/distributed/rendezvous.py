"""Finds this process's rank from any launcher's variables and joins the process group."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from amid_ds.distributed.failures import FailureMonitor
from amid_ds.distributed.launch import free_port, slurm_port
from amid_ds.distributed.rank_logging import set_up_logging
from amid_ds.distributed.world import World
from amid_ds.errors import InputError, Stopped, TrainingError

# slurm/train_mpi.sbatch sets AMID_DS_MPI_RANKS: not every MPI under Slurm has one of the others.
MPI_SIZE_VARIABLES = ("AMID_DS_MPI_RANKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@contextlib.contextmanager
def init_distributed(timeout_s: float) -> Iterator[World]:
    """Join the process group that the launcher laid out, or be a group of one.

    Launchers: deepspeed, torchrun, srun, mpirun. A collective waits at most `timeout_s` for its
    peers. On a clean exit, and on an error that all ranks have agreed on, the ranks leave together;
    any other error is reported to the peers, whose FailureMonitor ends them.
    """
    # A program that calls train() has not set it up.
    set_up_logging()
    rank, size, local_rank = _discover()
    device = _choose_device(local_rank)
    if device.type == "cpu":
        _share_cores(size)
    timeout = timedelta(seconds=timeout_s)
    with _rank_variables(rank, size, local_rank):
        store = (dist.HashStore() if size == 1
                 else next(dist.rendezvous("env://", rank, size, timeout=timeout))[0])
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
                                rank=rank, world_size=size, timeout=timeout, store=store)
        agreement = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
        failures = FailureMonitor(store, rank) if size > 1 else None
        world = World(rank, size, device, agreement=agreement, failures=failures)
        try:
            yield world
        except (InputError, TrainingError, Stopped) as error:
            world.leave(error)
            raise
        except Exception as error:
            if failures is not None:
                failures.report(f"rank {rank}: {type(error).__name__}: {error}")
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            if failures is not None:
                failures.stop()


def _choose_device(local_rank: int) -> torch.device:
    # DS_ACCELERATOR is DeepSpeed's own switch.
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _rank_variables(rank: int, size: int, local_rank: int) -> Iterator[None]:
    """RANK, WORLD_SIZE and LOCAL_RANK in the environment, where DeepSpeed looks for them.

    Restored at the end: a process started later is no rank of a group that is gone.
    """
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
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
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    # mpirun, srun --mpi
    if any(name in env for name in MPI_SIZE_VARIABLES):
        return _discover_mpi()
    # srun
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        hosts = subprocess.run(["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]],
                               capture_output=True, text=True, check=True).stdout.split()
        env.setdefault("MASTER_ADDR", hosts[0])
        env.setdefault("MASTER_PORT", str(slurm_port(int(env["SLURM_JOB_ID"]))))
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def _discover_mpi() -> tuple[int, int, int]:
    """`_discover` by MPI itself. Raises InputError if it counts other ranks than its launcher did.

    Two collectives of MPI's world.
    """
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    expected = next(int(os.environ[name]) for name in MPI_SIZE_VARIABLES if name in os.environ)
    # Under the wrong kind of MPI each process is a world by itself, and would train alone.
    if world.Get_size() != expected:
        raise InputError(
            f"MPI gives this process a world of {world.Get_size()} rank(s)", f"one of {expected}",
            "start it with the MPI that mpi4py was built for; under Slurm with the matching "
            "`srun --mpi=TYPE` (pmi2 for MPICH, pmix for Open MPI; see `srun --mpi=list`)")
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    host, port = world.bcast((socket.gethostname(), free_port(host="")), root=0)
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))
    return world.Get_rank(), world.Get_size(), local.Get_rank()
