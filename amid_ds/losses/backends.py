"""The arithmetic that a call of the loss runs on: Triton's kernels or plain torch.

Triton compiles at its first launch, with a C compiler, Python's headers and a driver that are new
enough; where one of them is missing, it is that launch which fails, perhaps hours into a queue. So
`auto` tries one small kernel first, once a process, and falls back to plain torch loudly if that
fails. The ranks of a tensor-parallel group decide together: the backends exchange the same row sums
but cut blocks of different sizes.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.errors import InputError
from amid_ds.losses import elementwise
from amid_ds.losses.block import Backend, Block, Logits
from amid_ds.losses.objective import AMiD

logger = logging.getLogger(__name__)

# The columns of the kernel that is tried first.
TRIAL_COLUMNS = 64


def choose_backend(name: str, objective: AMiD | None, logits: list[Tensor],
                   shard: VocabShard) -> Backend:
    """The backend of this name, the same on all ranks of a shard's group.

    `auto`: Triton on a GPU if it runs there and has the kernels, else plain torch. logits: a tensor
    on the logits' device for each model, of their dtypes. One collective at the first call with a
    shard on a GPU under `auto`. Raises InputError for `triton` where that is not possible.
    """
    if name not in ("auto", "torch", "triton"):
        raise InputError(f"backend={name!r}", "auto, torch or triton",
                         "auto takes triton on a GPU and torch elsewhere")
    device, dtypes = logits[0].device, [tensor.dtype for tensor in logits]
    if name == "torch" or (name == "auto" and not _is_gpu(device)):
        return elementwise
    if name == "auto" and not _runs_on_every_rank(device, shard):
        return elementwise
    try:
        from amid_ds.losses import kernels
    except ImportError as error:
        raise InputError(f"backend='triton', but: {error}", "Triton",
                         "pip install triton, or backend='auto'") from None
    if (_is_gpu(device) or kernels.INTERPRETED) and kernels.supports(objective, dtypes):
        return kernels
    if name == "auto":
        return elementwise
    raise InputError(
        f"backend='triton' on {device} for {objective} and logits of {dtypes}",
        "a GPU (or TRITON_INTERPRET=1), a built-in divergence, and fp32, bf16 or fp16",
        "use backend='auto' or 'torch'")


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _runs_on_every_rank(device: torch.device, shard: VocabShard) -> bool:
    here = _triton_runs(device)
    everywhere = shard.least("Triton", [int(here)], device) == [1]
    if here and not everywhere:
        _say_once("it does not run on another rank of the tensor-parallel group")
    return everywhere


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    """True if a small kernel runs on the device; False, with a warning, if it cannot be made.

    What is wrong with the device itself, memory above all, is raised.
    """
    try:
        _try_kernel(device)
    except (InputError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # Triton fails in many ways: no compiler (RuntimeError), no headers (CalledProcessError), an old
    # driver (ImportError, RuntimeError, PTXASError), a full home (OSError).
    except Exception as error:
        if "out of memory" in str(error):
            raise
        _say_once(f"{type(error).__name__}: {error}")
        return False
    return True


def _try_kernel(device: torch.device) -> None:
    """Compile and run the smallest kernel of the loss."""
    from amid_ds.losses import kernels

    raw = torch.zeros(1, TRIAL_COLUMNS, dtype=torch.bfloat16, device=device)
    block = Block(Logits(raw), None, None, torch.float32,
                  labels=torch.zeros(1, dtype=torch.int64, device=device))
    # Reading the result waits for the launch, which may fail later than the call.
    kernels.log_normalisers(block).tolist()


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning(
        "the loss runs in plain torch, several times slower between the matrix products, because "
        "Triton's kernels do not run here: %s\n"
        "  Triton needs a C compiler, Python's headers and a driver as new as its CUDA: install "
        "gcc and python3-dev (or set CC), or update the driver; `auto` then takes the kernels",
        reason.strip())
