"""The DeepSpeed config with the recipe's numbers in it.

The recipe owns batch sizes, clipping, optimizer and schedule; the DeepSpeed config owns precision,
ZeRO and communication. What both name must agree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from amid_ds.config.library import packaged_folder
from amid_ds.config.recipe import Recipe
from amid_ds.errors import InputError
from amid_ds.models.loading import checkpoint_dtype

# DeepSpeed's own JSON, whose keys and values are its documentation's.
DeepSpeedConfig: TypeAlias = Mapping[str, Any]

OWNED_BY_RECIPE = {"optimizer": "train.learning_rate and train.weight_decay",
                   "scheduler": "train.schedule",
                   "train_batch_size": "train.global_batch_size",
                   "tensor_parallel": "tensor_parallel",
                   "activation_checkpointing": "student.activation_checkpointing"}


def read_deepspeed_config(recipe: Recipe, data_parallel: int) -> DeepSpeedConfig:
    """The DeepSpeed config with the recipe's numbers in it.

    Raises InputError where the two contradict.
    """
    path = find_deepspeed_config(recipe.deepspeed)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not a mapping")
    except (OSError, ValueError) as error:
        raise InputError(f"the DeepSpeed config {path} cannot be read: {error}", "a JSON object",
                         "fix the file, or start from one in ds_configs/") from None
    accumulation = accumulation_steps(recipe, data_parallel)
    ours = {"train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": recipe.train.gradient_clipping}
    if conflicts := list(_conflicts(recipe, config, ours, path.name)):
        lines = "\n".join(f"    - {conflict}" for conflict in conflicts)
        raise InputError(f"recipe and DeepSpeed config contradict each other:\n{lines}",
                         "each value in one place; batch sizes, clipping, optimizer and schedule "
                         "in the recipe",
                         f'take these keys out of {path}, or set them to "auto", '
                         "or to what the line asks for")
    if recipe.data.auxiliary is not None:
        # Each micro-batch is followed by one of the auxiliary corpus.
        ours["gradient_accumulation_steps"] = 2 * accumulation
    kept = {key: value for key, value in config.items() if key not in OWNED_BY_RECIPE}
    return {**kept, **ours, "steps_per_print": sys.maxsize}


def _conflicts(recipe: Recipe, config: DeepSpeedConfig, ours: Mapping[str, float],
               name: str) -> Iterator[str]:
    """A line for each key in which the config of the file `name` contradicts the recipe."""
    for key, value in ours.items():
        if config.get(key, "auto") not in ("auto", value):
            yield f"{key}: {config[key]} in {name}, {value} by the recipe"
    for key, owner in OWNED_BY_RECIPE.items():
        if config.get(key, "auto") != "auto":
            yield f"{key}: {json.dumps(config[key])} in {name}, {owner} in the recipe"
    yield from _zero_stage_conflicts(recipe, config, name)
    if config.get("fp16", {}).get("enabled"):
        yield f"fp16.enabled: true in {name}, the recipe knows bf16 and fp32"
    bf16 = uses_bf16(config)
    if recipe.student.dtype != "auto" and (recipe.student.dtype == "bf16") != bf16:
        yield (f"bf16.enabled: {str(bf16).lower()} in {name}, "
               f"student.dtype: {recipe.student.dtype} in the recipe")


def _zero_stage_conflicts(recipe: Recipe, config: DeepSpeedConfig, name: str) -> Iterator[str]:
    """A line for a ZeRO stage that is wrong in itself or for the recipe's layout."""
    stage, bf16 = zero_stage(config), uses_bf16(config)
    if stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage: {stage!r} in {name}, the stages are 0 to 3"
    elif stage == 0 and bf16 and recipe.tensor_parallel > 1:
        # DeepSpeed's optimizer of that stage gets the gradient norm of a split model wrong (0.780
        # for 0.883).
        yield (f"zero_optimization.stage: 0 with bf16 in {name}, "
               f"tensor_parallel: {recipe.tensor_parallel} needs stage 1")
    elif stage < 3 and bf16 and _engine_has_fp32_teacher(recipe, config):
        # Below stage 3 DeepSpeed casts every parameter of the engine to bf16, the teacher's too.
        yield (f"zero_optimization.stage: {stage} with bf16 in {name}, "
               "a teacher in fp32 on tensor-parallel ranks needs stage 3, "
               "or set teacher.placement: replicated, or teacher.dtype: bf16")


