"""Slurm's commands, and the only place that calls them. What they print is taken apart here and nowhere else."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence

from amid_ds.errors import InputError

CONNECT_S = 5.0      # how long a node's slurmd may take to answer


def slurm_available() -> bool:
    return shutil.which("sbatch") is not None


def _call(*command: str) -> str:
    """What the command prints. Raises InputError where Slurm refuses, in its own words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{command[0]} cannot be run: {error}", "a machine of the cluster, a controller that answers",
                         "run this on the login node; try `scontrol ping`") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        raise InputError(f"Slurm refuses `{' '.join(command)}`: {words}", "a job that this cluster can run",
                         "see `sinfo` for its partitions and nodes, and the options of this command")
    return done.stdout + done.stderr


def sbatch_test_only(arguments: Sequence[str]) -> str:
    """What Slurm would do with a job, without submitting it; when and where it could start."""
    return _call("sbatch", "--test-only", *arguments).strip().removeprefix("sbatch: ")


def sbatch(arguments: Sequence[str]) -> str:
    """Submit a job; its id."""
    return _call("sbatch", "--parsable", *arguments).strip().split(";")[0]


def show_job(number: str) -> dict[str, str]:
    """What Slurm knows of a job (JobState, NodeList, StdOut, ...); {} where it has forgotten it."""
    try:
        text = _call("scontrol", "--oneliner", "show", "job", number)
    except InputError:
        return {}
    return _facts(text.splitlines()[0])


def _facts(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split(" ") if "=" in part)


def requeue_job(number: str) -> None:
    """Have the job run again from its beginning. Slurm ends the batch script that calls this."""
    _call("scontrol", "requeue", number)


def current_job() -> str:
    """The name of the job that this process is in. A task of an array is named by the array: its last one shares its
    id with the whole."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def expand_hosts(nodes: str) -> list[str]:
    """n[1-3] as n1, n2, n3."""
    return _call("scontrol", "show", "hostnames", nodes).split()


def node_timeout() -> int:
    """Seconds after which Slurm takes a node that does not answer for dead."""
    found = re.search(r"^SlurmdTimeout\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.M)
    return int(found[1]) if found else 300


def node_is_up(node: str) -> bool:
    """Whether a node's slurmd can be reached from here, now: Slurm itself notices a dead one minutes later."""
    facts = _facts(_call("scontrol", "--oneliner", "show", "node", node))
    port = facts.get("Port") or re.search(r"^SlurmdPort\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.M)[1]  # type: ignore[index]
    try:
        socket.create_connection((facts.get("NodeAddr", node), int(port)), CONNECT_S).close()
    except OSError:
        return False
    return True
