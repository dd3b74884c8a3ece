"""Timing and memory helpers of the benchmarks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from amid_ds.distributed.rank_logging import PACKAGE_LOGGER
from amid_ds.distributed.world import World


@contextlib.contextmanager
def no_progress() -> Iterator[None]:
    """A context without the package's messages of progress: stdout is for the results alone."""
    before = PACKAGE_LOGGER.level
    PACKAGE_LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        PACKAGE_LOGGER.setLevel(before)


def slowest_rank_seconds(world: World, work: Callable[[], object]) -> float:
    """Seconds that the slowest rank takes for `work`, which all begin together. Collective."""
    world.barrier()
    began = time.perf_counter()
    work()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return world.most(time.perf_counter() - began)


def process_bytes(key: str) -> int:
    """Memory of this process, on Linux. VmRSS: resident now; VmHWM: the peak since the reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak_rss() -> None:
    """Set this process's peak (VmHWM) to what is resident now. Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
