"""A finished (or unfinished) run leaves as an ordinary Hugging Face folder.

One process puts the student together from DeepSpeed's shards of any layout: no engine, no launcher, no accelerator.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from amid_ds.checkpoint import committed, damage, read_manifest
from amid_ds.config import Recipe, load_recipe
from amid_ds.errors import InputError, TrainingError


def export(source: str | Path, out: str | Path) -> Path:
    """A run or one of its checkpoints -> a folder that `AutoModelForCausalLM.from_pretrained` opens, with tokenizer.

    One process; needs the fp32 student in host memory. Weights are in the dtype that the student trained in.
    """
    from transformers import AutoModelForCausalLM

    from amid_ds.data import load_tokenizer
    from amid_ds.engine import DTYPES, import_deepspeed, model_config

    import_deepspeed()      # the shards name classes of its
    checkpoint, recipe = _resolve(Path(source))
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"the output {out} is there already and not empty", "a new or empty folder",
                         "choose another name")
    state = read_manifest(checkpoint)["state"]
    config = model_config(recipe.student.model, recipe.student.revision)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[state["student_dtype"]])
    student = whole_weights(checkpoint, {name: parameter.shape for name, parameter in model.named_parameters()},
                            tp_size=state.get("tensor_parallel", 1))
    missing, unexpected = model.load_state_dict(student, strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied - {name for name, _ in model.named_buffers()}:
        raise TrainingError(f"{checkpoint} does not fit {recipe.student.model}: "
                            f"missing {missing}, unexpected {unexpected}")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    load_tokenizer(recipe.student.model, recipe.student.revision).save_pretrained(aside)
    if out.exists():
        out.rmdir()
    os.replace(aside, out)
    return out


def whole_weights(checkpoint: Path, shapes: Mapping[str, torch.Size], tp_size: int) -> dict[str, torch.Tensor]:
    """The student's weights, put together from DeepSpeed's shards of any layout and ZeRO stage. One process.

    shapes: those of the whole weights, by name. What is smaller in a tensor-parallel rank's shard was split there.
    fp32 where ZeRO-3 keeps masters; the dtype that was trained in otherwise.
    """
    staged = (checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt").exists()
    parts = _zero3_parts(checkpoint, shapes, tp_size) if staged else [
        {name: tensor for name, tensor in _read(checkpoint / f"mp_rank_{tp:02d}_model_states.pt")["module"].items()
         if name.startswith("student.")} for tp in range(tp_size)]
    weights = {}
    for full_name, first in parts[0].items():
        name = full_name.removeprefix("student.")
        split = [dim for dim, (part, whole) in enumerate(zip(first.shape, shapes.get(name, first.shape), strict=True))
                 if part != whole]
        weights[name] = torch.cat([part[full_name] for part in parts], dim=split[0]) if split else first
    return weights


def _zero3_parts(checkpoint: Path, shapes: Mapping[str, torch.Size], tp_size: int) -> list[dict[str, torch.Tensor]]:
    """By tensor-parallel rank: the weights that it held, over its data-parallel peers, by name.

    A rank's file has its partitions in flat rows, one for each group of `param_shapes`. What a tensor-parallel group
    splits lies over the data-parallel ranks; what it holds whole lies over all ranks (and is given for rank 0 alone).
    """
    dp_size = len(list(checkpoint.glob("zero_pp_rank_*_mp_rank_00_optim_states.pt")))
    parts: list[dict[str, torch.Tensor]] = []
    found: dict[str, list[torch.Tensor]] = {}
    for tp in range(tp_size):
        held = _read(checkpoint / f"zero_pp_rank_0_mp_rank_{tp:02d}_model_states.pt")["param_shapes"]
        files = [_read(checkpoint / f"zero_pp_rank_{dp}_mp_rank_{tp:02d}_optim_states.pt") for dp in range(dp_size)]
        parts.append({})
        for group, named_shapes in enumerate(held):
            rows = [file["optimizer_state_dict"]["fp32_flat_groups"][group] for file in files]
            offset = 0
            for name, shape in named_shapes.items():
                whole = shape == shapes.get(name.removeprefix("student."))
                size = -(-shape.numel() // (dp_size * tp_size if whole else dp_size))
                found.setdefault(name, []).extend(row[offset:offset + size] for row in rows)
                offset += size
                if not whole:
                    parts[tp][name] = torch.cat(found.pop(name))[:shape.numel()].view(shape)
    for name, pieces in found.items():      # they came tensor-parallel rank by rank; in memory neighbours alternate
        in_order = [pieces[tp * dp_size + dp] for dp in range(dp_size) for tp in range(tp_size)]
        shape = shapes[name.removeprefix("student.")]
        parts[0][name] = torch.cat(in_order)[:shape.numel()].view(shape)
    return parts


def _read(file: Path) -> dict[str, Any]:
    """One of DeepSpeed's files, mapped into memory. They are ours: pickles that run code when they are read."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _resolve(source: Path) -> tuple[Path, Recipe]:
    """(good checkpoint, the run's recipe) of a run folder, or of a checkpoint in it."""
    run = source if (source / "recipe.yaml").is_file() else source.parent.parent
    candidates = committed(source / "checkpoints")[::-1] if run == source else [source]
    if not (run / "recipe.yaml").is_file() or not candidates:
        raise InputError(f"{source} holds no checkpoint",
                         "a run's folder, or a folder such as RUN/checkpoints/step_00000100",
                         "check the path; a run has a checkpoint after its first `checkpoint.every` steps")
    verdicts = []
    for checkpoint in candidates:
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, load_recipe(run / "recipe.yaml")
        verdicts.append(f"{checkpoint.name}: {wrong}")
    raise InputError(f"{source} holds no good checkpoint: {'; '.join(verdicts)}",
                     "one whose files are as they were written",
                     "`amid-ds checkpoints RUN` lists them; restore one from a copy")
