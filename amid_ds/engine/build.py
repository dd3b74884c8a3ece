"""Recipe and DeepSpeed config to one DeepSpeed engine around student and teacher, both loaded
sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from amid_ds.config.recipe import Dtype, Recipe, Teacher
from amid_ds.distributed.world import World
from amid_ds.engine.backend import (
    import_deepspeed,
)
from amid_ds.engine.ds_config import (
    sharded_loading,
    teacher_is_replicated,
    zero_stage,
)
from amid_ds.engine.gather import (
    GatheredBytes,
    gather_in_order,
    gather_one,
    gathered_head,
)
from amid_ds.losses import AMiD
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.distiller import Distiller
from amid_ds.models.heads import head_of
from amid_ds.models.loading import (
    load_causal_lm,
)
from amid_ds.models.tensor_parallel import cut_head, layer_specs, tp_unsupported_reason, vocab_shard
from amid_ds.run.warm_start import resolve_student


def build_teacher(teacher: Teacher, config: dict[str, Any]) -> Any:
    """A teacher by itself, sharded over all ranks by ZeRO-3 in an engine that does not train. Collective."""
    deepspeed = import_deepspeed()
    model = load_causal_lm(teacher.model, teacher.dtype, sharded_loading(config), **teacher.hub_kwargs)
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), dist_init_required=False,
                                      config={**config, "bf16": {"enabled": bf16}})
    engine.eval()
    return engine


def build_engine(recipe: Recipe, config: dict[str, Any], objective: AMiD, vocab_size: int, world: World) -> Any:
    """The DeepSpeedEngine around a Distiller. Collective: every rank calls it with the same recipe."""
    with freed_memory_given_back():
        return _build_engine(recipe, config, objective, vocab_size, world)


def _build_engine(recipe: Recipe, config: dict[str, Any], objective: AMiD, vocab_size: int, world: World) -> Any:
    deepspeed = import_deepspeed()
    shard = vocab_shard(vocab_size, world.tp_rank, world.tp_size, world.tp_group)
    teacher, apart = None, teacher_is_replicated(recipe, config)
    if recipe.teacher is not None:
        teacher = load_causal_lm(recipe.teacher.model, recipe.teacher.dtype, None if apart else sharded_loading(config),
                       **recipe.teacher.hub_kwargs)
        teacher.to(world.device if apart else None)
    student_dtype: Dtype = "bf16" if config.get("bf16", {}).get("enabled") else "fp32"
    begins = resolve_student(recipe)
    student = load_causal_lm(begins.model, student_dtype, sharded_loading(config), **begins.hub_kwargs)
    if recipe.student.activation_checkpointing:
        student.gradient_checkpointing_enable(   # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False})
    distiller = Distiller(student, teacher, objective, vocab_size=vocab_size, shard=shard,
                          kd_weight=1.0, ce_weight=0.0, apart=apart)      # until a step pursues its own
    distiller.train()      # from_pretrained leaves a model in eval mode: no dropout, no activation checkpointing
    if shard is not None:
        for model in filter(None, (student, teacher)):
            cut_head(model, shard, vocab_size, gathered_head)
        config = {**config, "tensor_parallel": _autotp(distiller, world)}
    trainable = [p for p in distiller.parameters() if p.requires_grad]
    # The loop sets the learning rate of every step. At stage 0 in bf16 DeepSpeed takes a step without gradients to make
    # Adam's state: with a rate of 0 it moves nothing, and below it is made not to count.
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=recipe.train.weight_decay)
    with _split_layer_by_layer(distiller) if shard is not None and zero_stage(config) == 3 else contextlib.nullcontext():
        engine, *_ = deepspeed.initialize(model=distiller, model_parameters=trainable, optimizer=optimizer,
                                          config=config, dist_init_required=False)
    for values in optimizer.state.values():
        values["step"].zero_()
    if zero_stage(config) == 3:
        engine.gathered = GatheredBytes()
        for held in distiller.parameters():
            held.all_gather_coalesced = partial(   # type: ignore[attr-defined]
                gather_in_order, held.all_gather_coalesced, engine.gathered)   # type: ignore[attr-defined]
            held.all_gather = partial(   # type: ignore[attr-defined]
                gather_one, held.all_gather, engine.gathered, held)   # type: ignore[attr-defined]
        # ZeRO-3 prefetches along a trace of modules that it starts anew at every forward, and drops where one differs
        # from the one before. The teacher runs once in a window of several: one trace spans it all (`begin_window`).
        engine.optimizer.parameter_offload.fwd_pre_hook.remove()
        # The student's head is read by FusedHead, not by the module that owns it: tell ZeRO-3's hooks.
        head = head_of(student)
        for parameter in (head.weight, head.bias):
            if parameter is not None:
                deepspeed.zero.register_external_parameter(distiller.head, parameter)
    return engine


@contextlib.contextmanager
def _split_layer_by_layer(distiller: Distiller) -> Iterator[None]:
    """Within it AutoTP's part of a layer goes into ZeRO-3's partitions before the next layer is gathered.

    By itself DeepSpeed partitions all of them at the end, and a rank holds its whole tensor-parallel share of both
    models until then.
    """
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.utils import groups

    partitioned: Any = next(p for p in distiller.parameters() if hasattr(p, "ds_id"))
    replace_layer = AutoTP._replace_with_config

    def replace(autotp: Any, child: nn.Module, name: str) -> nn.Module:
        before: list[Any] = list(child.parameters(recurse=False))
        layer = replace_layer(autotp, child, name)
        if layer is not child:
            for parameter in before:      # AutoTP keeps the parameter, to know it by; its data would stay with it
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


def _autotp(distiller: Distiller, world: World) -> dict[str, Any]:
    """DeepSpeed's `tensor_parallel` block: which weights of the two bodies AutoTP splits. Says what stays whole."""
    specs = []
    for name, model in (("student", distiller.student), ("teacher", distiller.teacher)):
        if name not in distiller._modules or model is None:      # a teacher apart from the engine is whole by request
            continue
        reason = tp_unsupported_reason(model, world.tp_size)
        if reason is None:
            specs += layer_specs(model, name, trains=name == "student")
        elif world.is_main:
            print(f"tensor_parallel {world.tp_size}: the {name}'s body stays whole on every rank, its head is split: "
                  f"{reason}", flush=True)
    return {"autotp_size": world.tp_size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
