"""What a DeepSpeed config may say: keys and types by DeepSpeed's own classes, read strictly.

DeepSpeed itself passes over an unknown key, takes "false" for a boolean and `true` for stage 1. A
key that it knows and an engine here cannot honour is refused by name.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from amid_ds.config.section import MAX_INT
from amid_ds.config.strict import type_problem
from amid_ds.engine.backend import import_deepspeed
from amid_ds.errors import suggest

# The keys that the recipe owns, and its own key for each; ds_config.py compares the values.
OWNED_BY_RECIPE = {"optimizer": "train.optimizer, train.learning_rate, train.betas, train.eps and "
                                "train.weight_decay",
                   "scheduler": "train.schedule",
                   "train_batch_size": "train.global_batch_size",
                   "tensor_parallel": "tensor_parallel",
                   "activation_checkpointing": "student.activation_checkpointing"}
SET_BY_RECIPE = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                 "gradient_clipping")

_PLAIN_KEYS: Mapping[str, object] = {
    "steps_per_print": int, "wall_clock_breakdown": bool, "memory_breakdown": bool,
    "dump_state": bool, "disable_python_gc": bool, "log_level": str, "vocabulary_size": int,
    "prescale_gradients": bool, "gradient_predivide_factor": float, "disable_allgather": bool,
    "communication_data_type": Literal["fp16", "bf16", "fp32"],
    "zero_allow_untested_optimizer": bool, "zero_force_ds_cpu_optimizer": bool}
# DeepSpeed reads this section without a class.
_FLOPS_PROFILER: Mapping[str, object] = {
    "enabled": bool, "recompute_fwd_factor": float, "profile_step": int, "module_depth": int,
    "top_modules": int, "detailed": bool, "output_file": str | None}

# As is this one.
_DATA_TYPES: Mapping[str, object] = {"grad_accum_dtype": Literal["bf16", "fp32"]}

_DATA, _PRECISION = "the recipe's `data` says what is read", "`student.dtype` says the precision"
_OTHER = "an engine here does not do it"
_MICS = "DeepSpeed has removed it; zero_hpz_partition_size and teacher.placement: node remain"
REFUSED_KEYS = {
    "bfloat16": "its name is `bf16`", "amp": _PRECISION,
    "torch_autocast": _PRECISION, "quantize_training": _PRECISION,
    "weight_quantization": _PRECISION, "compression_training": _PRECISION,
    "curriculum_learning": _DATA, "data_efficiency": _DATA, "dataloader_drop_last": _DATA,
    "checkpoint": "the recipe's `checkpoint` says what is saved",
    "datastates_ckpt": "the recipe's `checkpoint` says what is saved",
    "nebula": "the recipe's `checkpoint` says what is saved",
    "elasticity": "a run goes on on any number of ranks without it",
    "autotuning": "`amid-ds plan` says what fits",
    "aio": "it is of NVMe offload, and checkpoints are made from memory",
    "gradient_allreduce_op": "a step's gradient is the mean over tokens",
    "managed_gradient_accumulation": "a step's micro-batches are counted here",
    "expert_parallel": "the recipe's `expert_parallel` says over how many ranks experts lie",
    **dict.fromkeys(("compile", "graph_harvesting", "hybrid_engine", "pipeline",
                     "eigenvalue", "progressive_layer_drop", "seq_parallel_communication_data_type",
                     "sequence_parallel_size", "sparse_attention", "sparse_gradients", "timers",
                     "use_data_before_expert_parallelism"), _OTHER)}
# A section's key, the values that are honoured, and the reason against the others.
_ONLY: Mapping[str, tuple[tuple[object, ...], str]] = {
    "bf16.check_grad_overflow": ((True,), "a step that is not finite must be noticed"),
    "bf16.bf16_master_weights_and_grads": ((False,), "the optimizer's weights are in fp32"),
    "bf16.bf16_optimizer_states": ((False,), "the optimizer's state is in fp32"),
    "zero_optimization.compute_grad_norm": ((True,), "every step logs the gradient's norm"),
    "zero_optimization.elastic_checkpoint": ((False,), "a checkpoint resumes on any ranks without"),
    # DeepSpeed then takes LOCAL_RANK, a GPU's index, for the number of a rank.
    "zero_optimization.pipeline_loading_checkpoint": ((False,), _OTHER),
    # DeepSpeed then saves the shards in another order than the one that they say they are in.
    "zero_optimization.round_robin_gradients": ((False,), "checkpoints would be scrambled"),
    "zero_optimization.zenflow": ((None,), _OTHER),
    "zero_optimization.leaf_module": ((None,), "what is gathered together is read off the models"),
    "zero_optimization.offload_param.device": (("none", "cpu"), "checkpoints are made from memory"),
    "zero_optimization.offload_optimizer.device": (("none", "cpu"),
                                                   "checkpoints are made from memory"),
    "zero_optimization.offload_optimizer.ratio": ((1,), "the optimizer is offloaded whole"),
    "zero_optimization.offload_optimizer.super_offload": ((False,), _OTHER),
    # It gathers before a layer's own hooks, the loss's among them.
    "zero_optimization.stage3_module_granularity_threshold": ((0,), _OTHER),
    "zero_optimization.zero_quantized_nontrainable_weights": (
        (False,), "it is of the teacher, whose probabilities are the target"),
    # csrc/quantization/pt_binding.cpp takes any tensor's memory for __half.
    "zero_optimization.zero_quantized_gradients": (
        (False,), "DeepSpeed's kernels read the bytes of a gradient as fp16, and it is in bf16 or "
                  "fp32"),
    "prescale_gradients": ((False,), "ZeRO does not do it"),
    "gradient_predivide_factor": ((1,), "ZeRO does not do it"),
    "zero_force_ds_cpu_optimizer": ((False,), "torch steps where DeepSpeed cannot")}

# Keys of a section that DeepSpeed knew once.
_REMOVED: Mapping[str, str] = {
    "zero_optimization.mics_shard_size": _MICS,
    "zero_optimization.mics_hierarchical_params_gather": _MICS,
    "zero_optimization.zeropp_loco_param": "DeepSpeed has removed it"}


def _sections() -> Mapping[str, Any]:
    """The fields of each section that is honoured: name to type, or DeepSpeed's pydantic class."""
    import_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
            "zero_optimization": DeepSpeedZeroConfig, "comms_logger": CommsLoggerConfig,
            "tensorboard": TensorBoardConfig, "wandb": WandbConfig, "csv_monitor": CSVConfig,
            "comet": CometConfig, "flops_profiler": _FLOPS_PROFILER, "data_types": _DATA_TYPES}


