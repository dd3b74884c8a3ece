"""One rank of a run whose node's network is counted: `python counting_node.py FOLDER train RECIPE`.

The first rank of each node writes FOLDER/HOST.json: bytes that the node's card took in and gave out
per optimizer step, as the kernel counted them, and the seconds of a step. Between the two looks
every rank has made the same steps, so what a start and an end exchange is not in it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

# Counted from 1. In the first DeepSpeed records its order of gathers, by which it gathers ahead.
FIRST_STEP, LAST_STEP = 3, 11


def card_bytes(card: str = "eth0") -> tuple[int, int]:
    """Bytes that `card` of this process's network has taken in and given out."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    values = next(line.partition(":")[2] for line in lines if line.strip().startswith(f"{card}:"))
    fields = values.split()
    return int(fields[0]), int(fields[8])


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
            # What is under way arrives before anybody looks.
            ended = time.monotonic()
            dist.barrier()
            time.sleep(0.2)
            looks.append((ended, *card_bytes()))
            dist.barrier()
        if steps == LAST_STEP and os.environ["SLURM_LOCALID"] == "0":
            seconds, taken, given = ((b - a) / (LAST_STEP - FIRST_STEP)
                                     for a, b in zip(*looks, strict=True))
            (folder / f"{os.uname().nodename}.json").write_text(
                json.dumps({"in": taken, "out": given, "seconds": seconds}))
        start_step(engine, learning_rate)

    Engine.start_step = start_and_look   # type: ignore[method-assign]


if __name__ == "__main__":
    from amid_ds.cli import main

    count_steps_into(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
