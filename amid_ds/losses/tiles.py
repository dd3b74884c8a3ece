"""A block visited tile by tile of the vocabulary, each small enough to stay in the CPU's cache.

On a CPU the tiles of a large block are processed by functions that torch.compile makes for this
machine's vectors, all threads on one tile: one loop instead of plain torch's twenty, measured 7 ns
per pair of logits and thread instead of 16. Compiling takes some ten seconds the first time on a
machine and three in each later process. A small block is therefore processed eagerly, one thread
per tile, because a tile's operations are too short to be shared. Block size alone decides between
compiled and eager: they differ in the last digits, and a resumed run must reproduce them.
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
logger = logging.getLogger(__name__)

# Elements of the tiles under way together: 2 MB of fp32 on a CPU, 16 MB on a GPU.
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 22}
# A narrower tile is dominated by the overhead of its operations; it bounds a block's tokens.
MIN_TILE_COLUMNS = 256
# Temporaries of a tile that are alive at once.
TEMPORARIES = 10
# With more threads tiles would be too small to be worth a thread.
MOST_THREADS = 8
# Logits of a block on a CPU from which compiling pays: 70 ms of one thread, eagerly.
WORTH_COMPILING = 1 << 22
# Of one compiled function, by objective and edge sizes; dynamo's own limit of 8 would raise.
MOST_VARIANTS = 1000


def tiling(device: torch.device) -> tuple[int, int]:
    """(bytes of the tiles' temporaries in fp32, the most tokens that leave a tile wide enough).

    Independent of the number of threads, which the ranks of a group need not have in common.
    """
    elements = _tile_elements(device)
    return 4 * elements * TEMPORARIES, elements // MIN_TILE_COLUMNS


def product_elements(device: torch.device) -> int:
    """Elements of a matrix product in low precision, made before it is added to an fp32 sum where
    the device cannot add while it multiplies (`blocks.adds_in_fp32`)."""
    return 4 * _tile_elements(device)


def each_tile(block: Block, visit: Callable[..., T], *rows: object) -> list[T]:
    """[visit(tile, *rows) for every tile of the block], in order.

    visit: a function of a module (not a closure: it is compiled once per process); must not keep
    the tile. rows: row statistics, which are the same for every tile.
    """
    width, on_cpu = block.student.width, block.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    compiled = on_cpu and block.tokens * width >= WORTH_COMPILING
    threads = min(torch.get_num_threads(), MOST_THREADS) if on_cpu and not compiled else 1
    most = max(1, _tile_elements(block.device) // (threads * max(1, block.tokens)))
    # Tiles of nearly equal widths: a compiled function then sees few sizes.
    step = max(1, -(-width // max(1, -(-width // most))))
    tiles = [block.tile(slice(start, min(start + step, width))) for start in range(0, width, step)]
    if compiled:
        visit = _compiled(visit)
    if threads == 1 or len(tiles) < 2:
        return [visit(tile, *rows) for tile in tiles]
    visit_without_grad = torch.no_grad()(visit)
    return list(_pool(threads).map(lambda tile: visit_without_grad(tile, *rows), tiles))


def _tile_elements(device: torch.device) -> int:
    return TILE_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]


@functools.cache
def _compiled(visit: Callable[..., T]) -> Callable[..., T]:
    """`visit` compiled for any sizes and numbers; `visit` itself from the first failure on."""
    function = torch.compile(visit, dynamic=True, fullgraph=True)

    def run(tile: Block, *rows: object) -> T:
        nonlocal function
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS,
                                            accumulated_recompile_limit=MOST_VARIANTS):
                return function(tile, *rows)
        except torch._dynamo.exc.TorchDynamoException as error:
            _say_once(str(error).strip().splitlines()[0])
            function = visit
            return visit(tile, *rows)

    return run


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("the loss goes on without torch.compile, at half the speed and with other last "
                   "digits: %s", reason)


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch's operations use that thread alone."""
    pool, before = ThreadPoolExecutor(threads, "amid_ds tile"), torch.get_num_threads()
    ready = threading.Barrier(threads)

    def use_one_thread() -> None:
        # Sets this thread's OpenMP setting, and the default of threads yet to be started.
        torch.set_num_threads(1)
        ready.wait()

    for future in [pool.submit(use_one_thread) for _ in range(threads)]:
        future.result()
    # So the default is put back.
    torch.set_num_threads(before)
    return pool


# A forked child has the pool's object but not its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