def _engine_has_fp32_teacher(recipe: Recipe, config: DeepSpeedConfig) -> bool:
    teacher = recipe.teacher
    if teacher is None or teacher_is_replicated(recipe, config):
        return False
    if teacher.dtype == "auto":
        return checkpoint_dtype(teacher.model, **teacher.hub_kwargs) == torch.float32
    return teacher.dtype == "fp32"


def zero_stage(config: DeepSpeedConfig) -> Any:
    """The ZeRO stage that the config names: 0 to 3, or the wrong value that is written there."""
    return config.get("zero_optimization", {}).get("stage", 0)


def uses_bf16(config: DeepSpeedConfig) -> bool:
    """True where the student trains in bf16; the optimizer's weights are in fp32 either way."""
    return bool(config.get("bf16", {}).get("enabled"))


def sharded_loading(config: DeepSpeedConfig) -> DeepSpeedConfig | None:
    """The config by which transformers loads a model into ZeRO-3's shards; None below stage 3."""
    return config if zero_stage(config) == 3 else None


def teacher_is_replicated(recipe: Recipe, config: DeepSpeedConfig) -> bool:
    """True where every rank holds the teacher whole, outside the engine.

    That is where the recipe asks for it, or where nothing shards the teacher.
    """
    if recipe.teacher is None:
        return False
    nothing_shards_it = zero_stage(config) != 3 and recipe.tensor_parallel == 1
    return recipe.teacher.placement == "replicated" or nothing_shards_it


def find_deepspeed_config(name: str) -> Path:
    """`name` as given, or, where there is no such file, the packaged one of that name."""
    if Path(name).is_file():
        return Path(name)
    folder = packaged_folder("ds_configs")
    packaged = folder / Path(name).name
    if packaged.is_file() and Path(name).parent.name in ("", "ds_configs"):
        return packaged
    ready = ", ".join(sorted(p.name for p in folder.glob("*.json")))
    raise InputError(f"the DeepSpeed config {name} is not there",
                     f"a JSON file, or one of ours: {ready}", "check `deepspeed:` in the recipe")


def data_parallel_size(recipe: Recipe, ranks: int) -> int:
    """The number of ranks that see different tokens.

    Raises InputError where tensor_parallel does not divide `ranks`.
    """
    size = recipe.tensor_parallel
    if ranks % size:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise InputError(f"tensor_parallel {size} on {ranks} rank(s)",
                         "a divisor of the number of ranks",
                         f"set tensor_parallel to one of {fitting}; "
                         f"or start a multiple of {size} ranks")
    return ranks // size


def accumulation_steps(recipe: Recipe, data_parallel: int) -> int:
    """Micro-batches per rank and optimizer step.

    Raises InputError where the global batch does not divide.
    """
    train = recipe.train
    steps, rest = divmod(train.global_batch_size, data_parallel * train.micro_batch_size)
    if rest or not steps:
        whole, left = divmod(train.global_batch_size, train.micro_batch_size)
        fitting = [] if left else [n * recipe.tensor_parallel for n in range(1, whole + 1)
                                   if whole % n == 0]
        numbers = ", ".join(map(str, fitting)) or "none"
        raise InputError(
            f"train.global_batch_size {train.global_batch_size} on {data_parallel} data-parallel "
            f"rank(s) of train.micro_batch_size {train.micro_batch_size}",
            f"a multiple of ranks × micro-batch = {data_parallel * train.micro_batch_size}",
            f"start on one of these numbers of ranks: {numbers}; or change one of the two keys")
    return steps
