"""How a block is gone through: tile by tile of the vocabulary, small enough that what is done to one stays in cache.

On a CPU the tiles of a large block are worked by functions that torch.compile makes for this machine's vectors, all
threads on one tile: one loop where plain torch takes twenty, measured 7 ns per pair of logits and thread for 16.
Compiling takes some ten seconds the first time on a machine and three in each later process, so a small block goes the
plain way, where each tile is one thread's because a tile's operations are too short to be shared. Which way, its size
alone decides: the last digits of the two differ, and a run that is resumed has to find the same ones.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from amid_ds.losses.block import Block
from amid_ds.losses.host_memory import keep_freed_memory

T = TypeVar("T")
log = logging.getLogger(__name__)
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 22}   # of the tiles under way together: 2 MB of fp32, 16 MB
TEMPORARIES = 10                       # of a tile, alive at once
MOST_THREADS = 8                       # beyond, tiles would be too small to be worth a thread
WORTH_COMPILING = 1 << 22              # logits of a block on a CPU: 70 ms of one thread, the plain way
VARIANTS = 1000                        # of a compiled function, by objective and edge sizes; at 8 dynamo would raise


def tiling(device: torch.device) -> tuple[int, int]:
    """Bytes that the tiles' temporaries take at most (fp32), and the most tokens for which a tile is not too narrow.

    The same whatever the number of threads, which ranks of a group need not have in common.
    """
    elements = TILE_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    return 4 * elements * TEMPORARIES, elements // 256


def product_elements(device: torch.device) -> int:
    """Elements of a matrix product that is made in low precision before it is added to an fp32 sum."""
    return 4 * TILE_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]


def each_tile(block: Block, visit: Callable[[Block], T]) -> list[T]:
    """What `visit` makes of every tile of the block, in order. `visit` is a function of a module, not of a call."""
    width, cpu = block.student.width, block.device.type == "cpu"
    if cpu:
        keep_freed_memory()
    compiled = cpu and block.tokens * width >= WORTH_COMPILING
    threads = min(torch.get_num_threads(), MOST_THREADS) if cpu and not compiled else 1
    most = max(1, TILE_ELEMENTS["cpu" if cpu else "cuda"] // (threads * max(1, block.tokens)))
    step = max(1, -(-width // max(1, -(-width // most))))      # of nearly equal widths
    tiles = [block.tile(slice(start, min(start + step, width))) for start in range(0, width, step)]
    if compiled:
        visit = _compiled(visit)
    if threads == 1 or len(tiles) < 2:
        return [visit(tile) for tile in tiles]
    return list(_pool(threads).map(torch.no_grad()(visit), tiles))


@functools.cache
def _compiled(visit: Callable[[Block], T]) -> Callable[[Block], T]:
    """`visit` compiled for any sizes and numbers; as it is where it or this machine does not let itself be compiled."""
    function = torch.compile(visit, dynamic=True, fullgraph=True)

    def run(tile: Block) -> T:
        nonlocal function
        try:
            with torch._dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS):
                return function(tile)
        except torch._dynamo.exc.TorchDynamoException as error:
            _say_once(str(error).strip().splitlines()[0])
            function = visit
            return visit(tile)

    return run


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("the loss goes on without torch.compile, at half the speed and with other last digits: %s", reason)


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that run torch's operations alone, each."""
    pool, before = ThreadPoolExecutor(threads, "amid_ds tile"), torch.get_num_threads()
    ready = threading.Barrier(threads)

    def alone() -> None:
        torch.set_num_threads(1)       # this thread's OpenMP setting, and the default of threads yet to be
        ready.wait()

    for task in [pool.submit(alone) for _ in range(threads)]:
        task.result()
    torch.set_num_threads(before)      # so the default is put back
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)   # a forked child has the pool's object but not its threads
