"""What ZeRO-3 gathers with a module beside its own weights.

DeepSpeed gathers a module's own weights before its forward and before its backward. Two kinds of
module need more:

A mixer that reads weights of its children (models/weight_reads.py). They are registered with the
mixer too, and are then gathered, prefetched and released with it: in forward, in the forward that
activation checkpointing repeats, and in backward. Nothing else of the mixer is.

A block that calls modules of a list as the data choose. It is a leaf in DeepSpeed's sense: all of
it is gathered at once, its parts have no hooks, and a part that nothing chose has a gradient of
zeros, so that every rank does the same. Experts that are stacked in one module need none of it.

DeepSpeed reduces a leaf's gradients in a hook on its inputs' gradients, which runs before there are
any where no input is given by position, or none has a gradient. So no module is a leaf that need
not be (DeepSpeed's own list of mixtures is left out), and one that is gets its input so.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amid_ds.engine.ds_config import DeepSpeedConfig
from amid_ds.engine.gather import full_numel, full_shape
from amid_ds.models.delta import DeltaTeacher
from amid_ds.models.experts import expert_layers
from amid_ds.models.weight_reads import expert_blocks, outside_reads

logger = logging.getLogger(__name__)


def without_listed_leaves(config: DeepSpeedConfig) -> DeepSpeedConfig:
    """The config without DeepSpeed's list of classes that are leaves."""
    zero = config.get("zero_optimization", {})
    return {**config, "zero_optimization": {**zero, "leaf_module": {"classes": []}}}


def mark_leaves(models: Iterable[nn.Module]) -> None:
    """Make leaves of the blocks of `models` that choose among modules. Before the engine is made.
    """
    from deepspeed.utils import set_z3_leaf_module

    for model in models:
        for name in expert_blocks(model, full_shape):
            block = model.get_submodule(name)
            set_z3_leaf_module(block, True)
            _call_by_position(block, with_gradient=True)


def register_outside_reads(models: Iterable[nn.Module]) -> None:
    """Register what modules of `models` read of their descendants with ZeRO-3's hooks."""
    import deepspeed
    from deepspeed.runtime.zero.utils import is_zero_param

    for model in models:
        for read in outside_reads(model):
            for parameter in filter(is_zero_param, read.parameters.values()):
                deepspeed.zero.register_external_parameter(read.module, parameter)
            _call_by_position(read.module)


@contextlib.contextmanager
def reads_registered(module: nn.Module) -> Iterator[None]:
    """A context in which a weight that a forward reads and that is not there is gathered, and
    registered with the module that read it: what no source has shown.

    DeepSpeed does so in its own `forward`, the first of which records the order of prefetches. All
    ranks must run the same forwards. module: the engine's, at ZeRO stage 3. Embeddings and heads
    are left out: the checks ask for them by name, and the engine would gather them all the time.
    """
    # A delta's list is one of whole models, and no stack of layers.
    deltas = [each.parts for each in module.modules() if isinstance(each, DeltaTeacher)]
    owned: list[Any] = [each._parameters for stack in module.modules()
                        if isinstance(stack, nn.ModuleList)
                        and not any(stack is each for each in deltas)
                        for each in stack.modules()]
    for parameters in owned:
        parameters._in_forward = True
    try:
        yield
    finally:
        for parameters in owned:
            parameters._in_forward = False


def _call_by_position(module: nn.Module, with_gradient: bool = False) -> None:
    """Give hooks the first input of `module` by position, as they look at no other.

    DeepSpeed releases what a module has gathered for its backward once the gradients of its inputs
    are there: of an input by keyword it would be kept until the whole backward has ended.
    with_gradient: it has one always, which is dropped where nothing before the module trains.
    """
    first = next(iter(inspect.signature(module.forward).parameters))

    def move(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
             ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not arguments and first in keywords:
            keywords = dict(keywords)
            arguments = (keywords.pop(first),)
        if (with_gradient and torch.is_grad_enabled() and arguments
                and isinstance(arguments[0], Tensor) and not arguments[0].requires_grad):
            arguments = (arguments[0].detach().requires_grad_(), *arguments[1:])
        return arguments, keywords

    module.register_forward_pre_hook(move, prepend=True, with_kwargs=True)


def warn_of_large_layers(models: Sequence[nn.Module], config: DeepSpeedConfig) -> None:
    """Say which layer of experts exceeds `stage3_max_live_parameters`, and what that does.

    DeepSpeed gathers what a module needs whatever that number says: it only prefetches nothing
    while more than that is gathered.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    default = DeepSpeedZeroConfig.model_fields["max_live_parameters"].default
    zero = config.get("zero_optimization", {})
    allowed = int(zero.get("stage3_max_live_parameters", default))
    for model in models:
        names = [layer.name for layer in expert_layers(model, full_shape)]
        names = names or expert_blocks(model, full_shape)
        sizes = {name: sum(map(full_numel, model.get_submodule(name).parameters()))
                 for name in names}
        largest = max(sizes, key=sizes.__getitem__, default="")
        if sizes.get(largest, 0) > allowed:
            logger.warning(
                "%s of %s has %s parameters, which ZeRO-3 gathers at once, more than "
                "zero_optimization.stage3_max_live_parameters (%s): they take that memory all the "
                "same, and no further weights are prefetched meanwhile; set it to %s or more, or "
                "split the experts over ranks (expert_parallel)", largest,
                model.config.name_or_path,   # type: ignore[union-attr]
                f"{sizes[largest]:,}", f"{allowed:,}", f"{2 * sizes[largest]:,}")