def find_problems(config: Mapping[str, object]) -> dict[str, list[str]]:
    """Lines on what is wrong with `config` in itself, by top-level key; {} where nothing is."""
    sections = _sections()
    problems: dict[str, list[str]] = {}
    for key, value in config.items():
        if key in sections:
            lines = list(_section_problems(key, sections[key], value))
        elif key in _PLAIN_KEYS:
            lines = list(_value_problems(key, _PLAIN_KEYS[key], value))
        elif key in REFUSED_KEYS:
            lines = [f"{key}: {REFUSED_KEYS[key]}; take it out"]
        elif key in OWNED_BY_RECIPE or key in SET_BY_RECIPE:
            lines = []
        else:
            known = [*sections, *_PLAIN_KEYS, *OWNED_BY_RECIPE, *SET_BY_RECIPE]
            lines = [f"{key} is unknown; {suggest(key, known)}"]
        if lines:
            problems[key] = lines
    return problems


def _section_problems(name: str, fields: Any, value: object) -> Iterator[str]:
    """The problems of the section `name`, whose `fields` are a class of DeepSpeed's or a table."""
    if not isinstance(value, Mapping):
        yield f"{name}: {json.dumps(value)}, it is a section: {{…}}, or left out"
        return
    types, renamed = _types(fields)
    for key, part in value.items():
        if key in renamed:
            yield f"{name}.{key} is an old name; use {renamed[key]}"
        elif f"{name}.{key}" in _REMOVED:
            yield f"{name}.{key}: {_REMOVED[f'{name}.{key}']}; take it out"
        elif key not in types:
            yield f"{name}.{key} is unknown; {suggest(str(key), types)}"
        else:
            yield from _value_problems(f"{name}.{key}", types[key], part)


def _types(fields: Any) -> tuple[dict[str, object], dict[str, str]]:
    """The type of each key of a section; and what took the place of the keys that have gone."""
    if isinstance(fields, Mapping):
        return dict(fields), {}
    types, renamed = {}, {}
    for name, field in fields.model_fields.items():
        extra = field.json_schema_extra or {}
        if extra.get("deprecated"):
            renamed[name] = extra.get("new_param", "nothing")
        else:
            # By its alias alone: `stage3_max_live_parameters`, as DeepSpeed documents it.
            types[field.alias or name] = field
    return types, renamed


def _value_problems(name: str, kind: Any, value: object) -> Iterator[str]:
    """The problem of one value: of another type, or not honoured; `kind`: a type or a field."""
    annotation = getattr(kind, "annotation", kind)
    parts = [part for part in (annotation, *getattr(annotation, "__args__", ()))
             if isinstance(part, type)]
    nested = next((part for part in parts if hasattr(part, "model_fields")), None)
    names = next((part for part in parts if issubclass(part, enum.Enum)), None)
    honoured, reason = _ONLY.get(name, ((), ""))
    if value == "auto":
        undecided = " while student.dtype is auto" if name == "bf16.enabled" else ""
        yield f'{name}: "auto", nothing decides it{undecided}; write the value'
    elif isinstance(value, int) and abs(value) > MAX_INT:
        yield f"{name}: it has more than 64 bits"
    elif nested is not None and value is not None and name not in _ONLY:
        yield from _section_problems(name, nested, value)
    elif names is not None and not any(
            type(value) is type(one.value) and value == one.value for one in names):
        values = sorted({one.value for one in names})
        shown = (f"{values[0]} to {values[-1]}" if isinstance(values[0], int)
                 else ", ".join(map(str, values)))
        yield f"{name}: {json.dumps(value)}, one of {shown}"
    elif names is None and nested is None and (
            problem := type_problem(annotation, getattr(kind, "metadata", ()), value)):
        yield f"{name}: {json.dumps(value)}, {problem}"
    elif honoured and value not in honoured:
        yield f"{name}: {json.dumps(value)}, {reason}; take it out"
