"""The one reader of files that torch.save wrote: nothing in them runs.

A pickle can name any function to be called when it is read. Whoever can write into a run's folder
could have theirs called, and no checksum is against that: it would be computed anew. So a file is
read with torch's own restricted unpickler, which builds tensors and plain containers, and beside
them the few classes of DeepSpeed that its shards hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amid_ds.engine.backend import import_deepspeed
from amid_ds.errors import TrainingError


def read_torch_file(path: str | Path, mmap: bool = False) -> Any:
    """The content of a file of torch.save, its tensors on the CPU; mmap: mapped, not read.

    Raises TrainingError where the file is damaged, or holds anything but tensors, plain containers
    and DeepSpeed's own records.
    """
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from None
    # A damaged file can make the unpickler raise nearly anything.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if "GLOBAL" in line), next(iter(lines), ""))
        raise TrainingError(
            f"{path} is not read: {type(error).__name__}: {reason}\n"
            "  it is damaged, or holds more than tensors and numbers: such a file may run code "
            "when it is read, and no checkpoint has one") from None


def read_safely(deepspeed_engine: Any) -> None:
    """Have DeepSpeed's own loading of a checkpoint read its files with `read_torch_file`.

    Its checkpoint engines read with torch's unrestricted unpickler, and have no setting for it.
    """
    deepspeed_engine.checkpoint_engine.load = lambda path, map_location=None: read_torch_file(path)
