"""Finds this process's rank from any launcher's variables and joins the process group."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from amid_ds.distributed.failures import (
    FailureMonitor,
)
from amid_ds.distributed.world import (
    World,
)
from amid_ds.errors import InputError, Stopped, TrainingError


def launched_rank() -> int:
    """This process's rank as its launcher says, before any group exists; 0 for a process by itself."""
    return int(next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
                     if name in os.environ), "0"))


@contextlib.contextmanager
def init_distributed(timeout_s: float) -> Iterator[World]:
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
    failures = FailureMonitor(store, rank) if size > 1 else None
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
