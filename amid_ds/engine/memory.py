"""Bytes that an engine holds on this rank, counted where DeepSpeed keeps them, and free bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psutil
import torch
from torch import Tensor

from amid_ds.distributed.world import World
from amid_ds.engine.optimizer import inner_optimizer
from amid_ds.engine.restore import MEAN_KINDS


def resident_bytes(deepspeed_engine: Any) -> dict[str, int]:
    """Bytes that stay from step to step: `student_weights`, `teacher_weights`, `optimizer`, and
    `means` of the student's weights, where there are some."""
    distiller = deepspeed_engine.module
    models = {"student": distiller.student, "teacher": distiller.teacher}
    parts = {
        f"{name}_weights": _unique_bytes(getattr(p, "ds_tensor", p) for p in model.parameters())
        for name, model in models.items() if model is not None}
    outer, inner = deepspeed_engine.optimizer, inner_optimizer(deepspeed_engine)
    # fp32 master weights under ZeRO-3, under ZeRO-1 and 2, and under bf16 without ZeRO.
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups",
             "fp32_groups_flat_partition")
    masters: list[Tensor] = next(
        (getattr(outer, name) for name in names if hasattr(outer, name)), [])
    moments = [value for state in inner.state.values()
               for name, value in state.items() if name not in ("step", *MEAN_KINDS)]
    means = [state[kind] for state in inner.state.values() for kind in MEAN_KINDS if kind in state]
    if means:
        parts["means"] = _unique_bytes(means)
    return {**parts, "optimizer": _unique_bytes([*masters, *moments])}


def gradient_bytes(deepspeed_engine: Any) -> int:
    """Bytes of the gradients that wait for the optimizer."""
    optimizer = deepspeed_engine.optimizer
    partitions = getattr(
        optimizer, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", None)
    if partitions is not None:
        return _unique_bytes(partitions.values())
    averaged = getattr(optimizer, "averaged_gradients", {})
    flat = [part for group in averaged.values() if group is not None for part in group]
    flat += list(getattr(optimizer, "fp32_groups_gradients_flat", []))
    own = [p.grad for p in deepspeed_engine.module.parameters() if p.grad is not None]
    return _unique_bytes([*flat, *own])


def gathered_now_bytes(parameters: Iterable[Any]) -> int:
    """Bytes of those parameters that are whole on this rank now, beside their partition."""
    return sum(p.data.nbytes for p in parameters
               if hasattr(p, "ds_tensor") and p.data_ptr() != p.ds_tensor.data_ptr())


def _unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors; storage that several of them share is counted once."""
    sizes = {(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors
             if tensor.device.type != "meta" and tensor.numel()}
    return sum(sizes.values())


def least_free_memory(world: World) -> int:
    """Bytes that every rank may still take, of its GPU's memory or its share of its host's.

    A GPU's also are those that torch holds and no tensor uses. Collective.
    """
    if world.device.type == "cuda":
        unused = (torch.cuda.memory_reserved(world.device)
                  - torch.cuda.memory_allocated(world.device))
        return world.least(torch.cuda.mem_get_info(world.device)[0] + unused)
    return world.least(psutil.virtual_memory().available // world.on_host)
