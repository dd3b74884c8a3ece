"""DeepSpeed, imported once and quietly; and what any run imports, at its beginning."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from amid_ds.distributed.devices import name_accelerator


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
    name_accelerator()
    with _without_mlflow():
        import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "ERROR").upper())
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 has renamed; nothing that a user could
    # act on.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    # Made by the probe where it is not there; an op that it lacks is not built.
    deepspeed.ops.__compatible_ops__ = {}
    # Used by its Muon alone, which it imports with any optimizer.
    deepspeed.runtime.compiler.compile = lambda: _compiled_when_called
    # Each shard holds one of these. Python 3.11.2, which Debian 12 has, pickles an enum's member by
    # `getattr`, and that no reader of checkpoints allows.
    deepspeed.runtime.zero.config.ZeroStageEnum.__reduce_ex__ = (
        lambda stage, protocol: (type(stage), (stage.value,)))
    return deepspeed


@contextlib.contextmanager
def _without_mlflow() -> Iterator[None]:
    """A context in which mlflow cannot be imported: DeepSpeed's autotuner, which nothing here uses,
    would import it, and with it pandas, in every rank."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)`, which imports torch's compiler when it is called and not here."""
    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A caller that is itself compiled takes the function in.
        run = function if torch.compiler.is_compiling() else compiled()
        return run(*args, **kwargs)

    return call


@contextlib.contextmanager
def groups_forgotten() -> Iterator[None]:
    """A context after which DeepSpeed knows no process group: they are gone, and the next engine of
    this process has its own."""
    try:
        yield
    finally:
        if "deepspeed" in sys.modules:
            from deepspeed.utils import groups

            groups._release_process_group_references()


def import_libraries() -> None:
    """Import deepspeed and what every model takes of transformers, on all ranks at the same time.

    Where they are used, rank 0 would import for work that it does alone, and the others after it.
    """
    import_deepspeed()
    import transformers.generation.utils
    import transformers.integrations.deepspeed  # noqa: F401


def recovery_script() -> Path:
    """DeepSpeed's script from its shards to fp32 weights; its users expect it beside them."""
    from deepspeed.utils import zero_to_fp32

    return Path(zero_to_fp32.__file__)
