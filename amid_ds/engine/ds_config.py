"""The DeepSpeed config with the recipe's numbers in it.

The recipe owns batch sizes, clipping, optimizer and schedule; the DeepSpeed config owns precision,
ZeRO and communication. What both name must agree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from amid_ds.config.library import packaged_folder
from amid_ds.config.recipe import MeanTeacher, Recipe
from amid_ds.config.strict import load_json, read_user_file
from amid_ds.distributed.nodes import divisors
from amid_ds.engine.ds_schema import OWNED_BY_RECIPE, find_problems
from amid_ds.errors import InputError
from amid_ds.models.loading import checkpoint_dtype, model_config
from amid_ds.models.shape import text_config
from amid_ds.run.warm_start import frozen_models, resolve_student

# DeepSpeed's own JSON, whose keys and values are its documentation's.
DeepSpeedConfig: TypeAlias = Mapping[str, Any]

# The lowest ZeRO stage that offloads the weights, and the optimizer's state.
OFFLOAD_STAGES = {"offload_param": 3, "offload_optimizer": 1}
# The lowest ZeRO stage at which DeepSpeed adds the gradients of a bf16 model up in fp32.
ACCUMULATION_STAGE = 2
# An `optimizer` section's `type`, by the recipe's optimizer.
DEEPSPEED_NAMES = {"adamw": "AdamW", "muon": "Muon"}
# ZeRO's sizes that may be "auto", from the hidden size by the formulas of transformers' documents.
AUTOMATIC_SIZES: Mapping[str, Callable[[int], int]] = {
    "zero_optimization.reduce_bucket_size": lambda width: width * width,
    "zero_optimization.stage3_prefetch_bucket_size": lambda width: width * width * 9 // 10,
    "zero_optimization.stage3_param_persistence_threshold": lambda width: 10 * width}


def read_deepspeed_config(recipe: Recipe, data_parallel: int) -> DeepSpeedConfig:
    """The DeepSpeed config with the recipe's numbers in it.

    Raises InputError, with all faults, for a config that DeepSpeed would misread, that an engine
    here cannot honour, or that contradicts the recipe.
    """
    path = find_deepspeed_config(recipe.deepspeed)
    config = {key: _resolve_auto(key, value, recipe) for key, value in _read_json(path).items()}
    accumulation = accumulation_steps(recipe, data_parallel)
    ours = {"train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": recipe.train.gradient_clipping}
    problems = find_problems(config)
    lines = [line for of_key in problems.values() for line in of_key]
    lines += _conflicts(recipe, config, ours, path.name)
    if not problems:
        lines += _section_conflicts(recipe, config, path.name)
        lines += _zero_plus_plus_conflicts(recipe, config, data_parallel, path.name)
    if lines:
        shown = "\n".join(f"    - {line}" for line in lines)
        raise InputError(f"the DeepSpeed config {path} is not one for this recipe:\n{shown}",
                         "DeepSpeed's own keys and types, and each value in one place; batch "
                         "sizes, clipping, optimizer and schedule in the recipe",
                         f'take these keys out of {path}, or set them to what the line asks for; '
                         'what the recipe says may be "auto"')
    if recipe.data.auxiliary is not None:
        # Each micro-batch is followed by one of the auxiliary corpus.
        ours["gradient_accumulation_steps"] = 2 * accumulation
    kept = {key: value for key, value in config.items() if key not in OWNED_BY_RECIPE}
    if "data_types" not in kept and _should_accumulate_in_fp32(kept, ours):
        kept["data_types"] = {"grad_accum_dtype": "fp32"}
    if recipe.train.optimizer == "muon":
        # DeepSpeed's Muon needs whole gradients to be summed.
        kept["zero_optimization"] = {**kept["zero_optimization"], "reduce_scatter": False}
    # DeepSpeed would refuse torch's AdamW for offloaded state, where its own cannot be compiled.
    # Its timer, of which nothing is ever printed, would wait for the GPU at the beginning of each
    # micro-batch.
    return {**kept, **ours, "steps_per_print": sys.maxsize, "zero_force_ds_cpu_optimizer": False,
            "timers": {"throughput": {"enabled": False}}}


def _should_accumulate_in_fp32(config: DeepSpeedConfig, ours: Mapping[str, float]) -> bool:
    """True where DeepSpeed would add micro-batches' gradients up in bf16 and need not.

    With one micro-batch nothing is added. Below stage 2 DeepSpeed refuses (0), or takes another
    optimizer (1), whose checkpoints differ and which holds the whole gradient in both types.
    """
    return (uses_bf16(config) and zero_stage(config) >= ACCUMULATION_STAGE
            and ours["gradient_accumulation_steps"] > 1)


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises InputError."""
    try:
        config = load_json(read_user_file(path))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not a mapping")
    except (OSError, ValueError) as error:
        raise InputError(f"the DeepSpeed config {path} cannot be read: {error}", "a JSON object",
                         "fix the file (JSON has no comments, no comma at an end, and double "
                         "quotes), or start from one in ds_configs/") from None
    return {key: _whole_numbers(value) for key, value in config.items()}


