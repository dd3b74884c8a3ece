"""Slurm's commands: the only module that calls them and parses their output."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence

from amid_ds.errors import InputError

COMMAND_TIMEOUT_S = 120
SLURMD_TIMEOUT_S = 5.0
# Slurm's own default of SlurmdTimeout.
DEFAULT_NODE_TIMEOUT_S = 300


def slurm_available() -> bool:
    return shutil.which("sbatch") is not None


def _call(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """The command's output. Raises InputError with Slurm's own message if it fails.

    environment: the command's; None: this process's.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S,
                              env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{command[0]} cannot be run: {error}",
                         "a machine of the cluster, a controller that answers",
                         "run this on the login node; try `scontrol ping`") from None
    if done.returncode:
        message = (done.stderr or done.stdout).strip()
        raise InputError(f"Slurm refuses `{' '.join(command)}`: {message}",
                         "a job that this cluster can run",
                         "see `sinfo` for its partitions and nodes, and this command's options")
    return done.stdout + done.stderr


def sbatch_test_only(arguments: Sequence[str]) -> str:
    """Slurm's estimate of the time and nodes at which a job would start; nothing is submitted."""
    return _call("sbatch", "--test-only", *arguments).strip().removeprefix("sbatch: ")


def sbatch(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Submit a job and return its id. environment: the job's, too; None: this process's."""
    return _call("sbatch", "--parsable", *arguments,
                 environment=environment).strip().split(";")[0]


def show_job(job_id: str) -> dict[str, str]:
    """Slurm's facts about a job (JobState, Reason, NodeList, ...); {} for a forgotten one."""
    try:
        text = _call("scontrol", "--oneliner", "show", "job", job_id)
    except InputError:
        return {}
    return _parse_facts(text.splitlines()[0])


def _parse_facts(line: str) -> dict[str, str]:
    facts: dict[str, str] = {}
    for part in line.split(" "):
        name, equals, value = part.partition("=")
        # Paths come late, and may hold anything.
        if equals:
            facts.setdefault(name, value)
    return facts


def requeue_job(job_id: str) -> None:
    """Have the job run again from its beginning. Slurm ends the batch script that calls this."""
    _call("scontrol", "requeue", job_id)


def current_job() -> str:
    """The id of this process's job, in an array as ARRAY_TASK.

    The last task of an array has the array's own job id, which would name all of its tasks.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def expand_hosts(nodes: str) -> list[str]:
    """The names in a node list: n[1-3] as n1, n2, n3."""
    return _call("scontrol", "show", "hostnames", nodes).split()


def cpus_of_nodes(nodes: int, partition: str | None) -> int | None:
    """The CPUs that each of `nodes` nodes of these partitions has, of those with GPUs if some have.

    partition: names as sbatch takes them, None: the default one. None where Slurm cannot tell.
    """
    if not slurm_available():
        return None
    try:
        lines = _call("sinfo", "--noheader", "--Node", "--format=%c|%P|%n|%G").splitlines()
    except InputError:
        return None
    wanted = None if partition is None else partition.split(",")
    cpus: dict[str, int] = {}
    gpu_nodes = set()
    for line in lines:
        count, name, node, devices = line.split("|", 3)
        if name.endswith("*") if wanted is None else name.removesuffix("*") in wanted:
            cpus[node] = int(count)
            if re.search(r"\bgpu:", devices):
                gpu_nodes.add(node)
    most_first = sorted((cpus[node] for node in gpu_nodes or cpus), reverse=True)
    return most_first[nodes - 1] if nodes <= len(most_first) else None


def node_timeout() -> int:
    """Seconds without an answer after which Slurm takes a node for dead."""
    configured = _configured_number("SlurmdTimeout")
    return DEFAULT_NODE_TIMEOUT_S if configured is None else configured


def _configured_number(key: str) -> int | None:
    match = re.search(rf"^{key}\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.M)
    return int(match[1]) if match else None


def node_is_up(node: str) -> bool:
    """True if the node's slurmd answers now. Slurm itself notices a dead one minutes later."""
    facts = _parse_facts(_call("scontrol", "--oneliner", "show", "node", node))
    port = facts.get("Port") or _configured_number("SlurmdPort")
    assert port is not None, "scontrol shows no port of slurmd"
    try:
        address = facts.get("NodeAddr", node), int(port)
        socket.create_connection(address, SLURMD_TIMEOUT_S).close()
    except OSError:
        return False
    return True
