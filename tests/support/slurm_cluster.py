"""A real Slurm cluster on this machine: munged, slurmctld, and a slurmd per node.

Each node has a network namespace. Node nI has the name nI, the address 10.77.0.I and a cable to a
switch, so it can be killed, cut off and started again like a machine. Every process of the cluster
runs in one of its namespaces; that is how all of them are ended.

Needs root and:
    apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# The folders of daemons, not on every user's path.
os.environ["PATH"] += ":/usr/sbin:/sbin"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "tc", "nsenter", "unshare")
# GPUs of a node: character devices that are all /dev/null.
GPUS = 4
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE",
         "BOOT_FAIL"}

CONFIG = """
ClusterName=small
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire, 120 s by default, is also how long a requeued job waits before it may start again
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
UnkillableStepTimeout=10
MinJobAge=3600
SlurmdTimeout=10
SlurmctldTimeout=10
GresTypes=gpu
NodeName=n[1-{nodes}] CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 \\
    RealMemory=4000 Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""


def missing() -> list[str]:
    """The programs that are not installed, and "root" if this is another user."""
    return [program for program in PROGRAMS if shutil.which(program) is None] + \
        ([] if os.geteuid() == 0 else ["root"])


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


class Cluster:
    """A cluster of `nodes` nodes of `cpus` CPUs while in its context.

    Its login node is the controller's.
    """

    def __init__(self, nodes: int, cpus: int = 64) -> None:
        self.cpus = cpus
        self.names = [f"n{index}" for index in range(1, nodes + 1)]
        # In /tmp, because a socket's path must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.prefix = f"{self.folder.name}-"

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            self._connect()
            munge = self.folder / "munge"
            self._on("ctl", "/usr/sbin/munged", f"--key-file={munge}/key",
                     f"--socket={self.folder}/munge.sock", f"--pid-file={munge}/pid",
                     f"--log-file={munge}/log", f"--seed-file={munge}/seed")
            self._on("ctl", "/usr/sbin/slurmctld", "-c", "-f", str(self.folder / "slurm.conf"))
            for name in self.names:
                self.start_node(name)
            self.until(lambda: len(re.findall(r"State=IDLE ", self._nodes())) == len(self.names),
                       30, "nodes idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("ctl", *self.names, "switch"):
            if Path(f"/run/netns/{self.prefix}{name}").exists():
                self.kill_node(name)
                _call("ip", "netns", "del", self.prefix + name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_files(self) -> None:
        for name in ("state", "spool", "tmp", "munge", "dev"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o700)
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        (self.folder / "munge" / "key").chmod(0o600)
        for index in range(GPUS):
            _call("mknod", str(self.folder / "dev" / f"nvidia{index}"), "c", "1", "3")
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n")
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(folder=self.folder, nodes=len(self.names), cpus=self.cpus,
                          gpus=GPUS))
        hosts = [f"10.77.0.{index} {name}" for index, name in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", "10.77.0.254 ctl",
                                                      *hosts]) + "\n")

    def _connect(self) -> None:
        """Make the switch, and for the controller and each node a namespace with a cable to it."""
        switch = self.prefix + "switch"
        _call("ip", "netns", "add", switch)
        _call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "bridge", "up")
        for address, name in ((254, "ctl"), *enumerate(self.names, 1)):
            space = self.prefix + name
            _call("ip", "netns", "add", space)
            _call("ip", "-n", space, "link", "set", "lo", "up")
            _call("ip", "-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0",
                  "netns", space)
            _call("ip", "-n", switch, "link", "set", name, "master", "bridge", "up")
            _call("ip", "-n", space, "addr", "add", f"10.77.0.{address}/24", "dev", "eth0")
            _call("ip", "-n", space, "link", "set", "eth0", "up")

    def _inside(self, name: str, *command: str) -> list[str]:
        """`command` wrapped to run on a node: with its network, host name and /etc/hosts."""
        # Not `ip netns exec`: its new /sys hides /sys/fs/cgroup, without which slurmd ends.
        return ["nsenter", f"--net=/run/netns/{self.prefix}{name}", "unshare", "--mount", "--uts",
                "--propagation", "private", "sh", "-c",
                'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"', "_", name,
                str(self.folder / "hosts"), *command]

    def environment(self) -> dict[str, str]:
        """The environment of every process of the cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

    def _on(self, name: str, *command: str) -> None:
        subprocess.run(self._inside(name, *command), env=self.environment(), check=True, timeout=60,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)

    def run(self, *command: object, cwd: Path | None = None, timeout: float = 300,
            **variables: str) -> subprocess.CompletedProcess:
        """Run a command on the login node."""
        return subprocess.run(self._inside("ctl", *map(str, command)), cwd=cwd, timeout=timeout,
                              capture_output=True, text=True,
                              env={**self.environment(), **variables})

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        self._on(name, "/usr/sbin/slurmd", "-N", name, "-f", str(self.folder / "slurm.conf"))

    def processes(self, name: str, words: str = "") -> list[int]:
        """The processes of a node whose command line holds `words`, oldest first."""
        pids = []
        for pid in map(int, _call("ip", "netns", "pids", self.prefix + name).split()):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if words in line:
                pids.append(pid)
        return sorted(pids)

    def kill_node(self, name: str) -> None:
        """Kill every process of a node at once, as if its power were cut."""
        for pid in self.processes(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def cut_off(self, name: str, heal: bool = False) -> None:
        """Pull a node's network cable, or plug it in again."""
        _call("ip", "-n", self.prefix + "switch", "link", "set", name, "up" if heal else "down")

    def throttle(self, name: str, rate: str | None) -> None:
        """Limit a node's network to `rate`, such as "200mbit"; None: no limit."""
        card = ["tc", "-n", self.prefix + name, "qdisc"], ["dev", "eth0", "root"]
        if rate is None:
            _call(*card[0], "del", *card[1])
        else:
            _call(*card[0], "add", *card[1], "tbf", "rate", rate, "burst", "1mb", "latency",
                  "100ms")

    def hosts(self, nodes: str) -> list[str]:
        """The names in Slurm's notation: n[1-2] is n1, n2."""
        return self.run("scontrol", "show", "hostnames", nodes).stdout.split()

    def restore(self) -> None:
        """Cancel every job, and start and connect every node: undo what a test has done."""
        self.run("scancel", "--user=root")
        for name in self.names:
            self.cut_off(name, heal=True)
            if not self.processes(name, "slurmd -N"):
                self.start_node(name)
        self.until(lambda: len(re.findall(r"State=IDLE ", self._nodes())) == len(self.names), 60,
                   "nodes idle again")

    def _nodes(self) -> str:
        return self.run("scontrol", "-o", "show", "nodes").stdout

    def job(self, number: str) -> dict[str, str]:
        """Slurm's values of a job: JobState, Restarts, NodeList, ExitCode, ..."""
        text = self.run("scontrol", "-o", "show", "job", number).stdout
        return dict(part.split("=", 1) for part in text.split("\n")[0].split(" ") if "=" in part)

    def wait(self, number: str, timeout: float = 240) -> str:
        """Wait until the job has ended and will not start again; return its state."""
        self.until(lambda: self.job(number).get("JobState") in ENDED, timeout,
                   f"the end of job {number}")
        return self.job(number)["JobState"]

    def until(self, condition: Callable[[], object], timeout: float = 120,
              what: str = "it") -> None:
        """Wait until `condition()` is true; at the timeout fail with the cluster's state."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}\n{self._state()}"
            time.sleep(0.1)

    def _state(self) -> str:
        files = sorted(self.folder.glob("slurm*.log"))
        logs = "".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in files)
        return self.run("squeue").stdout + self.run("sinfo").stdout + logs