def _whole_numbers(value: Any) -> Any:
    """`value` with an integer for every number such as 5e8, as JSON and DeepSpeed's documents have
    them."""
    if isinstance(value, dict):
        return {key: _whole_numbers(part) for key, part in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _resolve_auto(key: str, value: Any, recipe: Recipe) -> Any:
    """The section `key` with a value for each "auto" that recipe or models decide; any other stays,
    for a message."""
    if not isinstance(value, dict):
        return value
    if key == "optimizer" and _is_recipes_optimizer(value, recipe):
        return "auto"
    return {name: _resolve_value(f"{key}.{name}", part, recipe) if part == "auto" else part
            for name, part in value.items()}


def _is_recipes_optimizer(section: Mapping[str, Any], recipe: Recipe) -> bool:
    """True where nothing is said but the name of the recipe's optimizer, as DeepSpeed has it."""
    parameters, name = section.get("params", {}), DEEPSPEED_NAMES[recipe.train.optimizer]
    return (section.keys() <= {"type", "params"} and section.get("type") == name
            and isinstance(parameters, dict)
            and all(value == "auto" for value in parameters.values()))


def _resolve_value(name: str, auto: str, recipe: Recipe) -> Any:
    if name == "fp16.enabled":
        return False
    if name == "bf16.enabled" and recipe.student.dtype != "auto":
        return recipe.student.dtype == "bf16"
    return AUTOMATIC_SIZES[name](_hidden_size(recipe)) if name in AUTOMATIC_SIZES else auto


def _hidden_size(recipe: Recipe) -> int:
    """The width of the widest model."""
    models = [resolve_student(recipe), *frozen_models(recipe).values()]
    return max(int(text_config(model_config(model.model, **model.hub_kwargs)).hidden_size)
               for model in models)


def _conflicts(recipe: Recipe, config: DeepSpeedConfig, ours: Mapping[str, float],
               name: str) -> Iterator[str]:
    """A line for each key of the recipe's that the config of the file `name` contradicts."""
    for key, value in ours.items():
        said = config.get(key, "auto")
        if said != "auto" and (isinstance(said, bool) or said != value):
            yield f"{key}: {json.dumps(said)} in {name}, {value} by the recipe"
    for key, owner in OWNED_BY_RECIPE.items():
        if config.get(key, "auto") != "auto":
            yield f"{key}: {json.dumps(config[key])} in {name}, {owner} in the recipe"


def _section_conflicts(recipe: Recipe, config: DeepSpeedConfig, name: str) -> Iterator[str]:
    """A line for each section that is sound in itself and wrong for the recipe."""
    yield from _zero_stage_conflicts(recipe, config, name)
    if isinstance(recipe.teacher, MeanTeacher) and zero_stage(config) in (1, 2):
        # There the mean is partitioned and the models are whole.
        yield (f"zero_optimization.stage: {zero_stage(config)} in {name}, teacher.ema in the "
               "recipe needs stage 3 or 0")
    if recipe.train.optimizer == "muon":
        yield from _muon_conflicts(recipe, config, name)
    if config.get("fp16", {}).get("enabled"):
        yield f"fp16.enabled: true in {name}, the recipe knows bf16 and fp32"
    bf16 = uses_bf16(config)
    if recipe.student.dtype != "auto" and (recipe.student.dtype == "bf16") != bf16:
        yield (f"bf16.enabled: {str(bf16).lower()} in {name}, "
               f"student.dtype: {recipe.student.dtype} in the recipe")


def _zero_stage_conflicts(recipe: Recipe, config: DeepSpeedConfig, name: str) -> Iterator[str]:
    """A line for a ZeRO stage that is wrong for the recipe's layout, or for what is offloaded."""
    stage, bf16 = zero_stage(config), uses_bf16(config)
    accumulation = config.get("data_types", {}).get("grad_accum_dtype")
    if accumulation == "bf16" and not bf16:
        yield f"data_types.grad_accum_dtype: bf16 in {name}, the student trains in fp32"
    if accumulation == "fp32" and bf16 and stage < ACCUMULATION_STAGE:
        yield (f"data_types.grad_accum_dtype: fp32 with bf16 at stage {stage} in {name}, "
               f"it needs stage {ACCUMULATION_STAGE}")
    for part, least in OFFLOAD_STAGES.items():
        if offload_device(config, part) != "none" and stage < least:
            yield (f"zero_optimization.{part} at stage {stage} in {name}, "
                   f"it needs stage {least}")
    if stage == 0 and bf16 and recipe.tensor_parallel > 1:
        # DeepSpeed's optimizer of that stage gets the gradient norm of a split model wrong (0.780
        # for 0.883).
        yield (f"zero_optimization.stage: 0 with bf16 in {name}, "
               f"tensor_parallel: {recipe.tensor_parallel} needs stage 1")
    elif stage < 3 and bf16 and _engine_has_fp32_teacher(recipe, config):
        # Below stage 3 DeepSpeed casts every parameter of the engine to bf16, the teacher's too.
        yield (f"zero_optimization.stage: {stage} with bf16 in {name}, "
               "a teacher in fp32 on tensor-parallel ranks needs stage 3, "
               "or set teacher.placement: replicated, or teacher.dtype: bf16")


def _muon_conflicts(recipe: Recipe, config: DeepSpeedConfig, name: str) -> Iterator[str]:
    """A line for each thing with which DeepSpeed's Muon would not be Muon, or not clip right."""
    stage, muon = zero_stage(config), "train.optimizer: muon in the recipe"
    if stage != 3:
        yield (f"zero_optimization.stage: {stage} in {name}, {muon} needs stage 3: below it "
               "DeepSpeed would clip Muon's steps instead of the gradients")
    for part in OFFLOAD_STAGES:
        if offload_device(config, part) != "none":
            yield (f"zero_optimization.{part} in {name}, {muon} needs all on the device: offloaded "
                   "DeepSpeed would clip Muon's steps instead of the gradients")
    if recipe.tensor_parallel > 1:
        yield (f"tensor_parallel: {recipe.tensor_parallel} in the recipe, {muon} needs whole "
               "matrices: set it to 1")
    if config.get("zero_optimization", {}).get("reduce_scatter"):
        yield f"zero_optimization.reduce_scatter: true in {name}, {muon} needs false"


def _zero_plus_plus_conflicts(recipe: Recipe, config: DeepSpeedConfig, data_parallel: int,
                              name: str) -> Iterator[str]:
    """A line for each thing with which ZeRO++ cannot be, or would be wrong."""
    ranks = secondary_ranks(config)
    key = f"zero_optimization.zero_hpz_partition_size: {ranks}"
    if ranks > 1 and data_parallel % ranks:
        yield f"{key} in {name}, it must divide the number of data-parallel ranks, {data_parallel}"
    keys = [key] if ranks > 1 else []
    if quantizes_weights(config):
        keys.append("zero_optimization.zero_quantized_weights: true")
    for key in keys:
        if zero_stage(config) != 3:
            yield f"{key} at stage {zero_stage(config)} in {name}, it needs stage 3"
        if recipe.tensor_parallel > 1:
            # DeepSpeed makes secondary groups of neighbouring ranks, which hold different parts.
            yield (f"{key} in {name}, tensor_parallel: {recipe.tensor_parallel} in the recipe: "
                   "an engine here does not do both")


def _engine_has_fp32_teacher(recipe: Recipe, config: DeepSpeedConfig) -> bool:
    teacher = recipe.live_teacher
    if teacher is None or teacher_is_replicated(recipe, config):
        return False
    if teacher.dtype == "auto":
        return checkpoint_dtype(teacher.model, **teacher.hub_kwargs) == torch.float32
    return teacher.dtype == "fp32"


def zero_stage(config: DeepSpeedConfig) -> int:
    """The ZeRO stage that the config names, 0 to 3."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offload_device(config: DeepSpeedConfig, part: str) -> str:
    """Where ZeRO keeps `part`, a key of OFFLOAD_STAGES: `cpu`; `none`: on the device."""
    return str((config.get("zero_optimization", {}).get(part) or {}).get("device", "none"))


def offloads_optimizer(recipe: Recipe) -> bool:
    """True where the recipe's DeepSpeed config, read by itself, offloads the optimizer's state.

    Raises InputError where it cannot be read.
    """
    config = _read_json(find_deepspeed_config(recipe.deepspeed))
    return not find_problems(config) and offload_device(config, "offload_optimizer") != "none"


def uses_bf16(config: DeepSpeedConfig) -> bool:
    """True where the student trains in bf16; the optimizer's weights are in fp32 either way."""
    return bool(config.get("bf16", {}).get("enabled"))


def gradients_in_fp32(config: DeepSpeedConfig) -> bool:
    """True where the gradients that wait for the optimizer are in fp32."""
    return (not uses_bf16(config)
            or config.get("data_types", {}).get("grad_accum_dtype") == "fp32")


def secondary_ranks(config: DeepSpeedConfig) -> int:
    """The neighbouring ranks that together hold the student once more (ZeRO++'s hpZ); 1: none."""
    return max(1, int(config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)))


