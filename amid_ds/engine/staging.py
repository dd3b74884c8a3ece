"""A DeepSpeed checkpoint in host memory: DeepSpeed decides what shards hold, and writes no file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor


def stage_checkpoint(deepspeed_engine: Any) -> dict[str, object]:
    """This rank's part of a checkpoint, by file name, copied to host memory. Collective.

    The frozen teacher is left out.
    """
    staging = _HostCheckpointEngine(deepspeed_engine.checkpoint_engine)
    deepspeed_engine.checkpoint_engine = staging
    # DeepSpeed also copies scripts into the folder that it is given: there is none, so a save needs
    # no room but where it ends.
    deepspeed_engine._copy_recovery_script = lambda folder: None
    try:
        deepspeed_engine.save_checkpoint("nowhere", tag="staged", save_latest=False,
                                         exclude_frozen_parameters=True)
    finally:
        deepspeed_engine.checkpoint_engine = staging.real
        del deepspeed_engine._copy_recovery_script
    return staging.files


class _HostCheckpointEngine:
    """DeepSpeed's checkpoint engine for one save: what it is given to write goes to host memory."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.files: dict[str, object] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make no folder: folders are made where the files are written."""

    def save(self, state_dict: object, path: str) -> None:
        self.files[Path(path).name] = _to_host(state_dict, {})


def _to_host(value: Any, seen: dict[int, Tensor]) -> Any:
    """A copy in host memory, safe from the next step; a tensor that occurs twice is copied once."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.detach().to("cpu", copy=True)
        return seen[id(value)]
    if isinstance(value, dict):
        twin = copy.copy(value)
        for key, item in value.items():
            twin[key] = _to_host(item, seen)
        return twin
    return (type(value)(_to_host(item, seen) for item in value)
            if type(value) in (list, tuple) else value)
