"""DeepSpeed, imported once and quietly."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch


def import_deepspeed() -> Any:
    """deepspeed, quiet, and without its just-in-time shared-memory collective.

    That op costs 70 s of compilation and Python's headers at the first run on a CPU, and serves
    inference alone. Nothing else asks which ops could be built, so none of them is tried: each that
    cannot be built for a GPU costs time and a warning.
    """
    # DeepSpeed's other ops are built by ninja, which lies beside this interpreter, not always on
    # the PATH.
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != folder:
        os.environ["PATH"] = os.pathsep.join([folder, path])
    # Without it DeepSpeed warns of a guess.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR").upper())
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 has renamed; nothing that a user could
    # act on.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    # Made by the probe where it is not there; an op that it lacks is not built.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def recovery_script() -> Path:
    """DeepSpeed's script from its shards to fp32 weights; its users expect it beside them."""
    from deepspeed.utils import zero_to_fp32

    return Path(zero_to_fp32.__file__)
