"""Whole tensors into the engine's partitions: weights, their fp32 masters and Adam's moments.

This is how a checkpoint of one layout resumes in another. Every rank reads whole tensors and keeps
the part that its own layout (ZeRO stage, data-parallel and tensor-parallel rank) asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from amid_ds.distributed.world import World

# The module of an engine names its parameters student.… and teacher.…
STUDENT_PREFIX = "student."
# DeepSpeed's names for the fp32 weights and Adam's two moments of a parameter.
WEIGHT_KIND, MOMENT_KINDS = "fp32", ("exp_avg", "exp_avg_sq")
TENSOR_KINDS = (WEIGHT_KIND, *MOMENT_KINDS)


def load_tensors(deepspeed_engine: Any, read: Callable[[str], Mapping[str, Tensor]], step: int,
                 world: World) -> None:
    """Fill weights and optimizer from whole tensors, as of optimizer step `step`. Collective.

    read(name): the parameter's whole tensors by TENSOR_KINDS; `name` is that of the student's
    model.
    """
    trained: dict[str, Any] = {name.removeprefix(STUDENT_PREFIX): parameter for name, parameter
                               in deepspeed_engine.module.named_parameters()
                               if parameter.requires_grad}
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape))
              for name, parameter in trained.items()}
    first = world.rank - world.tp_rank
    peers = world.gather(shapes)[first:first + world.tp_size]
    masters = _fill_optimizer_state(deepspeed_engine, list(trained.values()), step)
    for name, parameter in trained.items():
        tensors = read(name)
        part = _tensor_parallel_part([peer[name] for peer in peers], world.tp_rank,
                                     tensors[WEIGHT_KIND].shape)
        own = {kind: tensors[kind][part] for kind in TENSOR_KINDS}
        if hasattr(parameter, "ds_tensor"):
            _set_zero3_partition(parameter, own)
        else:
            _set_unpartitioned(deepspeed_engine, parameter, masters.get(parameter), own)
    deepspeed_engine.global_steps = step


def _tensor_parallel_part(shapes: list[tuple[int, ...]], rank: int,
                          whole: torch.Size) -> tuple[slice, ...]:
    """The slices of the whole tensor that tensor-parallel rank `rank` holds.

    shapes: those of all ranks' parts, in order.
    """
    starts = [sum(shape[dim] for shape in shapes[:rank]) if shapes[rank][dim] != length else 0
              for dim, length in enumerate(whole)]
    return tuple(slice(start, start + length)
                 for start, length in zip(starts, shapes[rank], strict=True))


def _fill_optimizer_state(deepspeed_engine: Any, parameters: list[Any],
                          step: int) -> dict[Any, Tensor]:
    """Give the fresh optimizer a state of zeros; returns the parameters' fp32 masters at stage 0.

    ZeRO's optimizers step over flat rows of this rank's pieces, which DeepSpeed's setters address.
    """
    optimizer = deepspeed_engine.optimizer
    adam = getattr(optimizer, "optimizer", optimizer)
    stage = deepspeed_engine.zero_optimization_stage()
    masters: dict[Any, Tensor] = {}
    if stage == 3:
        rows = optimizer.fp32_partitioned_groups_flat
    elif stage:
        rows = optimizer.single_partition_of_fp32_groups
    else:
        rows = [row for group in getattr(optimizer, "fp32_groups", [parameters]) for row in group]
        masters = dict(zip(parameters, rows, strict=True))
    for row in rows:
        adam.state[row] = {"step": torch.tensor(float(step)),
                           **{kind: torch.zeros_like(row) for kind in MOMENT_KINDS}}
    if stage in (1, 2):
        # DeepSpeed's setters know of these moments only after this.
        optimizer._lazy_init_hp_params_optimizer_state()
    return masters


@torch.no_grad()
def _set_zero3_partition(parameter: Any, tensors: Mapping[str, Tensor]) -> None:
    """Set this rank's piece: ZeRO-3 cuts a parameter into equal pieces, the last one padded."""
    from deepspeed import comm, utils

    size = parameter.ds_tensor.numel()
    start = size * comm.get_rank(group=parameter.ds_process_group)
    pieces = {}
    for kind, tensor in tensors.items():
        piece = tensor.flatten()[start:start + size]
        pieces[kind] = torch.nn.functional.pad(piece, (0, size - piece.numel()))
    utils.safe_set_local_fp32_param(parameter, pieces[WEIGHT_KIND])
    for kind in MOMENT_KINDS:
        utils.safe_set_local_optimizer_state(parameter, pieces[kind], kind)
    parameter.ds_tensor.data.copy_(pieces[WEIGHT_KIND])


@torch.no_grad()
def _set_unpartitioned(deepspeed_engine: Any, parameter: Any, master: Tensor | None,
                       tensors: Mapping[str, Tensor]) -> None:
    """Set a parameter that every rank holds whole (below stage 3), its master and its moments."""
    from deepspeed import utils

    parameter.data.copy_(tensors[WEIGHT_KIND])
    if master is None:
        utils.safe_set_full_fp32_param(parameter, tensors[WEIGHT_KIND])
        for kind in MOMENT_KINDS:
            utils.safe_set_full_optimizer_state(parameter, tensors[kind], kind)
        return
    master.data.copy_(tensors[WEIGHT_KIND])
    adam = getattr(deepspeed_engine.optimizer, "optimizer", deepspeed_engine.optimizer)
    for kind in MOMENT_KINDS:
        adam.state[master][kind].copy_(tensors[kind])
