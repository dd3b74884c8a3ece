"""Recipe and DeepSpeed config to one engine around student and teacher, both loaded sharded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from amid_ds.config.recipe import Dtype, Recipe, Teacher
from amid_ds.distributed.world import World
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.ds_config import (
    DeepSpeedConfig,
    for_teacher,
    gradients_in_fp32,
    offload_device,
    quantizes_weights,
    sharded_loading,
    teacher_is_replicated,
    uses_bf16,
    zero_stage,
)
from amid_ds.engine.engine import Engine
from amid_ds.engine.gather import GatheredBytes, count_and_order_gathers, gathered_head
from amid_ds.engine.muon import clip_gradients_first
from amid_ds.engine.optimizer import (
    DecayedParameters,
    GroupName,
    decayed_parameters,
    make_optimizer,
    parameter_groups,
    recount_steps,
)
from amid_ds.engine.zero_plus_plus import require_quantizer, secondary_groups_of_neighbours
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.attention import choose_attention, exceeds_window
from amid_ds.models.distiller import Distiller
from amid_ds.models.heads import head_of
from amid_ds.models.loading import load_causal_lm
from amid_ds.models.tensor_parallel import cut_head, layer_specs, tp_unsupported_reason, vocab_shard
from amid_ds.run.warm_start import resolve_student

logger = logging.getLogger(__name__)


def build_teacher_engine(teacher: Teacher, config: DeepSpeedConfig, world: World) -> Engine:
    """A teacher by itself, sharded over `world.shards` by ZeRO-3 and never trained. Collective."""
    deepspeed = import_deepspeed()
    model = _load_teacher(teacher, config, world)
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    deepspeed_engine, *_ = deepspeed.initialize(
        model=model.requires_grad_(False), dist_init_required=False,
        config={**config, "bf16": {"enabled": bf16}})
    deepspeed_engine.eval()
    return Engine(deepspeed_engine, world)


def build_engine(recipe: Recipe, config: DeepSpeedConfig, vocab_size: int, world: World) -> Engine:
    """The engine around a Distiller. Collective: every rank calls it with the same recipe."""
    # Before transformers, which loads sharded models through deepspeed, imports it in its own way.
    import_deepspeed()
    if quantizes_weights(config):
        require_quantizer(world)
    with freed_memory_given_back():
        distiller, groups, config = _build_distiller(recipe, config, vocab_size, world)
        optimizer = make_optimizer(distiller.student, groups, recipe.train,
                                   offload_device(config, "offload_optimizer") != "none", world)
        return _initialize(distiller, optimizer, decayed_parameters(recipe), config, world)


def _build_distiller(recipe: Recipe, config: DeepSpeedConfig, vocab_size: int, world: World
                     ) -> tuple[Distiller, dict[str, GroupName], DeepSpeedConfig]:
    """Both models, loaded and their heads cut; the optimizer's group of each of the student's
    parameters; the config with its tensor-parallel block."""
    shard = vocab_shard(vocab_size, world.tp_rank, world.tp_size, world.tp_group)
    replicated = teacher_is_replicated(recipe, config)
    teacher = None
    if recipe.teacher is not None:
        teacher = _load_teacher(recipe.teacher, for_teacher(config), world,
                                replicated)
        if replicated:
            teacher.to(world.device)
    with secondary_groups_of_neighbours(world.rank):
        student = _load_student(recipe, config)
    for name, model in (("the student", student), ("the teacher", teacher)):
        if model is not None and (recipe.data.isolates_any
                                  or exceeds_window(model, recipe.train.seq_length)):
            choose_attention(model, name, world.device, trains=model is student)
    distiller = Distiller(student, teacher, vocab_size=vocab_size, shard=shard,
                          replicated=replicated)
    # from_pretrained leaves a model in eval mode: no dropout, no activation checkpointing.
    distiller.train()
    groups = parameter_groups(student, recipe.train)
    if shard is not None:
        for model in filter(None, (student, teacher)):
            cut_head(model, shard, vocab_size, gathered_head)
        config = {**config, "tensor_parallel": _autotp(distiller, world)}
    return distiller, groups, config


def _load_teacher(teacher: Teacher, config: DeepSpeedConfig, world: World,
                  replicated: bool = False) -> nn.Module:
    over = world.shards
    model = load_causal_lm(teacher.model, teacher.dtype,
                           None if replicated or over else sharded_loading(config),
                           **teacher.hub_kwargs)
    if over is not None:
        from deepspeed.runtime.zero.partition_parameters import Init
        bf16 = next(model.parameters()).dtype == torch.bfloat16
        Init(module=model, data_parallel_group=over.whole,
             config_dict_or_path={**config, "bf16": {"enabled": bf16}})
    return model


def _load_student(recipe: Recipe, config: DeepSpeedConfig) -> nn.Module:
    dtype: Dtype = "bf16" if uses_bf16(config) else "fp32"
    origin = resolve_student(recipe)
    student = load_causal_lm(origin.model, dtype, sharded_loading(config), **origin.hub_kwargs)
    if recipe.student.activation_checkpointing:
        student.gradient_checkpointing_enable(   # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False})
    return student


def _initialize(distiller: Distiller, optimizer: torch.optim.Optimizer, decayed: DecayedParameters,
                config: DeepSpeedConfig, world: World) -> Engine:
    """DeepSpeed's engine around the distiller, its hooks set for our order of modules."""
    deepspeed = import_deepspeed()
    if world.tp_size > 1:
        _make_tensor_parallel_groups(world.tp_size)
    zero3 = zero_stage(config) == 3
    if config["gradient_accumulation_steps"] > 1 and not gradients_in_fp32(config):
        logger.warning("the gradients of micro-batches add up in bf16; ZeRO stages 2 and 3 can add "
                       "them up in fp32 (data_types.grad_accum_dtype)")
    trainable = [p for p in distiller.parameters() if p.requires_grad]
    split_early = (_split_layer_by_layer(distiller) if zero3 and world.tp_size > 1
                   else contextlib.nullcontext())
    with split_early:
        deepspeed_engine, *_ = deepspeed.initialize(
            model=distiller, model_parameters=trainable, optimizer=optimizer, config=config,
            dist_init_required=False)
    # DeepSpeed's bf16 stage 0 makes one empty step to create the state.
    recount_steps(optimizer, 0)
    gathered_bytes = GatheredBytes()
    if zero3:
        if any(group["name"] == "muon" for group in optimizer.param_groups):
            clip_gradients_first(deepspeed_engine.optimizer)
        head = head_of(distiller.student)
        of_head: list[Any] = [p for p in (head.weight, head.bias) if p is not None]
        gathered_bytes = count_and_order_gathers(distiller, exact=of_head)
        # ZeRO-3 restarts its prefetch trace at each forward and drops it when the module order
        # changes. Ours repeats per optimizer step only: Engine.start_step restarts it instead.
        deepspeed_engine.optimizer.parameter_offload.fwd_pre_hook.remove()
        # FusedHead reads the student's head, not the module that owns it: tell ZeRO-3's hooks.
        for parameter in of_head:
            deepspeed.zero.register_external_parameter(distiller.head, parameter)
    return Engine(deepspeed_engine, world, gathered_bytes, decayed)


