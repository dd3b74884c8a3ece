"""A DeepSpeed checkpoint in host memory: DeepSpeed decides what shards hold, and writes no file.

On a GPU the copy goes into pinned memory that is kept from save to save, so the device fills it by
itself and no page is touched for the first time while training waits. The price: host memory for a
rank's shards all the time.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import mmap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Bytes at a multiple of which a tensor begins in a buffer.
ALIGNMENT = 64
CUDA_HOST_REGISTER_PORTABLE = 1

logger = logging.getLogger(__name__)


class PinnedBuffers:
    """Pinned host memory for the tensors of a checkpoint's files, one buffer a file.

    A buffer is allocated at the first save, and anew only where a file has grown.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copies(self, name: str, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of `tensors` in the buffer of the file `name`, over what was there.

        On a GPU they are complete once it is synchronized. Each has a storage of its own, since a
        file holds whole storages.
        """
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if name not in self._buffers or self._buffers[name].nbytes < size:
            # Without the old one, where there is one: host memory need not hold both.
            self._buffers.pop(name, None)
            self._buffers[name] = _pinned(size)
        memory = self._buffers[name].numpy()
        return [_place(tensor, memory, start)
                for tensor, start in zip(tensors, starts, strict=True)]


def _pinned(size: int) -> Tensor:
    """`size` bytes of pinned memory at least. torch's own allocator takes the next power of two.

    Whole pages, since CUDA pins pages and may refuse one that somebody else has pinned. Where it
    refuses, the memory is ordinary, and a save takes longer.
    """
    size = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    buffer = memory[start:start + size]
    runtime: Any = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(buffer.data_ptr(), size, CUDA_HOST_REGISTER_PORTABLE))
    if status:
        logger.warning("%.1f GB of host memory for checkpoints could not be pinned (CUDA error "
                       "%d): training waits longer for each save", size / 1e9, status)
        # CUDA keeps the error, and torch raises it at the next kernel, whoever launches it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
    else:
        # It must not be given back while it counts as pinned; a process that ends does both.
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
    return buffer


def _place(tensor: Tensor, memory: Any, start: int) -> Tensor:
    """A copy of `tensor` at byte `start` of `memory`, under way."""
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return place.view(tensor.shape).copy_(tensor, non_blocking=True)


def stage_checkpoint(deepspeed_engine: Any, pinned: PinnedBuffers | None) -> dict[str, object]:
    """This rank's part of a checkpoint, by file name, copied to host memory. Collective.

    The frozen teacher is left out. With `pinned` buffers the copy lasts until the next one.
    """
    staging = _HostCheckpointEngine(deepspeed_engine.checkpoint_engine, pinned)
    deepspeed_engine.checkpoint_engine = staging
    # DeepSpeed also copies scripts into the folder that it is given: there is none, so a save needs
    # no room but where it ends. Nor need ranks agree on a tag that is always the same.
    deepspeed_engine._copy_recovery_script = lambda folder: None
    deepspeed_engine._checkpoint_tag_validation = lambda tag: None
    deepspeed_engine.module_state_dict = _trained_state(deepspeed_engine)
    try:
        deepspeed_engine.save_checkpoint("nowhere", tag="staged", save_latest=False,
                                         exclude_frozen_parameters=True)
    finally:
        deepspeed_engine.checkpoint_engine = staging.real
        del deepspeed_engine._copy_recovery_script, deepspeed_engine._checkpoint_tag_validation
        del deepspeed_engine.module_state_dict
    if pinned is not None:
        torch.cuda.synchronize()
    return staging.files


def _trained_state(deepspeed_engine: Any) -> Callable[..., dict[str, Tensor]]:
    """DeepSpeed's own state dict, without what is frozen under any name: it leaves out the first
    name of a frozen weight that is tied to another."""
    own = deepspeed_engine.module_state_dict
    frozen = {name for name, parameter
              in deepspeed_engine.module.named_parameters(remove_duplicate=False)
              if not parameter.requires_grad}

    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state: dict[str, Tensor] = own(*args, **kwargs)
        for name in frozen.intersection(state):
            del state[name]
        return state
    return state_dict


class _HostCheckpointEngine:
    """DeepSpeed's checkpoint engine for one save: what it is given to write goes to host memory."""

    def __init__(self, real: Any, pinned: PinnedBuffers | None) -> None:
        self.real, self.pinned = real, pinned
        self.files: dict[str, object] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make no folder: folders are made where the files are written."""

    def save(self, state_dict: object, path: str) -> None:
        """Copy what is to be written, safe from the next step; a tensor that occurs twice, once."""
        name = Path(path).name
        tensors = {id(tensor): tensor.detach() for tensor in tensors_in(state_dict)}
        copies = (self.pinned.copies(name, list(tensors.values())) if self.pinned is not None
                  else [tensor.to("cpu", copy=True) for tensor in tensors.values()])
        by_id = dict(zip(tensors, copies, strict=True))
        self.files[name] = _replace_tensors(state_dict, lambda tensor: by_id[id(tensor)])


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) or type(value) in (list, tuple):
        for child in value.values() if isinstance(value, dict) else value:   # type: ignore[attr-defined]
            yield from tensors_in(child)


def _replace_tensors(value: Any, replacement: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dicts, lists and tuples with other tensors."""
    if isinstance(value, Tensor):
        return replacement(value)
    if isinstance(value, dict):
        twin = copy.copy(value)
        for key, item in value.items():
            twin[key] = _replace_tensors(item, replacement)
        return twin
    return (type(value)(_replace_tensors(item, replacement) for item in value)
            if type(value) in (list, tuple) else value)
