"""What the benchmarks measure with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from amid_ds.distributed.world import World


def slowest(world: World, work: Callable[[], Any]) -> float:
    """Seconds that the slowest rank takes for `work`, which all begin together. Collective."""
    world.barrier()
    began = time.perf_counter()
    work()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return max(world.gather(time.perf_counter() - began))


def status_bytes(key: str) -> int:
    """Of this process, from Linux: VmRSS what is resident now, VmHWM the most since the mark was set."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
