"""Where the host waits for its GPU, found on a CPU: calls of torch that wait, and who makes them.

A faked CUDA keeps every tensor on the CPU, so nothing tells a tensor of the device from one of the
host, except where the code says so: by `device="cpu"`, or by pinning it. So a call is judged by
what it would do to a tensor of the device, and one on a tensor of the host counts too.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Functions of a tensor that wait for the device, when the tensor is on one: they read its values,
# or the number of values that fit a condition. (Tensor.numpy refuses such a tensor.)
WAITING = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__",
           "__format__", "__repr__", "cpu", "is_nonzero", "equal", "allclose",
           "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
           # By unique, of more than a few elements to be found.
           "isin"}
# Functions that make a tensor out of the host's numbers: on a device, by a copy that blocks.
FROM_NUMBERS = {"tensor", "as_tensor", "asarray"}
# The attribute of a tensor that the code has put into the host's memory: whether it is pinned.
PINNED = "pinned_by_fake_cuda"


class FakedDeviceName(str):
    """The name of the CPU where the code means a GPU."""


class HostWaits:
    """The places (file:function call) where the host waited, and how often, while `watching`."""

    def __init__(self) -> None:
        self.watching = False
        self.places: Counter[str] = Counter()

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call of torch's function `name`, if it waits."""
        if self.watching and (wait := _wait_of(name, args, kwargs)) is not None:
            self.record(wait)

    def record(self, name: str) -> None:
        """Record that the caller waits, by a call of this name."""
        if self.watching:
            self.places[f"{_caller()} {name}"] += 1


class Watched(TorchFunctionMode):
    """Records in `waits` what the code in this context would wait for, had it a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = HostWaits()
        self.waits.watching = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.waits.see(getattr(function, "__name__", ""), args, kwargs or {})
        return function(*args, **kwargs or {})


def pinned_copy(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
    """In the place of Tensor.pin_memory."""
    copy = tensor.clone()
    setattr(copy, PINNED, True)
    return copy


def mark_host_tensor(tensor: object, pinned: bool, kwargs: dict[str, Any]) -> None:
    """Remember that a call with `kwargs` made `tensor` in the host's memory, if it did."""
    if isinstance(tensor, torch.Tensor) and (pinned or kwargs.get("device") == "cpu"):
        setattr(tensor, PINNED, pinned)


def is_cuda(value: object) -> bool:
    """True for a device, or its name, that is a GPU."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


def _wait_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What a call waits by, None if it does not wait."""
    queued = bool(kwargs.get("non_blocking"))
    devices = [*args[1:], kwargs.get("device")]
    if name in WAITING or (name == "where" and len(args) == 1):
        return name
    if name == "__getitem__" and _by_mask(args[1]):
        return "boolean index"
    if name == "__setitem__" and _by_mask(args[1]) and getattr(args[2], "ndim", 0):
        return "boolean index"
    if name == "repeat_interleave" and "output_size" not in kwargs and any(
            isinstance(value, torch.Tensor) for value in args[1:]):
        return name
    if name in FROM_NUMBERS and is_cuda(kwargs.get("device")):
        return f"{name} on a GPU"
    if name in ("to", "cuda") and (name == "cuda" or any(map(is_cuda, devices))):
        # From memory that is not pinned the driver may wait, whatever it was asked.
        return None if queued and getattr(args[0], PINNED, False) else "copy to a GPU"
    if name == "to" and any(type(value) is str and value == "cpu" for value in devices):
        return None if queued else "copy to the host"
    if name == "copy_":
        pinned = [getattr(side, PINNED) for side in args[:2] if hasattr(side, PINNED)]
        return "copy_" if pinned and not (queued and all(pinned)) else None
    return None


def _by_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def _caller() -> str:
    """file:function of the innermost frame that is no part of torch, of the fake, or of DeepSpeed's
    accelerator."""
    frame = sys._getframe(1)
    torch_folder = Path(torch.__file__).parent
    skipped = (str(torch_folder), str(torch_folder.parent / "deepspeed" / "accelerator"),
               __file__, str(Path(__file__).with_name("fake_cuda.py")))
    while frame is not None and frame.f_code.co_filename.startswith(skipped):
        frame = frame.f_back
    if frame is None:
        return "?"
    parts = Path(frame.f_code.co_filename).parts
    packages = {"amid_ds", "transformers", "deepspeed"}
    first = max((i for i, name in enumerate(parts) if name in packages), default=-1)
    return f"{'/'.join(parts[first:])}:{frame.f_code.co_name}"
