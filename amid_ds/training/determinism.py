"""`train.deterministic`: on a GPU too, the same start gives the same digits.

Some of torch's kernels on a GPU add up in whatever order their threads come, above all the backward
pass of flash attention. torch has others for most of them, which a global switch selects. They take
more time or memory, so a recipe asks for them. A CPU adds up in one order either way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from amid_ds.errors import TrainingError

# cuBLAS adds up in one order with workspaces of fixed sizes alone: eight of 4 MiB for each stream.
CUBLAS_VARIABLE, CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """A context in which torch takes deterministic kernels alone, if `enabled`.

    Its end restores what was set before. It has to begin before the first matrix product on a
    GPU, at which the workspaces are made. Raises TrainingError at an operation without such a
    kernel.
    """
    if not enabled:
        yield
        return
    switch: Any = torch.utils.deterministic
    workspaces = os.environ.get(CUBLAS_VARIABLE)
    before = (torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled(),
              switch.fill_uninitialized_memory)
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACES)
    # With warnings alone flash attention would keep its usual backward pass.
    torch.use_deterministic_algorithms(True, warn_only=False)
    # Writing to all new memory finds programs that read it too early, and costs time.
    switch.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or "deterministic" not in str(error):
            raise
        raise TrainingError(
            f"train.deterministic: {str(error).partition(', but')[0]}\n"
            "  expected: operations that torch has deterministic kernels for\n"
            "  remedy:   set train.deterministic=false, or choose a model that does without this "
            "one") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switch.fill_uninitialized_memory = before[2]
        if workspaces is None:
            os.environ.pop(CUBLAS_VARIABLE, None)