def _make_tensor_parallel_groups(tp_size: int) -> None:
    """Make DeepSpeed's groups one by one. Collective.

    By itself it makes a mesh, which torch splits off a default group that is bound to a GPU in one
    act: with a warning, and with torch's own timeout in what gloo has of it.
    """
    from deepspeed.utils import groups

    # Takes up the default group, which it has not where no model was loaded sharded.
    import_deepspeed().init_distributed()
    groups._init_tp_groups_with_new_group(tp_size)


@contextlib.contextmanager
def _split_layer_by_layer(distiller: Distiller) -> Iterator[None]:
    """A context in which ZeRO-3 partitions AutoTP's part of a layer before it gathers the next.

    By itself DeepSpeed partitions all of them at the end, and a rank holds its whole
    tensor-parallel share of both models until then.
    """
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.utils import groups

    partitioned: Any = next(p for p in distiller.parameters() if hasattr(p, "ds_id"))
    replace_layer = AutoTP._replace_with_config

    def replace(autotp: Any, child: nn.Module, name: str) -> nn.Module:
        before: list[Any] = list(child.parameters(recurse=False))
        layer = replace_layer(autotp, child, name)
        if layer is not child:
            for parameter in before:
                # AutoTP keeps the parameter to identify it by; its data would stay with it.
                parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
        fresh: list[Any] = [p for p in layer.parameters(recurse=False) if not hasattr(p, "ds_id")]
        for parameter in fresh:
            parameter.ds_zero_partition_process_group = groups.get_data_parallel_group()
        partitioned.convert_to_zero_parameters(param_list=fresh)
        return layer

    AutoTP._replace_with_config = replace
    try:
        yield
    finally:
        AutoTP._replace_with_config = replace_layer


def _autotp(distiller: Distiller, world: World) -> dict[str, object]:
    """DeepSpeed's `tensor_parallel` block: the weights of the two bodies that AutoTP splits."""
    specs = []
    for name, model in (("student", distiller.student), ("teacher", distiller.teacher)):
        # A replicated teacher is no submodule, and stays whole by request.
        if name not in distiller._modules or model is None:
            continue
        reason = tp_unsupported_reason(model, world.tp_size)
        if reason is None:
            specs += layer_specs(model, name, trains=name == "student")
        else:
            logger.info("tensor_parallel %d: the %s's body stays whole on every rank, "
                        "its head is split: %s", world.tp_size, name, reason)
    return {"autotp_size": world.tp_size,
            "partition_config": {"use_default_specs": False, "layer_specs": specs}}
