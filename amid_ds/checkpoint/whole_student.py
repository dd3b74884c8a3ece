"""A run's whole student, tensor by tensor: what was trained from a checkpoint, the rest from the
files of the student's own model.

A checkpoint holds trained tensors alone, so of a student that trains in part the frozen ones are
read again from where the run read them, and refused if that is another model by now. An adapter
lies beside the weight that it adapts, and is added to it here: W + scaling · B A, of matrices in
the dtype of the export, as the engine multiplies them, their sum in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amid_ds.checkpoint.manifest import Manifest
from amid_ds.checkpoint.zero_shards import ZeroShards, trained_shapes
from amid_ds.config.recipe import Student
from amid_ds.errors import InputError
from amid_ds.models.adapters import ADAPTER_NAME, adapted_layers
from amid_ds.models.loading import load_causal_lm, meta_model, open_weights
from amid_ds.models.trained import choose_trained, trains_in_part
from amid_ds.models.weight_reader import WeightReader
from amid_ds.run.provenance import model_hash

# The key of a run's identity that has the hash of a student that trains in part.
FROZEN_HASH = "student.sha256"


def require_same_base(checkpoint: Path, student: Student) -> None:
    """Raise InputError unless `student.model` is what the run of the checkpoint froze a part of."""
    saved = Manifest.read(checkpoint).identity.get(FROZEN_HASH)
    if saved is None:
        return
    remedy = (f"bring the model that the run began with back to {student.model}; the trained "
              "tensors alone are in the checkpoint")
    if not Path(student.model).is_dir():
        raise InputError(f"the student {student.model}, a part of which {checkpoint} left as it "
                         "was, is not there", "the model that the run began with", remedy)
    now = model_hash(student.model)
    if now != saved:
        raise InputError(f"the student {student.model}, a part of which {checkpoint} left as it "
                         f"was, is another by now: its files' hash was {saved} and is {now}",
                         "the model that the run began with", remedy)


class FrozenWeights:
    """The weights of the student's own model, each read when it is asked for.

    Whole in memory only where its files cannot be read in ranges. Raises InputError where they are
    not those of its config.
    """

    def __init__(self, student: Student) -> None:
        found = open_weights(student.model, **student.hub_kwargs)
        self._reader = found if isinstance(found, WeightReader) else None
        self._loaded: Mapping[str, Tensor] = {} if self._reader is not None else dict(
            load_causal_lm(student.model, "auto", **student.hub_kwargs).named_parameters(
                remove_duplicate=False))

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight of this name and shape, in `dtype`."""
        if self._reader is None:
            return self._loaded[name].detach().to(dtype)
        out = torch.empty(shape, dtype=dtype)
        with self._reader as reader:
            reader.fill([(reader.sources[name], 0, out.view(-1))])
        return out


@dataclass(frozen=True)
class WholeStudent:
    """The weights of a student by their names in its own model, out of a checkpoint.

    trained: the meta model as it trains, with its adapters. frozen: None where all of it trains.
    """

    checkpoint: Path
    trained: nn.Module
    frozen: FrozenWeights | None
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Path, shaped: Student, student: Student,
           dtype: torch.dtype) -> WholeStudent:
        """That of the checkpoint's run. shaped: its student by its kept config; student: by its own
        model, which is read where it trains in part. Raises InputError where that is another."""
        trained = meta_model(shaped.model, **shaped.hub_kwargs)
        choose_trained(trained, shaped)
        frozen = None
        if trains_in_part(student):
            require_same_base(checkpoint, student)
            frozen = FrozenWeights(student)
        return cls(checkpoint, trained, frozen, dtype)

    def open(self) -> OpenStudent:
        """The checkpoint's files mapped into memory, until the last reference to it is gone."""
        return OpenStudent(self, ZeroShards(self.checkpoint, trained_shapes(self.trained)))


class OpenStudent:
    """A `WholeStudent` whose checkpoint is open."""

    def __init__(self, student: WholeStudent, shards: ZeroShards) -> None:
        self._student, self._shards = student, shards
        self._adapted: dict[str, tuple[str, Any]] = {
            f"{name}.weight": (name, layer) for name, layer in adapted_layers(student.trained)}

    def whole(self, name: str, shape: torch.Size) -> Tensor:
        """The weight of this name and shape in the student's own model, in the export's dtype."""
        student, shards = self._student, self._shards
        if name in shards.shapes:
            return shards.whole(name).to(student.dtype)
        assert student.frozen is not None
        weight = student.frozen.read(name, shape, student.dtype)
        if name not in self._adapted:
            return weight
        prefix, layer = self._adapted[name]
        a, b = (shards.whole(f"{prefix}.lora_{factor}.{ADAPTER_NAME}.weight")
                .to(student.dtype).float() for factor in "AB")
        product = b @ a
        if layer.fan_in_fan_out:
            product = product.T
        return (weight.float() + layer.scaling[ADAPTER_NAME] * product).to(student.dtype)

    def buffer(self, name: str) -> Tensor:
        """A buffer of the model."""
        return self._shards.buffer(name)
