"""The adapters of a LoRA run as the folder that `peft.PeftModel.from_pretrained` opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from amid_ds.checkpoint.zero_shards import ZeroShards
from amid_ds.config.recipe import Student
from amid_ds.models.adapter_folders import ADAPTER_FILE
from amid_ds.models.adapters import file_key, write_adapter_config
from amid_ds.models.weight_writer import save_tensors


def write_adapter(checkpoint: Path, trained: Mapping[str, torch.Size], dtype: torch.dtype,
                  model: nn.Module, base: Student, out: Path) -> None:
    """Write adapter_config.json and the trained tensors of the checkpoint in `dtype` into `out`.

    trained: their shapes. model: the student without adapters, on the meta device. base: the
    student by its own model, which the config names: a folder by its absolute path, or the hub's
    id and commit. A module that trains whole and is tied to another is written under both names,
    because peft makes a copy of each.
    """
    assert base.lora is not None
    lora, folder = base.lora, Path(base.model)
    shards = ZeroShards(checkpoint, trained)
    tensors = {file_key(name): shards.whole(name).to(dtype) for name in trained}
    twins = _names_of_tied(model, trained)
    for name, first in twins.items():
        tensors[file_key(name)] = tensors[file_key(first)].clone()
    if twins:
        modules = [*lora.modules_to_save, *(name.rpartition(".")[0] for name in twins)]
        lora = lora.model_copy(update={"modules_to_save": list(dict.fromkeys(modules))})
    name = str(folder.resolve()) if folder.is_dir() else base.model
    write_adapter_config(out, model, lora, name, base.revision)
    save_tensors(tensors, out / ADAPTER_FILE)


def _names_of_tied(model: nn.Module, trained: Mapping[str, torch.Size]) -> dict[str, str]:
    """The further names of trained weights in the model, each with the one in `trained`."""
    first: dict[int, str] = {}
    twins = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = first.setdefault(id(parameter), name)
        if own != name and own in trained:
            twins[name] = own
    return twins
