"""ZeRO-3's gathers: counted, in one order on every rank, held while a head or a model is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from amid_ds.models.delta import parts_of
from amid_ds.models.distiller import Distiller
from amid_ds.models.heads import head_parameters


@dataclass
class GatheredBytes:
    """Bytes of weights that ZeRO-3 has put together on this rank since the engine was built.

    teacher_received: those of the teacher's that came from other ranks. of_student: the `ds_id` of
    its parameters, frozen ones too; all others are the teacher's.
    """

    student: int = 0
    teacher: int = 0
    teacher_received: float = 0.0
    of_student: Collection[int] = ()

    def add(self, parameters: Iterable[Any]) -> None:
        """Count one gather of `parameters`; of those that lie on this rank alone nothing is."""
        for parameter in parameters:
            size, ranks = parameter.ds_numel * parameter.element_size(), _ranks_of(parameter)
            if ranks == 1 and hasattr(parameter, "expert_rows"):
                continue
            if parameter.ds_id in self.of_student:
                self.student += size
            else:
                self.teacher += size
                self.teacher_received += size * (1 - 1 / ranks)


def _ranks_of(parameter: Any) -> int:
    """The ranks over which ZeRO-3 lays a parameter."""
    return int(parameter.ds_process_group.size())


def count_and_order_gathers(distiller: Distiller, exact: Iterable[nn.Parameter]) -> GatheredBytes:
    """Wrap the gathers of all ZeRO-3 parameters; returns the bytes they will count.

    exact: parameters of the student that never travel in 8 bits.
    """
    students: dict[int, Any] = {id(each): each for each in distiller.student.parameters()}
    gathered_bytes = GatheredBytes(of_student={each.ds_id for each in students.values()})
    gathers = _Gathers({}, students.keys() - {id(each) for each in exact})
    for parameter in distiller.parameters():
        zero_parameter: Any = parameter
        gathers.own[zero_parameter.ds_id] = zero_parameter.all_gather_coalesced
        zero_parameter.all_gather_coalesced = partial(_gather_in_order, gathers, gathered_bytes)
        zero_parameter.all_gather = partial(
            _gather_and_wait, zero_parameter.all_gather, gathered_bytes, zero_parameter)
    return gathered_bytes


class _Gathers(NamedTuple):
    """DeepSpeed's own method of each parameter, by its number; those that may travel in 8 bits, by
    id()."""

    own: dict[int, Callable[..., Any]]
    rounded: set[int]


def _gather_in_order(gathers: _Gathers, gathered_bytes: GatheredBytes, parameters: Iterable[Any],
                     quantize: bool = False, **options: Any) -> Any:
    """DeepSpeed's gather of several parameters, its groups of ranks in one order on every rank.

    Parameters lie over several groups: all ranks, those with the same part of what tensor
    parallelism splits, the teacher's own. DeepSpeed takes them in the order of a Python set, that
    is of addresses, and NCCL may wait for ever where ranks differ in it.
    """
    from deepspeed.runtime.zero.partition_parameters import MultipleAllGatherHandles

    ordered = sorted(parameters, key=lambda parameter: parameter.ds_id)
    gathered_bytes.add(ordered)
    rounded = [p for p in ordered if quantize and _may_be_quantized(p, gathers.rounded)]
    whole = [p for p in ordered if not quantize or not _may_be_quantized(p, gathers.rounded)]
    handles = [gathers.own[part[0].ds_id](part, quantize=part is rounded, **options)
               for part in (whole, rounded) if part]
    return handles[0] if len(handles) == 1 else MultipleAllGatherHandles(handles)


def _may_be_quantized(parameter: Any, students: set[int]) -> bool:
    """True where DeepSpeed's kernels take a rank's piece, and 8 bits of it do little harm.

    The teacher's weights are its own, a head's set the loss, norms and biases are small. The
    kernels take eight elements at once, and a padded piece would be scaled by its neighbour.
    """
    return (id(parameter) in students and len(parameter.ds_shape) > 1
            and parameter.ds_numel == parameter.ds_numel_aligned
            and parameter.ds_tensor.numel() % 8 == 0)


def _gather_and_wait(gather: Callable[..., Any], gathered_bytes: GatheredBytes, own: Any,
                     param_list: list[Any] | None = None, **options: Any) -> Any:
    """DeepSpeed's blocking gather of `param_list`, or of the parameter whose method this is."""
    gathered_bytes.add([own] if param_list is None else param_list)
    return gather(param_list, **options)


@contextlib.contextmanager
def gathered_head(model: nn.Module | None) -> Iterator[None]:
    """A context in which every rank can read the head of `model`, gathered once. Collective.

    model: of a delta all its heads.
    """
    import deepspeed

    parameters = [each for part in parts_of(model) for each in head_parameters(part)]
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


def release_whole(model: nn.Module) -> None:
    """Let go of what ZeRO-3 holds whole of `model`, after its partitions were written anew."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    whole: list[Any] = [p for p in model.parameters()
                        if getattr(p, "ds_status", None) == ZeroParamStatus.AVAILABLE]
    if whole:
        whole[0].partition(whole)


def models_in_engine(distiller: Distiller) -> list[nn.Module]:
    """The models that the engine holds: the student, and the teacher's.

    A replicated teacher is no submodule, and stays whole on every rank by request.
    """
    teacher = distiller.teacher if "teacher" in distiller._modules else None
    return [distiller.student, *parts_of(teacher)]


def full_numel(parameter: Any) -> int:
    """Elements of the whole parameter, however much of it this rank holds now."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The whole parameter's shape, however much of it this rank holds now."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
