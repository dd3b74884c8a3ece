"""Whole tensors out of DeepSpeed's shards of any layout: the fp32 weights and Adam's two moments, by name.

A rank's file holds flat rows of numbers. Which run of a row is which piece of which parameter follows from the shapes
or addresses that DeepSpeed saves beside them, so a parameter is put together from a few slices of every file, mapped
into memory: whoever reads it needs memory for that parameter alone.

DeepSpeed has a conversion of its own (`ds_to_universal`), which gives the same tensors, bit for bit, where it works. It
takes all that ZeRO-3 holds to be partitioned over the data-parallel ranks. Under tensor parallelism that is true of
what AutoTP and the heads' cut have split; the embeddings and norms that a group holds whole were partitioned over all
ranks as they were loaded, and there the conversion reads past its pieces and fails. So this way serves every layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amid_ds.checkpoint.manifest import read_manifest
from amid_ds.errors import TrainingError

TENSOR_KINDS = ("fp32", "exp_avg", "exp_avg_sq")      # what is known of each parameter, as DeepSpeed names it
STUDENT_PREFIX = "student."                           # the engine's module holds the teacher beside it

Piece = dict[str, torch.Tensor]                # by kind: a run of the flattened parameter


@dataclass(frozen=True)
class Part:
    """What one tensor-parallel rank held of a parameter: its pieces in order, the last one possibly padded."""

    shape: torch.Size
    pieces: list[Piece]

    def joined(self, kind: str) -> torch.Tensor:
        return torch.cat([piece[kind] for piece in self.pieces])[:self.shape.numel()].view(self.shape)


class ZeroShards:
    """The files of one checkpoint, mapped into memory.

    shapes: those of the whole parameters, by name, in the model's own order. What is smaller in a tensor-parallel
    rank's shard was split there. Raises TrainingError where the checkpoint does not hold exactly these parameters.
    """

    def __init__(self, checkpoint: Path, shapes: Mapping[str, torch.Size]) -> None:
        state = read_manifest(checkpoint)["state"]
        tp_size = state["tensor_parallel"]
        read = {0: _stage_0, 1: _stages_1_and_2, 2: _stages_1_and_2, 3: _stage_3}[state["zero_stage"]]
        parts = read(checkpoint, shapes, state["ranks"] // tp_size, tp_size)
        if parts.keys() != shapes.keys():
            raise TrainingError(f"{checkpoint} does not hold the parameters of this model: "
                                f"missing {sorted(shapes.keys() - parts.keys())}, "
                                f"unexpected {sorted(parts.keys() - shapes.keys())}")
        self.checkpoint, self.shapes, self.parts = checkpoint, shapes, parts

    def whole(self, name: str, kind: str = "fp32") -> torch.Tensor:
        """A parameter's fp32 weights, or one of its moments, in its whole shape: a copy in memory."""
        parts, shape = self.parts[name], self.shapes[name]
        tensors = [part.joined(kind) for part in parts]
        split = [dim for dim, (own, all_) in enumerate(zip(parts[0].shape, shape, strict=True)) if own != all_]
        return torch.cat(tensors, dim=split[0]) if split else tensors[0]


    def buffer(self, name: str) -> torch.Tensor:
        """What the model keeps beside its parameters; every rank has it whole."""
        file = next(self.checkpoint.glob("*mp_rank_00_model_states.pt"))
        tensor: torch.Tensor = _read(file)["module"][STUDENT_PREFIX + name]
        return tensor