def quantizes_weights(config: DeepSpeedConfig) -> bool:
    """True where the student's weights travel in 8 bits (ZeRO++'s qwZ)."""
    return bool(config.get("zero_optimization", {}).get("zero_quantized_weights"))


def for_teacher(config: DeepSpeedConfig) -> DeepSpeedConfig:
    """The config by which a teacher is sharded: without what ZeRO++ does to the student's weights.
    """
    zero = config.get("zero_optimization", {})
    return {**config, "zero_optimization": {**zero, "zero_hpz_partition_size": 1,
                                            "zero_quantized_weights": False}}


def sharded_loading(config: DeepSpeedConfig) -> DeepSpeedConfig | None:
    """The config by which transformers loads a model into ZeRO-3's shards; None below stage 3."""
    return config if zero_stage(config) == 3 else None


def teacher_is_replicated(recipe: Recipe, config: DeepSpeedConfig) -> bool:
    """True where every rank holds the teacher whole, outside the engine.

    That is where the recipe asks for it, or where nothing shards the teacher.
    """
    teacher = recipe.live_teacher
    if teacher is None:
        return False
    nothing_shards_it = recipe.tensor_parallel == 1 and (
        zero_stage(config) != 3 or (teacher.placement == "node" and teacher.shard_over == 1))
    return teacher.placement == "replicated" or nothing_shards_it


def teacher_shard_ranks(recipe: Recipe, config: DeepSpeedConfig) -> int | None:
    """The neighbouring data-parallel ranks over which the teacher lies; None: all, or none of them.

    recipe: with `shard_over` where the placement is `node`.
    """
    teacher = recipe.live_teacher
    if (teacher is None or teacher.placement != "node" or zero_stage(config) != 3
            or teacher_is_replicated(recipe, config)):
        return None
    return teacher.shard_over


def find_deepspeed_config(name: str) -> Path:
    """`name` as given, or, where there is no such file, the packaged one of that name."""
    if Path(name).is_file():
        return Path(name)
    folder = packaged_folder("ds_configs")
    packaged = folder / Path(name).name
    # Not a folder of that name elsewhere: what is missing there is another file.
    if packaged.is_file() and Path(name).parent in (Path(), Path("ds_configs")):
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
        raise InputError(f"tensor_parallel {size} on {ranks} rank(s)",
                         "a divisor of the number of ranks",
                         f"set tensor_parallel to one of {divisors(ranks)}; "
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
