"""Whole tensors, by name, out of DeepSpeed's shards of any layout: fp32 weights and moments.

A rank's file holds flat rows of numbers. The run of a row that is a piece of a parameter follows
from the shapes or addresses that DeepSpeed saves with it, so a parameter is put together from a few
slices of every file, mapped into memory: whoever reads it needs memory for that parameter alone.

DeepSpeed has a conversion of its own (`ds_to_universal`), which gives the same tensors, bit for
bit, where it works. It takes all that ZeRO-3 holds to be partitioned over the data-parallel ranks.
Under tensor parallelism that is true of what is split of bodies and heads; the embeddings and norms
that a group holds whole were partitioned over all ranks as they were loaded, and there the
conversion reads past its pieces and fails. So this module serves every layout. The names of
keys and files in it are DeepSpeed's file format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amid_ds.checkpoint.manifest import Manifest
from amid_ds.engine.restore import EXPORTED_MEAN, STUDENT_PREFIX, TENSOR_KINDS, WEIGHT_KIND
from amid_ds.engine.tensor_files import read_torch_file
from amid_ds.errors import TrainingError
from amid_ds.models.tensor_parallel import pieces_of
from amid_ds.models.tp_plan import PartCut, whole_of

# By kind: a run of the flattened parameter.
Piece = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """A tensor-parallel rank's part of a parameter: its pieces in order, the last maybe padded."""

    shape: torch.Size
    pieces: list[Piece]

    def tensor(self, kind: str) -> torch.Tensor:
        """The pieces of one kind put together, without the padding."""
        return torch.cat(
            [piece[kind] for piece in self.pieces])[:self.shape.numel()].view(self.shape)


def trained_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the parameters that a checkpoint of `model` holds: those that train."""
    return {name: parameter.shape for name, parameter in model.named_parameters()
            if parameter.requires_grad}


class ZeroShards:
    """The files of one checkpoint, mapped into memory.

    shapes: those of the whole parameters that train, by name, in the model's own order. A parameter
    that is smaller in a tensor-parallel rank's shard was split there. Raises TrainingError where
    the checkpoint does not hold exactly these parameters.
    """

    def __init__(self, checkpoint: Path, shapes: Mapping[str, torch.Size]) -> None:
        manifest = Manifest.read(checkpoint)
        layout, tp_size = manifest.layout, manifest.layout.tensor_parallel
        files = _Files(checkpoint, sorted(manifest.files))
        parts_of: dict[int, Callable[..., dict[str, list[Part]]]] = {
            0: _stage_0, 1: _stages_1_and_2, 2: _stages_1_and_2,
            3: partial(_stage_3, neighbours=layout.expert_parallel)}
        with _errors_named(checkpoint):
            parts = parts_of[layout.zero_stage](files, shapes, layout.ranks // tp_size, tp_size)
        if parts.keys() != shapes.keys():
            raise TrainingError(f"{checkpoint} does not hold the parameters of this model: "
                                f"missing {sorted(shapes.keys() - parts.keys())}, "
                                f"unexpected {sorted(parts.keys() - shapes.keys())}")
        self.files, self.shapes, self.parts, self.split = files, shapes, parts, layout.split

    def kinds(self, name: str) -> list[str]:
        """The tensors that there are of a parameter, of TENSOR_KINDS: they tell its optimizer."""
        with _errors_named(self.files.checkpoint):
            return list(self.parts[name][0].pieces[0])

    def whole(self, name: str, kind: str | None = None) -> torch.Tensor:
        """A parameter's fp32 weights, or one of its moments or means, whole: a copy in memory.

        kind: None: what an export has of it, the mean that the run keeps for that (`train.ema`),
        else the weights.
        """
        if kind is None:
            kind = EXPORTED_MEAN if EXPORTED_MEAN in self.kinds(name) else WEIGHT_KIND
        parts, shape = self.parts[name], self.shapes[name]
        with _errors_named(self.files.checkpoint):
            tensors = [part.tensor(kind) for part in parts]
            split = [dim for dim, (own, all_) in enumerate(zip(parts[0].shape, shape, strict=True))
                     if own != all_]
            cut = PartCut(split[0], pieces_of(name, self.split)) if split else None
            tensor = tensors[0] if cut is None else whole_of(tensors, cut)
            if tensor.shape != shape:
                raise ValueError(f"{name} is of shape {list(tensor.shape)}, in the model of "
                                 f"{list(shape)}")
            return tensor

    def buffer(self, name: str) -> torch.Tensor:
        """A buffer of the model; every rank has it whole."""
        with _errors_named(self.files.checkpoint):
            module = self.files.read("mp_rank_00_model_states.pt")["module"]
            tensor: torch.Tensor = module[STUDENT_PREFIX + name]
            return tensor


@contextlib.contextmanager
def _errors_named(checkpoint: Path) -> Iterator[None]:
    """A context in which what a changed or foreign file may lack (keys, ranks, lengths, types) is
    a TrainingError that names the checkpoint."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError,
            RuntimeError) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(
            f"{checkpoint} does not hold what its manifest says: {type(error).__name__}: {error}\n"
            "  it was not written by this program, or was changed since") from None


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint that its manifest lists, sorted; no other is opened."""

    checkpoint: Path
    names: list[str]

    def read(self, ending: str) -> Mapping[str, Any]:
        """The first file whose name ends so, mapped into memory.

        In bf16 DeepSpeed puts a prefix before the name of an optimizer's file.
        """
        name = next((name for name in self.names if name.endswith(ending)), None)
        if name is None:
            raise TrainingError(f"{self.checkpoint} has no file …{ending}")
        content: Mapping[str, Any] = read_torch_file(self.checkpoint / name, mmap=True)
        return content

    def optimizer_state(self, dp: int, tp: int) -> Mapping[str, Any]:
        """The optimizer's state on one rank."""
        name = f"zero_pp_rank_{dp}_mp_rank_{tp:02d}_optim_states.pt"
        state: Mapping[str, Any] = self.read(name)["optimizer_state_dict"]
        return state


