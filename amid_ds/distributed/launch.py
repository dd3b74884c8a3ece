"""Starts commands of this package on this machine: rank variables and rendezvous ports."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

# Of torch and deepspeed, Slurm, Open MPI, and MPICH.
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
SLURM_PORTS_START = 20000
SLURM_PORTS = 20000


def launched_rank() -> int:
    """This process's rank in its launcher's variables, before any group exists; 0 without one.

    Where it is no number, rendezvous.py reports it.
    """
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    return int(rank) if rank.isdecimal() else 0


def launch_command(ranks: int, *arguments: str) -> list[str]:
    """The command line of `amid-ds ARGUMENTS` on `ranks` ranks, with a free rendezvous port."""
    if ranks == 1:
        return [sys.executable, "-m", "amid_ds", *arguments]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()),
            "--log_level", "error", "--module", "amid_ds", *arguments]


def local_group_variables(ranks: int) -> dict[str, str]:
    """What `ranks` ranks of this machine have in common in their environment, as under a launcher,
    with a free rendezvous port; each also has its RANK and LOCAL_RANK."""
    return {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port())}


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free now on the interface `host` of this machine; "": on all of them."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def slurm_port(job_id: int) -> int:
    """The rendezvous port of a Slurm job: every rank knows it without asking, and two jobs that
    share a node differ unless their ids differ by a multiple of 20000. slurm/*.sbatch has it too.
    """
    return SLURM_PORTS_START + job_id % SLURM_PORTS
