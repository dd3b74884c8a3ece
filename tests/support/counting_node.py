"""Ranks whose node's network is counted, as a script for `srun` or forked into a node's network.

Each leaves FOLDER/HOST-PID.json: bytes that the node's card took in and gave out per optimizer
step, as the kernel counted them, and the seconds of a step. Between its two looks every rank has
made the same steps, so what a start and an end exchange is not in it.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from pathlib import Path

from support.ranks import rank_main

# Counted from 1. In the first DeepSpeed records its order of gathers, by which it gathers ahead.
FIRST_STEP, LAST_STEP = 3, 11
CARD = "eth0"
# From sched.h.
CLONE_NEWNET = 0x40000000


def rank_on_node(namespace: str, folder: Path, ranks_per_node: int, argv: list[str],
                 variables: dict[str, str], log: str) -> None:
    """Run as a rank on one of the nodes of a slurm_cluster, without a scheduler or a new Python.

    namespace: those of its nodes, but for the node's number.
    """
    node = f"{1 + int(variables['RANK']) // ranks_per_node}"
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}{node}") as network:
        if libc.setns(network.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    socket.gethostname = lambda: f"node{node}"
    count_steps_into(folder)
    rank_main(argv, {**variables, "GLOO_SOCKET_IFNAME": CARD}, log)


def count_steps_into(folder: Path) -> None:
    """Make every Engine look at the node's card as it begins the two steps."""
    import torch.distributed as dist

    from amid_ds.engine.engine import Engine

    start_step = Engine.start_step
    looks: list[tuple[float, int, int]] = []
    steps = 0

    def start_and_look(engine: Engine, learning_rate: float) -> None:
        nonlocal steps
        steps += 1
        if steps in (FIRST_STEP, LAST_STEP):
            ended = time.monotonic()
            dist.barrier()
            # What is under way arrives before anybody looks.
            time.sleep(0.2)
            looks.append((ended, *_card_bytes()))
            dist.barrier()
        if steps == LAST_STEP:
            seconds, taken, given = ((b - a) / (LAST_STEP - FIRST_STEP)
                                     for a, b in zip(*looks, strict=True))
            (folder / f"{socket.gethostname()}-{os.getpid()}.json").write_text(
                json.dumps({"in": taken, "out": given, "seconds": seconds}))
        start_step(engine, learning_rate)

    Engine.start_step = start_and_look   # type: ignore[method-assign]


def _card_bytes() -> tuple[int, int]:
    """Bytes that the card of this process's network has taken in and given out."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    values = next(line.partition(":")[2] for line in lines if line.strip().startswith(f"{CARD}:"))
    fields = values.split()
    return int(fields[0]), int(fields[8])


if __name__ == "__main__":
    from amid_ds.cli import main

    count_steps_into(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