def _stage_3(files: _Files, shapes: Mapping[str, torch.Size], dp_size: int,
             tp_size: int, neighbours: int) -> dict[str, list[Part]]:
    """Parts by parameter: each is padded and cut into equal pieces, a group to a flat row.

    neighbours: the ranks that hold the experts of a layer together, where their parts differ.
    """
    parts_by_name: dict[str, list[Part]] = {}
    for tp in range(tp_size):
        held = files.read(f"zero_pp_rank_0_mp_rank_{tp:02d}_model_states.pt")["param_shapes"]
        states = [files.optimizer_state(dp, tp) for dp in range(dp_size)]
        for group, named_shapes in enumerate(held):
            rows = [{"fp32": state["fp32_flat_groups"][group],
                     **state["optimizer_state_dict"]["state"][group]} for state in states]
            start = 0
            for full_name, shape in named_shapes.items():
                name = full_name.removeprefix(STUDENT_PREFIX)
                is_whole = shape == shapes.get(name)
                every = 1 if is_whole else neighbours
                ranks = dp_size * tp_size if is_whole else dp_size // every
                size = -(-shape.numel() // ranks)
                parts_by_name.setdefault(name, []).extend(
                    Part(shape, [_cut(row, start, size) for row in rows[first::every]])
                    for first in range(every))
                start += size
    for name, parts in parts_by_name.items():
        if parts[0].shape == shapes.get(name):
            # It lies over all ranks, of which tensor-parallel peers are neighbours.
            pieces = [part.pieces[dp] for dp in range(dp_size) for part in parts]
            parts_by_name[name] = [Part(parts[0].shape, pieces)]
    return parts_by_name


def _stages_1_and_2(files: _Files, shapes: Mapping[str, torch.Size], dp_size: int,
                    tp_size: int) -> dict[str, list[Part]]:
    """Parts by parameter: they lie in one row, cut anywhere; each rank lists its pieces."""
    parts_by_name: dict[str, list[Part]] = {}
    for tp in range(tp_size):
        held = files.read(f"mp_rank_{tp:02d}_model_states.pt")["param_shapes"]
        local = {name: Part(shape, []) for group in held for name, shape in group.items()}
        for dp in range(dp_size):
            state = files.optimizer_state(dp, tp)
            for group, addresses in enumerate(state["param_slice_mappings"]):
                if not addresses:
                    continue
                row = {"fp32": state["single_partition_of_fp32_groups"][group],
                       **state["base_optimizer_state"]["state"][group]}
                for name, address in addresses.items():
                    local[name].pieces.append(_cut(row, address.start, address.numel))
        _add(parts_by_name, local)
    return _first_of_equals(parts_by_name, shapes)


def _stage_0(files: _Files, shapes: Mapping[str, torch.Size], dp_size: int,
             tp_size: int) -> dict[str, list[Part]]:
    """Parts by parameter: nothing is partitioned.

    In bf16 the fp32 weights are the optimizer's, in fp32 the model's.
    """
    parts_by_name: dict[str, list[Part]] = {}
    for tp in range(tp_size):
        file = files.read(f"mp_rank_{tp:02d}_model_states.pt")
        optimizer = file["optimizer"]
        adam = optimizer.get("optimizer_state_dict", optimizer)
        # Checkpoints of version 0.1 have one group, in the model's order.
        names = [f"{STUDENT_PREFIX}{name}" for group in adam["param_groups"]
                 for name in group.get("names", shapes)]
        masters = ([master for group in optimizer["fp32_groups"] for master in group]
                   if "fp32_groups" in optimizer
                   else [file["module"][name] for name in names])
        _add(parts_by_name,
             {name: Part(master.shape,
                         [{kind: tensor.flatten()
                           for kind, tensor in {"fp32": master, **adam["state"][index]}.items()
                           if kind in TENSOR_KINDS}])
              for index, (name, master) in enumerate(zip(names, masters, strict=True))})
    return _first_of_equals(parts_by_name, shapes)


def _add(parts_by_name: dict[str, list[Part]], local: dict[str, Part]) -> None:
    """Append one tensor-parallel rank's parts."""
    for name, part in local.items():
        parts_by_name.setdefault(name.removeprefix(STUDENT_PREFIX), []).append(part)


def _first_of_equals(parts_by_name: dict[str, list[Part]],
                     shapes: Mapping[str, torch.Size]) -> dict[str, list[Part]]:
    """The parts; of a parameter that every tensor-parallel rank holds whole, the first alone."""
    return {name: parts[:1] if parts[0].shape == shapes.get(name) else parts
            for name, parts in parts_by_name.items()}


def _cut(row: Mapping[str, torch.Tensor], start: int, size: int) -> Piece:
    return {kind: row[kind].narrow(0, start, size) for kind in TENSOR_KINDS if kind in row}
