"""How a command of ours is started on this machine: by itself, or on several ranks under the `deepspeed` launcher."""

from __future__ import annotations

import socket
import sys
from pathlib import Path


def launch_command(ranks: int, *arguments: str) -> list[str]:
    """The command line of `amid-ds ARGUMENTS` on `ranks` ranks, with a port of their own to meet at."""
    if ranks == 1:
        return [sys.executable, "-m", "amid_ds", *arguments]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), "--log_level", "error", "--module",
            "amid_ds", *arguments]


def free_port() -> int:
    """Of this machine, for ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
