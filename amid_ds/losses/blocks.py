"""The number of tokens in a block of the fused loss, from what the device is fast at.

On an accelerator a block is as large as the workspace allows, in multiples of BLOCK_MULTIPLE, and
of a size whose products leave few multiprocessors idle: a product is cut into tiles of the output,
one or two to a multiprocessor, and its last wave of tiles takes as long as a full one. Each further
block costs a reading and a writing of the weight's gradient. A CPU has no waves: blocks of equal
length. `bench loss --predict` computes with the same functions.

The workspace is a fixed rule of the device's memory and not of what is free at the moment: a
resumed run then has the blocks that it had, hence the same last digits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from amid_ds.errors import InputError
from amid_ds.losses.tiles import product_elements, tiling

if TYPE_CHECKING:
    from amid_ds.losses.checks import VocabLayout

GIB = 1 << 30
CPU_WORKSPACE_BYTES = 96_000_000
# Of an accelerator's memory, rounded down to a power of two in GiB: from 1 to 4 GiB. Above, further
# blocks cost less than 1 % of the products.
WORKSPACE_SHARE = 1 / 32
LEAST_WORKSPACE_GIB, MOST_WORKSPACE_GIB = 1, 4
# Elements to which rows of logits are padded, by device: products and 16-byte loads of kernels need
# aligned rows, and tokenizers have 50257 or 151669 entries. On a CPU alignment made no difference
# beyond the noise.
ROW_ALIGNMENT = {"cpu": 1, "cuda": 64}
# Tokens; a multiple of every tile's rows.
BLOCK_MULTIPLE = 256
# (rows, columns, tiles that a multiprocessor works on at once) of the tiles of matrix products.
PRODUCT_TILES = ((256, 128, 1), (128, 256, 1), (192, 128, 1), (128, 192, 1), (128, 128, 2),
                 (64, 256, 2))
# The price of a block, in tokens of one product: a third of reading and writing the weight's fp32
# gradient (8 bytes an element) is not hidden behind the product that makes it, at 180 FLOPs a byte.
BLOCK_PRICE = 245


def tokens_per_block(tokens: int, layout: VocabLayout, hidden_size: int, element_bytes: int,
                     workspace_bytes: int | None, device: torch.device, tiled: bool) -> int:
    """The length of the blocks of `tokens` tokens, the last maybe shorter; the same on all ranks of
    a group.

    element_bytes: of both models' logits together. tiled: the arithmetic is plain torch, whose
    tiles take a part of the workspace. One collective at the first call with a shard on a GPU.
    Raises InputError for a workspace that is not above 0.
    """
    memory = multiprocessors = None
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        memory, multiprocessors = layout.shard.least(
            "the device", [card.total_memory, card.multi_processor_count], device)
    workspace = default_workspace_bytes(memory) if workspace_bytes is None else workspace_bytes
    if workspace <= 0:
        raise InputError(f"workspace_bytes={workspace}", "a number of bytes above 0",
                         "leave it out for the default")
    token_bytes = max(1, row_stride(layout.widest, device.type)) * element_bytes
    most = tokens_that_fit(workspace, token_bytes, device, tiled)
    if multiprocessors is None:
        return equal_blocks(tokens, most)
    return accelerator_block(tokens, most, layout.widest, hidden_size, multiprocessors)


def tokens_that_fit(workspace_bytes: int, token_bytes: int, device: torch.device,
                    tiled: bool) -> int:
    """The most tokens of a block, at least 1: their logits take `token_bytes` each.

    The rest of the workspace is for what plain torch needs beside them (see `tokens_per_block`).
    """
    temporaries, most = tiling(device) if tiled else (0, None)
    # Two bytes per element of a product in low precision.
    products = 0 if adds_in_fp32(device, torch.float32) else 2 * product_elements(device)
    fitting = max(1, (workspace_bytes - temporaries - products) // token_bytes)
    return fitting if most is None else min(most, fitting)


def adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """True if products of bf16 or fp16 on this device are written, and added up, in `dtype`.

    That is fp32 on NVIDIA's GPUs: torch has no such product on a CPU, and builds of it for ROCm
    have refused it.
    """
    return device.type == "cuda" and torch.version.hip is None and dtype == torch.float32


def default_workspace_bytes(memory: float | None) -> int:
    """The workspace of a call that names none, on an accelerator of `memory` bytes; None: a CPU.

    96 MB on a CPU; elsewhere 1, 2 or 4 GiB, at most a 32nd of the memory (and at least 1 GiB), so
    that cards of one kind agree though they do not report the same number of bytes.
    """
    if memory is None:
        return CPU_WORKSPACE_BYTES
    gib = memory * WORKSPACE_SHARE / GIB
    power = 1 << math.floor(math.log2(max(gib, LEAST_WORKSPACE_GIB)))
    return min(power, MOST_WORKSPACE_GIB) * GIB


def row_stride(width: int, device_type: str) -> int:
    """Elements from one row of logits to the next in the workspace."""
    alignment = ROW_ALIGNMENT["cpu" if device_type == "cpu" else "cuda"]
    return -(-width // alignment) * alignment


def slices(tokens: int, size: int) -> Iterator[slice]:
    """Blocks of `size` of `tokens` tokens, the last maybe shorter."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, max(1, size)))


def equal_blocks(tokens: int, most: int) -> int:
    """The length of as few blocks as possible of nearly equal length, none above `most`."""
    count = -(-tokens // most)
    return -(-tokens // count) if count else most


@functools.lru_cache(maxsize=1024)
def accelerator_block(tokens: int, most: int, vocabulary: int, hidden_size: int,
                      multiprocessors: int) -> int:
    """The length of the blocks of `tokens` tokens, none above `most`; the last may be shorter.

    One block if they fit. vocabulary: columns of the logits on this rank.
    """
    if tokens <= most or most < BLOCK_MULTIPLE:
        return equal_blocks(tokens, most)

    def price(size: int) -> float:
        full, rest = divmod(tokens, size)
        sizes = {size: full, rest: 1 if rest else 0}
        return sum(count * _block_price(n, vocabulary, hidden_size, multiprocessors)
                   for n, count in sizes.items() if count)

    largest_first = range(most // BLOCK_MULTIPLE * BLOCK_MULTIPLE, 0, -BLOCK_MULTIPLE)
    return min(largest_first, key=price)


@functools.lru_cache(maxsize=4096)
def _block_price(n: int, vocabulary: int, hidden_size: int, multiprocessors: int) -> float:
    """Time of a block of n tokens, in tokens of a product that leaves no multiprocessor idle.

    Two products for the logits and one for the hidden states' gradient; the weight's takes the same
    time however the tokens are cut.
    """
    logits = wave_share(n, vocabulary, multiprocessors)
    hidden = wave_share(n, hidden_size, multiprocessors)
    return n * (2 / logits + 1 / hidden) + BLOCK_PRICE


def wave_share(rows: int, columns: int, multiprocessors: int) -> float:
    """The share of the multiprocessors' time that a product [rows, columns] spends on its output.

    With the best of PRODUCT_TILES; the rest goes to edges of tiles and to the last wave.
    """
    best = 0.0
    for tile_rows, tile_columns, at_once in PRODUCT_TILES:
        slots = multiprocessors * at_once
        waves = -(-(-(-rows // tile_rows) * -(-columns // tile_columns)) // slots)
        best = max(best, rows * columns / (tile_rows * tile_columns) / (waves * slots))
    return best