def _stage_3(checkpoint: Path, shapes: Mapping[str, torch.Size], dp_size: int, tp_size: int) -> dict[str, list[Part]]:
    """Every parameter is padded and cut into equal pieces, a group of parameters to a flat row."""
    found: dict[str, list[Part]] = {}
    for tp in range(tp_size):
        held = _read(checkpoint / f"zero_pp_rank_0_mp_rank_{tp:02d}_model_states.pt")["param_shapes"]
        files = [_optimizer_state(checkpoint, dp, tp) for dp in range(dp_size)]
        for group, named_shapes in enumerate(held):
            rows = [{"fp32": file["fp32_flat_groups"][group], **file["optimizer_state_dict"]["state"][group]}
                    for file in files]
            start = 0
            for full_name, shape in named_shapes.items():
                name = full_name.removeprefix(STUDENT_PREFIX)
                ranks = dp_size * tp_size if shape == shapes.get(name) else dp_size
                size = -(-shape.numel() // ranks)
                found.setdefault(name, []).append(Part(shape, [_cut(row, start, size) for row in rows]))
                start += size
    for name, parts in found.items():
        if parts[0].shape == shapes.get(name):      # over all ranks, of which tensor-parallel peers are neighbours
            found[name] = [Part(parts[0].shape, [part.pieces[dp] for dp in range(dp_size) for part in parts])]
    return found


def _stages_1_and_2(checkpoint: Path, shapes: Mapping[str, torch.Size], dp_size: int,
                    tp_size: int) -> dict[str, list[Part]]:
    """The parameters one after the other in one row, cut anywhere: each rank says which pieces it has."""
    found: dict[str, list[Part]] = {}
    for tp in range(tp_size):
        held = _read(checkpoint / f"mp_rank_{tp:02d}_model_states.pt")["param_shapes"]
        local = {name: Part(shape, []) for group in held for name, shape in group.items()}
        for dp in range(dp_size):
            file = _optimizer_state(checkpoint, dp, tp)
            for group, addresses in enumerate(file["param_slice_mappings"]):
                if not addresses:
                    continue
                row = {"fp32": file["single_partition_of_fp32_groups"][group],
                       **file["base_optimizer_state"]["state"][group]}
                for name, address in addresses.items():
                    local[name].pieces.append(_cut(row, address.start, address.numel))
        _add(found, local)
    return _once(found, shapes)


def _stage_0(checkpoint: Path, shapes: Mapping[str, torch.Size], dp_size: int, tp_size: int) -> dict[str, list[Part]]:
    """Nothing is partitioned. In bf16 the fp32 weights are the optimizer's, in fp32 they are the model's."""
    found: dict[str, list[Part]] = {}
    for tp in range(tp_size):
        file = _read(checkpoint / f"mp_rank_{tp:02d}_model_states.pt")
        optimizer = file["optimizer"]
        moments = optimizer.get("optimizer_state_dict", optimizer)["state"]
        names = [f"{STUDENT_PREFIX}{name}" for name in shapes]
        masters = [master for group in optimizer["fp32_groups"] for master in group] if "fp32_groups" in optimizer \
            else [file["module"][name] for name in names]
        _add(found, {name: Part(master.shape, [{kind: tensor.flatten() for kind, tensor in
                                                {"fp32": master, **moments[index]}.items() if kind in TENSOR_KINDS}])
                     for index, (name, master) in enumerate(zip(names, masters, strict=True))})
    return _once(found, shapes)


def _add(found: dict[str, list[Part]], local: dict[str, Part]) -> None:
    for name, part in local.items():
        found.setdefault(name.removeprefix(STUDENT_PREFIX), []).append(part)


def _once(found: dict[str, list[Part]], shapes: Mapping[str, torch.Size]) -> dict[str, list[Part]]:
    """Of what every tensor-parallel rank holds whole, the first one's."""
    return {name: parts[:1] if parts[0].shape == shapes.get(name) else parts for name, parts in found.items()}


def _cut(row: Mapping[str, torch.Tensor], start: int, size: int) -> Piece:
    return {kind: row[kind].narrow(0, start, size) for kind in TENSOR_KINDS}


def _optimizer_state(checkpoint: Path, dp: int, tp: int) -> dict[str, Any]:
    """Of the data-parallel rank `dp` of the tensor-parallel rank `tp`; in bf16 DeepSpeed names the file otherwise."""
    file, = checkpoint.glob(f"*zero_pp_rank_{dp}_mp_rank_{tp:02d}_optim_states.pt")
    state: dict[str, Any] = _read(file)["optimizer_state_dict"]
    return state


def _read(file: Path) -> dict[str, Any]:
    """One of DeepSpeed's files, mapped into memory. They are ours: pickles that run code when they are read."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    return content
