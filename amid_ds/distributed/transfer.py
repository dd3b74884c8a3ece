"""Tensors from the host to its device, without the host waiting for what the device still does.

A copy from ordinary memory, or one that may block, first waits until the device has done all that
it was given: a GPU then stands still until the host has caught up. One from pinned memory is queued
like a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor`, which is in host memory, on `device`.

    torch keeps the pinned copy until the device has read it, so nothing else has to.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
