"""amid_ds distils large language models with the AMiD objective, at pretraining scale.

The paper is arXiv 2510.15982. Importing the package imports nothing else: what is used of it does,
torch for the loss, and deepspeed, transformers and datasets where they are needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amid_ds.cli.functions import evaluate, plan, train
    from amid_ds.config.parse import load_recipe
    from amid_ds.distributed.vocab_parallel import VocabShard
    from amid_ds.errors import InputError, Stopped, TrainingError
    from amid_ds.losses import (
        AlphaBeta,
        AMiD,
        ConcreteScore,
        LMHead,
        PerToken,
        SampledReverseKL,
        SparseTargets,
        amid_loss,
        linear_amid_loss,
        preset,
    )
    from amid_ds.run.results import Run
    from amid_ds.training.callbacks import Callback

__version__ = "0.1.0"
__all__ = ["AMiD", "AlphaBeta", "Callback", "ConcreteScore", "InputError", "LMHead", "PerToken",
           "Run", "SampledReverseKL", "SparseTargets", "Stopped", "TrainingError", "VocabShard",
           "amid_loss", "evaluate", "linear_amid_loss", "load_recipe", "plan", "preset", "train"]
# The modules of the names that are not in `losses`.
_ELSEWHERE = {
    "Callback": "training.callbacks", "InputError": "errors", "Run": "run.results",
    "Stopped": "errors", "TrainingError": "errors", "VocabShard": "distributed.vocab_parallel",
    "evaluate": "cli.functions", "load_recipe": "config.parse", "plan": "cli.functions",
    "train": "cli.functions"}


def __getattr__(name: str) -> Any:
    """A public name, from its module, which is imported now: commands start without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'losses')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    """What a notebook completes after `amid_ds.`."""
    return __all__
