"""A model's weights into safetensors files as save_pretrained names them, one file in memory."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amid_ds.files.atomic import replace_text

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit

# The most weights in one file, and the memory that writing needs.
FILE_BYTES = 2 * 10**9


def write_weights(model: Any, hollow: Mapping[str, Tensor],
                  read: Callable[[Sequence[str]], Iterable[Tensor]], out: Path) -> None:
    """Write files of at most FILE_BYTES, tied weights once; an index where there are several.

    model: the meta model, whose family's names on disk are taken. hollow: by name, a tensor without
    values for each parameter and buffer that is stored. read: the tensors of these names, those
    of one file, in their order.
    """
    from tqdm import tqdm
    from transformers.core_model_loading import revert_weight_conversion

    split = split_into_files(hollow)
    file_of: dict[str, str] = {}
    with tqdm(total=len(hollow), desc="writing", unit="tensor", disable=None) as bar:
        for file, names in split.filename_to_tensors.items():
            tensors = {}
            for name, tensor in zip(names, read(names), strict=True):
                tensors[name] = tensor
                bar.update()
            # To the names that the model's family has on disk.
            tensors = revert_weight_conversion(model, tensors)
            save_tensors(tensors, out / file)
            file_of |= dict.fromkeys(tensors, file)
    if split.is_sharded:
        total = sum(parameter.numel() for parameter in model.parameters())
        write_index({**split.metadata, "total_parameters": total}, file_of, out)


def split_into_files(hollow: Mapping[str, Tensor]) -> StateDictSplit:
    """Which tensors share each file of at most FILE_BYTES, and the files' names."""
    from huggingface_hub import split_torch_state_dict_into_shards

    return split_torch_state_dict_into_shards(dict(hollow), max_shard_size=FILE_BYTES,
                                              filename_pattern="model{suffix}.safetensors")


def write_index(metadata: Mapping[str, Any], file_of: Mapping[str, str], out: Path) -> None:
    """Write the index of several files; file_of: by name, the file of each tensor."""
    index = {"metadata": metadata, "weight_map": file_of}
    replace_text(out / "model.safetensors.index.json",
                 json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file.

    By itself safetensors (0.8) makes one that its owner alone may read.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)
