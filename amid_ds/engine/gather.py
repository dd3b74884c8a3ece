"""ZeRO-3's gathers: counted, in one order on every rank, held while a head or a model is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from amid_ds.distributed.nodes import neighbour_group
from amid_ds.models.heads import head_of


@dataclass
class GatheredBytes:
    """Bytes of weights that ZeRO-3 has put together on this rank since the engine was built."""

    student: int = 0
    teacher: int = 0

    def add(self, parameters: Iterable[Any]) -> None:
        """Count one gather of `parameters`; the teacher's are those without a gradient."""
        for parameter in parameters:
            size = parameter.ds_numel * parameter.element_size()
            if parameter.requires_grad:
                self.student += size
            else:
                self.teacher += size


def count_and_order_gathers(model: nn.Module) -> GatheredBytes:
    """Wrap the gathers of all ZeRO-3 parameters of `model`; returns the bytes they will count."""
    gathered_bytes = GatheredBytes()
    for parameter in model.parameters():
        zero_parameter: Any = parameter
        zero_parameter.all_gather_coalesced = partial(
            _gather_in_order, zero_parameter.all_gather_coalesced, gathered_bytes)
        zero_parameter.all_gather = partial(
            _gather_and_wait, zero_parameter.all_gather, gathered_bytes, zero_parameter)
    return gathered_bytes


def _gather_in_order(gather: Callable[..., Any], gathered_bytes: GatheredBytes,
                     parameters: Iterable[Any], **options: Any) -> Any:
    """DeepSpeed's gather of several parameters, its groups of ranks in one order on every rank.

    Parameters lie over several groups: all ranks, those with the same part of what tensor
    parallelism splits, the teacher's own. DeepSpeed takes them in the order of a Python set, that
    is of addresses, and NCCL may wait for ever where ranks differ in it.
    """
    ordered = sorted(parameters, key=lambda parameter: parameter.ds_id)
    gathered_bytes.add(ordered)
    return gather(ordered, **options)


def _gather_and_wait(gather: Callable[..., Any], gathered_bytes: GatheredBytes, own: Any,
                     param_list: list[Any] | None = None, **options: Any) -> Any:
    """DeepSpeed's blocking gather of `param_list`, or of the parameter whose method this is."""
    gathered_bytes.add([own] if param_list is None else param_list)
    return gather(param_list, **options)


@contextlib.contextmanager
def secondary_groups_of_neighbours(rank: int) -> Iterator[None]:
    """A context in which DeepSpeed makes the groups of ZeRO++'s secondary partitions in one act.

    By itself it makes them one after the other, each by all ranks, and only once in a process. With
    such a partition (hpZ) the first gather of a step puts a weight together from all ranks, each
    later one from the neighbours of a group, which keep a copy of it until the optimizer's step.
    """
    from deepspeed.utils import groups

    create = groups._create_zero_param_parallel_group

    def create_own(size: int) -> None:
        first = rank // size * size
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = neighbour_group(range(first, first + size))

    groups._create_zero_param_parallel_group = create_own
    try:
        yield
    finally:
        groups._create_zero_param_parallel_group = create


@contextlib.contextmanager
def gathered_head(model: nn.Module | None) -> Iterator[None]:
    """A context in which every rank can read the head of `model`, gathered once. Collective."""
    import deepspeed

    head = head_of(model) if model is not None else None
    parameters = [p for p in (head.weight, head.bias) if p is not None] if head is not None else []
    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextlib.contextmanager
def gathered_model(deepspeed_engine: Any, model: nn.Module) -> Iterator[None]:
    """A context in which every rank holds all the weights of `model`, gathered once. Collective.

    ZeRO-3's hooks, which would gather and release them module by module, do nothing meanwhile, so
    its prefetch trace of a training step stays as it is.
    """
    import deepspeed

    coordinator = param_coordinator(deepspeed_engine)
    hooks = ("trace_prologue", "record_module", "fetch_sub_module", "release_sub_module")
    with deepspeed.zero.GatheredParameters(partitioned_parameters(model)):
        # Attributes of the instance hide the class's methods.
        vars(coordinator).update({name: _do_nothing for name in hooks})
        try:
            yield
        finally:
            for name in hooks:
                delattr(coordinator, name)


def _do_nothing(*_: Any, **__: Any) -> None:
    """The hook of a coordinator whose weights are all gathered."""


def param_coordinator(deepspeed_engine: Any) -> Any:
    """The object that ZeRO-3's hooks ask for weights."""
    optimizer = deepspeed_engine.optimizer
    # Without an optimizer the offload alone has it.
    return getattr(optimizer, "parameter_offload", optimizer).get_param_coordinator()


def partitioned_parameters(model: nn.Module) -> list[Any]:
    """The parameters of which this rank holds a part now; ZeRO-3 keeps small ones whole."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return [p for p in model.parameters()
            if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]


def full_numel(parameter: Any) -> int:
    """Elements of the whole parameter, however much of it this rank holds now."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
