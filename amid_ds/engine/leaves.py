"""What ZeRO-3 gathers with a module beside its own weights: those that it reads of its descendants.

DeepSpeed gathers a module's own weights before its forward and before its backward. A weight that a
mixer reads of a child (models/weight_reads.py) is registered with the mixer too, and is then
gathered, prefetched and released with it, in forward, in the forward that activation checkpointing
repeats, and in backward. Nothing else of the mixer is. A leaf in DeepSpeed's sense, of which all is
gathered at once, would do so as well, but reduces its gradients by a hook on its inputs: before
there are any where no input is given by position, or none has a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from amid_ds.models.weight_reads import outside_reads


def register_outside_reads(models: Iterable[nn.Module]) -> None:
    """Register what modules of `models` read of their descendants with ZeRO-3's hooks."""
    import deepspeed
    from deepspeed.runtime.zero.utils import is_zero_param

    for model in models:
        for read in outside_reads(model):
            # A replicated teacher's are always there.
            for parameter in filter(is_zero_param, read.parameters.values()):
                deepspeed.zero.register_external_parameter(read.module, parameter)
            _call_by_position(read.module)


def _call_by_position(module: nn.Module) -> None:
    """Give hooks the first input of `module` by position, as they look at no other.

    DeepSpeed releases what a module has gathered for its backward once the gradients of its inputs
    are there: of an input by keyword it would be kept until the whole backward has ended.
    """
    first = next(iter(inspect.signature(module.forward).parameters))

    def move(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
             ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments or first not in keywords:
            return arguments, keywords
        return (keywords[first],), {key: each for key, each in keywords.items() if key != first}

    module.register_forward_pre_hook(move, prepend=True, with_kwargs=True)
