"""A checkpoint of one layout resumes in any other: ranks, tensor parallelism, ZeRO stage, precision.

One process puts the parameters and their moments together (shards.py) and keeps them inside the checkpoint, a file for
each parameter, so that they are there for the next start and go when the checkpoint goes. Then every rank maps those
files into memory and takes the pieces that its own layout asks for. The price is disk: 12 bytes for a parameter, once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from amid_ds.checkpoint.manifest import (
    describe_layout,
    layout_of,
    read_manifest,
    verify,
    write_manifest,
)
from amid_ds.checkpoint.saver import write_file
from amid_ds.checkpoint.zero_shards import STUDENT_PREFIX, TENSOR_KINDS, ZeroShards
from amid_ds.config.recipe import Student
from amid_ds.distributed.world import World
from amid_ds.engine.backend import import_deepspeed
from amid_ds.errors import TrainingError
from amid_ds.files import fsync, require_disk_space
from amid_ds.models.loading import meta_model

WHOLE = "whole"                  # the folder, inside the checkpoint
MOMENTS = TENSOR_KINDS[1:]


def ensure_consolidated(checkpoint: Path, layout: Mapping[str, Any], student: Student, world: World) -> Path | None:
    """The checkpoint's parameters as whole tensors, where `layout` is another one than it was saved in; else None.

    Collective. What an earlier start has made and is still as it was written is used again. Raises InputError where
    the disk has no room for it.
    """
    before = layout_of(checkpoint)
    if before == layout:
        return None
    folder = checkpoint / WHOLE
    if any(world.gather(verify(folder, world.rank, world.size))):
        if world.is_main:
            print(f"{checkpoint} was saved with {describe_layout(before)}, this run has {describe_layout(layout)}: "
                  "converting it once", flush=True)
        world.run_on_main(lambda: convert(checkpoint, student))
    return folder


def convert(checkpoint: Path, student: Student) -> None:
    """Write the whole tensors aside, then rename: the folder is there whole or not at all. Needs no engine."""
    import_deepspeed()      # the shards name classes of its
    shell = meta_model(student.model, **student.hub_kwargs)
    shapes = {name: parameter.shape for name, parameter in shell.named_parameters()}
    aside = checkpoint / f".{WHOLE}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    needed = sum(shape.numel() for shape in shapes.values()) * 4 * len(TENSOR_KINDS)
    require_disk_space(checkpoint, needed, f"converting {checkpoint} to this layout", "start in the layout of before")
    shards = ZeroShards(checkpoint, shapes)
    try:
        aside.mkdir()
        files = {}
        for name in tqdm(shapes, desc="converting", unit="tensor", disable=None):
            tensors = {kind: shards.whole(name, kind) for kind in TENSOR_KINDS}
            files[f"{name}.pt"] = write_file(aside / f"{name}.pt", tensors)
        write_manifest(aside, {"state": read_manifest(checkpoint)["state"], "files": files})
        shutil.rmtree(checkpoint / WHOLE, ignore_errors=True)      # one that is damaged
        os.replace(aside, checkpoint / WHOLE)
        fsync(checkpoint)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise TrainingError(f"{checkpoint} could not be converted to this layout: {error}") from None


def load_consolidated(engine: Any, whole: Path, world: World) -> dict[str, Any]:
    """Bring weights and optimizer back from whole tensors. Collective. Returns the saved state."""
    state: dict[str, Any] = read_manifest(whole)["state"]
    own: dict[str, Any] = {name.removeprefix(STUDENT_PREFIX): parameter for name, parameter in
                           engine.module.named_parameters() if parameter.requires_grad}
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in own.items()}
    first = world.rank - world.tp_rank
    peers = world.gather(shapes)[first:first + world.tp_size]
    masters = _masters(engine, list(own.values()), state["step"])
    for name, parameter in own.items():
        tensors = torch.load(whole / f"{name}.pt", mmap=True)
        part = _slices([peer[name] for peer in peers], world.tp_rank, tensors[TENSOR_KINDS[0]].shape)
        _place(engine, parameter, masters.get(parameter), {kind: tensors[kind][part] for kind in TENSOR_KINDS})
    engine.global_steps = state["step"]
    return state


def _slices(shapes: list[tuple[int, ...]], rank: int, whole: torch.Size) -> tuple[slice, ...]:
    """Where the part of tensor-parallel rank `rank` lies in the whole, by the shapes of all ranks' parts in order."""
    starts = [sum(shape[dim] for shape in shapes[:rank]) if shapes[rank][dim] != length else 0
              for dim, length in enumerate(whole)]
    return tuple(slice(start, start + length) for start, length in zip(starts, shapes[rank], strict=True))


def _masters(engine: Any, parameters: list[Any], step: int) -> dict[Any, torch.Tensor]:
    """Give the fresh optimizer a state to be filled. Returns, where nothing is partitioned, each parameter's fp32 twin.

    ZeRO's optimizers step over flat rows of this rank's pieces, which DeepSpeed's setters know their way about.
    """
    optimizer = engine.optimizer
    adam = getattr(optimizer, "optimizer", optimizer)
    stage = engine.zero_optimization_stage()
    twins: dict[Any, torch.Tensor] = {}
    if stage == 3:
        rows = optimizer.fp32_partitioned_groups_flat
    elif stage:
        rows = optimizer.single_partition_of_fp32_groups
    else:
        rows = [row for group in getattr(optimizer, "fp32_groups", [parameters]) for row in group]
        twins = dict(zip(parameters, rows, strict=True))
    for row in rows:
        adam.state[row] = {"step": torch.tensor(float(step)), **{kind: torch.zeros_like(row) for kind in MOMENTS}}
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()      # tells its setters of these moments
    return twins


@torch.no_grad()
def _place(engine: Any, parameter: Any, master: torch.Tensor | None, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put this rank's piece of `tensors`, its tensor-parallel part, into the weights, their fp32 twins and moments."""
    from deepspeed import comm, utils

    weights = tensors[TENSOR_KINDS[0]]
    if hasattr(parameter, "ds_tensor"):      # stage 3: equal pieces, the last one padded
        size = parameter.ds_tensor.numel()
        start = size * comm.get_rank(group=parameter.ds_process_group)
        pieces = {}
        for kind, tensor in tensors.items():
            piece = tensor.flatten()[start:start + size]
            pieces[kind] = torch.nn.functional.pad(piece, (0, size - piece.numel()))
        utils.safe_set_local_fp32_param(parameter, pieces[TENSOR_KINDS[0]])
        for kind in MOMENTS:
            utils.safe_set_local_optimizer_state(parameter, pieces[kind], kind)
        parameter.ds_tensor.data.copy_(pieces[TENSOR_KINDS[0]])
        return
    parameter.data.copy_(weights)
    if master is None:
        utils.safe_set_full_fp32_param(parameter, weights)
        for kind in MOMENTS:
            utils.safe_set_full_optimizer_state(parameter, tensors[kind], kind)
    else:
        master.data.copy_(weights)
        adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
        for kind in MOMENTS:
            adam.state[master][kind].copy_(tensors[kind])
