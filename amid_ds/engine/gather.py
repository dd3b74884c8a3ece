"""ZeRO-3's gathers: counted, ordered alike on every rank, and held while a head or a model is
read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from amid_ds.engine.backend import (
    import_deepspeed,
)
from amid_ds.models.heads import head_of


@dataclass
class GatheredBytes:
    """Bytes of weights that ZeRO-3 has put together on this rank since the engine was built."""

    student: int = 0
    teacher: int = 0

    def add(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            size = parameter.ds_numel * parameter.element_size()
            if parameter.requires_grad:
                self.student += size
            else:
                self.teacher += size


def param_coordinator(engine: Any) -> Any:
    """What ZeRO-3's hooks ask; without an optimizer there is the offload alone."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer).get_param_coordinator()


def gather_in_order(gather: Callable[..., Any], gathered: GatheredBytes, parameters: Iterable[Any], **options: Any) -> Any:
    """DeepSpeed's gather of several parameters, counted, and its groups of ranks in the same order on every rank.

    Under tensor parallelism parameters lie over two groups (all ranks, the data-parallel ones). DeepSpeed takes the
    groups in the order of a Python set, that is of addresses, and NCCL may wait for ever where ranks differ in it.
    """
    ordered = sorted(parameters, key=lambda parameter: parameter.ds_id)
    gathered.add(ordered)
    return gather(ordered, **options)


def gather_one(gather: Callable[..., Any], gathered: GatheredBytes, own: Any, param_list: list[Any] | None = None,
                  **options: Any) -> Any:
    """DeepSpeed's gather that waits, of `param_list` or of the parameter that it belongs to, counted."""
    gathered.add([own] if param_list is None else param_list)
    return gather(param_list, **options)


@contextlib.contextmanager
def gathered_head(model: nn.Module | None) -> Iterator[None]:
    """Within it the whole head of `model` can be read on every rank, gathered once however often it is read."""
    deepspeed = import_deepspeed()
    head = head_of(model) if model is not None else None
    parameters = [p for p in (head.weight, head.bias) if p is not None] if head is not None else []
    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextlib.contextmanager
def gathered(engine: Any, model: nn.Module) -> Iterator[None]:
    """Within it every rank holds all the weights of `model` that tensor parallelism leaves it, gathered once.

    ZeRO-3's hooks, which would gather and release them module by module, do nothing meanwhile, and so its trace of a
    training step stays as it is. Collective.
    """
    if not engine.zero_optimization_partition_weights():
        yield
        return
    deepspeed = import_deepspeed()
    coordinator = param_coordinator(engine)
    work = ("trace_prologue", "record_module", "fetch_sub_module", "release_sub_module")      # what the hooks ask for
    with deepspeed.zero.GatheredParameters(partitioned(model)):
        vars(coordinator).update({name: _nothing for name in work})      # before the class's own
        try:
            yield
        finally:
            for name in work:
                delattr(coordinator, name)


def _nothing(*_: Any, **__: Any) -> None:
    """What a hook asks for while all is there."""


def partitioned(model: nn.Module) -> list[Any]:
    """The parameters of which a rank holds a part now: not those that ZeRO-3 leaves whole because they are small."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return [p for p in model.parameters() if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
