"""DeepSpeed's CPU Adam, for offloaded state: compiled the first time on a machine, then kept.

torch keeps what it has compiled in TORCH_EXTENSIONS_DIR, by default ~/.cache/torch_extensions, and
a lock file in there while it compiles. One rank of each node compiles, the others wait for it with
a sign of life every now and then, because a collective waits no longer than its timeout.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from typing import Any

import torch

from amid_ds.distributed.world import World
from amid_ds.engine.backend import import_deepspeed

REMEDY = "install g++, ninja and Python's headers (python3-dev)"
MAX_COMPILER_REASON = 200

logger = logging.getLogger(__name__)


def load_cpu_adam(world: World) -> bool:
    """True where every rank has DeepSpeed's CPU Adam; else the reason is logged. Collective."""
    began = time.monotonic()
    logger.info("the optimizer's state is offloaded: making DeepSpeed's CPU Adam ready (the first "
                "time on a machine it is compiled, for a minute or two)")
    problems = cpu_adam_problems(world)
    for node, problem in problems:
        logger.warning("no CPU Adam of DeepSpeed's on %s: %s\n  torch's fused AdamW steps the "
                       "offloaded state instead, by the same formula; for DeepSpeed's, %s",
                       node, problem, REMEDY)
    if not problems:
        logger.info("CPU Adam is ready after %.0f s", time.monotonic() - began)
    return not problems


def new_cpu_adam(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's CPU Adam, as torch's AdamW is made, after it has been loaded."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(parameters, **options)
    return optimizer


def cpu_adam_problems(world: World) -> list[tuple[str, str]]:
    """(node, reason) of each node that cannot have it; [] where all have it loaded. Collective."""
    import_deepspeed()
    problem = world.run_on_hosts(_load)
    if not world.any(problem is not None):
        # The other ranks load what has been compiled.
        problem = _load()
    if not world.any(problem is not None):
        return []
    everyone = world.gather((socket.gethostname(), problem))
    return sorted({(node, text) for node, text in everyone if text is not None})


def _load() -> str | None:
    """Load it, compiled if need be; the reason where that fails."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    # A compiler may fail in any way, and so may the import of what it made.
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        telling = (line for line in lines if re.search("error:|not found|No such file", line))
        return next(telling, lines[0]).strip()[:MAX_COMPILER_REASON]
    return None
