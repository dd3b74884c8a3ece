"""Recipe and DeepSpeed config to one engine around student and teacher, both loaded sharded."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from amid_ds.config.recipe import Dtype, MeanTeacher, Recipe, Teacher
from amid_ds.distributed.world import World
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.body_split import BodySplit, make_tensor_parallel_groups
from amid_ds.engine.ds_config import (
    DeepSpeedConfig,
    for_teacher,
    gradients_in_fp32,
    offload_device,
    quantizes_weights,
    teacher_is_replicated,
    uses_bf16,
    zero_stage,
)
from amid_ds.engine.ema import RunningMeans, mean_decays
from amid_ds.engine.engine import Engine
from amid_ds.engine.expert_parallel import distribute_experts
from amid_ds.engine.gather import (
    GatheredBytes,
    count_and_order_gathers,
    full_shape,
    gathered_head,
    models_in_engine,
)
from amid_ds.engine.leaves import (
    mark_leaves,
    register_outside_reads,
    warn_of_large_layers,
    without_listed_leaves,
)
from amid_ds.engine.muon import clip_gradients_first
from amid_ds.engine.optimizer import (
    GroupName,
    decayed_parameters,
    make_optimizer,
    parameter_groups,
    recount_steps,
)
from amid_ds.engine.sharding import OpenModel, open_causal_lm
from amid_ds.engine.zero_plus_plus import require_quantizer, secondary_groups_of_neighbours
from amid_ds.losses.host_memory import freed_memory_given_back
from amid_ds.models.adapters import FirstValues
from amid_ds.models.attention import choose_attention, exceeds_window
from amid_ds.models.delta import joined_teacher
from amid_ds.models.distiller import Distiller
from amid_ds.models.experts import expert_layers
from amid_ds.models.heads import head_parameters
from amid_ds.models.loading import in_one_dtype, load_causal_lm
from amid_ds.models.recurrence import recomputed_alike, run_documents_alone
from amid_ds.models.router_loss import Routers, log_router_weights, router_weights
from amid_ds.models.tensor_parallel import cut_head, vocab_shard
from amid_ds.models.trained import choose_trained
from amid_ds.run.start import end_part
from amid_ds.run.warm_start import frozen_models, resolve_student

logger = logging.getLogger(__name__)


def build_teacher_engine(teacher: Teacher, config: DeepSpeedConfig, world: World,
                         shape: Callable[[nn.Module], nn.Module] = lambda model: model) -> Engine:
    """A teacher by itself, sharded over `world.shards` by ZeRO-3 and never trained. Collective.

    shape: is given the model before its weights are read, and returns the engine's module.
    """
    deepspeed = import_deepspeed()
    opened = open_causal_lm(teacher, teacher.dtype, for_teacher(config), world, world.shards)
    opened.module.requires_grad_(False)
    module = shape(opened.module)
    bf16 = next(opened.read(world).parameters()).dtype == torch.bfloat16
    mark_leaves([opened.module])
    deepspeed_engine, *_ = deepspeed.initialize(
        model=module, dist_init_required=False,
        config=without_listed_leaves({**config, "bf16": {"enabled": bf16}}))
    deepspeed_engine.eval()
    register_outside_reads([opened.module])
    return Engine(deepspeed_engine, world)


def build_engine(recipe: Recipe, config: DeepSpeedConfig, vocab_size: int, world: World,
                 resumes: bool = False, first_pieces: Tensor | None = None) -> Engine:
    """The engine around a Distiller. Collective: every rank calls it with the same recipe.

    first_pieces: see FusedHead.
    resumes: a checkpoint will replace the student's weights, which are therefore not read.
    """
    # Before transformers, which loads sharded models through deepspeed, imports it in its own way.
    import_deepspeed()
    if quantizes_weights(config):
        require_quantizer(world)
    with freed_memory_given_back(), secondary_groups_of_neighbours(world.rank):
        distiller, groups = _build_distiller(recipe, config, vocab_size, world, resumes,
                                             first_pieces)
        end_part("loading")
        optimizer = make_optimizer(distiller.student, groups, recipe.train,
                                   offload_device(config, "offload_optimizer") != "none", world)
        if world.tp_size > 1:
            config = {**config, "tensor_parallel": {"autotp_size": world.tp_size}}
        return _initialize(distiller, optimizer, recipe, config, world)


def _build_distiller(recipe: Recipe, config: DeepSpeedConfig, vocab_size: int, world: World,
                     resumes: bool, first_pieces: Tensor | None = None
                     ) -> tuple[Distiller, dict[str, GroupName]]:
    """All models, split and with their weights; the optimizer's group of each of the student's
    parameters."""
    shard = vocab_shard(vocab_size, world.tp_rank, world.tp_size, world.tp_group)
    replicated = teacher_is_replicated(recipe, config)
    frozen = in_one_dtype(frozen_models(recipe))
    opened = {"student": _open_student(recipe, config, world, resumes),
              **{key: _open_teacher(model, config, replicated, world)
                 for key, model in frozen.items()}}
    if isinstance(recipe.teacher, MeanTeacher):
        opened["teacher"] = _open_mean(recipe, config, world)
    models = {name: model.module for name, model in opened.items()}
    for name, module in models.items():
        choose_attention_of(module, f"the {name}", recipe, world, trains=name == "student")
    distiller = Distiller(models["student"], joined_teacher(models, recipe.live_teacher),
                          vocab_size=vocab_size, shard=shard, replicated=replicated,
                          cached=recipe.cached_teacher is not None, first_pieces=first_pieces,
                          routers=_routers_of(models["student"], recipe, world))
    # from_pretrained leaves a model in eval mode: no dropout, no activation checkpointing.
    distiller.train()
    groups = parameter_groups(models["student"], recipe.train)
    body_split = None
    if world.experts is not None:
        for name, model in opened.items():
            if name == "student" or not replicated:
                distribute_experts(model, name, world.experts)
    if shard is not None:
        make_tensor_parallel_groups(world.tp_size)
        for module in models.values():
            cut_head(module, shard, vocab_size, gathered_head)
        body_split = BodySplit(distiller, world)
    for model in opened.values():
        model.read(world)
    if body_split is not None:
        body_split.sum_gradients()
    return distiller, groups


def _routers_of(student: nn.Module, recipe: Recipe, world: World) -> Routers | None:
    """The student's routers, with the weights of their losses; None of a dense one."""
    layers = expert_layers(student, full_shape)
    weights = router_weights(student, layers, recipe.student.router_aux_loss)
    if not layers:
        return None
    log_router_weights(student, layers, weights, recipe.student.router_aux_loss)
    return Routers(layers, weights, world.summed)


def choose_attention_of(model: nn.Module, title: str, recipe: Recipe, world: World, trains: bool
                        ) -> None:
    """Choose the attention of one of the recipe's models, where its rows ask for one.

    And let its recurrent layers run on each document alone, where rows have several.
    """
    if recipe.data.isolates_any:
        run_documents_alone(model)
    if recipe.data.isolates_any or exceeds_window(model, recipe.train.seq_length):
        choose_attention(model, title, world.device, trains)


def _open_student(recipe: Recipe, config: DeepSpeedConfig, world: World, resumes: bool
                  ) -> OpenModel:
    dtype: Dtype = "bf16" if uses_bf16(config) else "fp32"
    origin = resolve_student(recipe)

    def choose(module: nn.Module) -> FirstValues:
        return choose_trained(module, recipe.student, recipe.train.seed)

    if resumes or zero_stage(config) == 3:
        opened = open_causal_lm(origin, dtype, config, world, read=not resumes, choose=choose)
    else:
        module = load_causal_lm(origin.model, dtype, **origin.hub_kwargs)
        opened = OpenModel(module, config, first=choose(module))
    if recipe.student.activation_checkpointing:
        opened.module.gradient_checkpointing_enable(   # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False,
                                           "context_fn": recomputed_alike})
    return opened


def _open_teacher(teacher: Teacher, config: DeepSpeedConfig, replicated: bool, world: World
                  ) -> OpenModel:
    if zero_stage(config) == 3 and not replicated:
        return open_causal_lm(teacher, teacher.dtype, for_teacher(config), world, world.shards)
    model = load_causal_lm(teacher.model, teacher.dtype, **teacher.hub_kwargs)
    return OpenModel(model.to(world.device) if replicated else model, config)


def _open_mean(recipe: Recipe, config: DeepSpeedConfig, world: World) -> OpenModel:
    """A second module of the student's, whose weights will be the mean's: nothing is read."""
    dtype: Dtype = "bf16" if uses_bf16(config) else "fp32"
    return open_causal_lm(resolve_student(recipe), dtype, for_teacher(config), world, read=False)


def _initialize(distiller: Distiller, optimizer: torch.optim.Optimizer, recipe: Recipe,
                config: DeepSpeedConfig, world: World) -> Engine:
    """DeepSpeed's engine around the distiller, its hooks set for our order of modules."""
    deepspeed = import_deepspeed()
    zero3 = zero_stage(config) == 3
    if config["gradient_accumulation_steps"] > 1 and not gradients_in_fp32(config):
        logger.warning("the gradients of micro-batches add up in bf16; ZeRO stages 2 and 3 can add "
                       "them up in fp32 (data_types.grad_accum_dtype)")
    trainable = [p for p in distiller.parameters() if p.requires_grad]
    sharded = models_in_engine(distiller) if zero3 else []
    warn_of_large_layers(sharded, config)
    mark_leaves(sharded)
    deepspeed_engine, *_ = deepspeed.initialize(
        model=distiller, model_parameters=trainable, optimizer=optimizer,
        config=without_listed_leaves(config), dist_init_required=False)
    # DeepSpeed's bf16 stage 0 makes one empty step to create the state.
    recount_steps(optimizer, 0)
    gathered_bytes = GatheredBytes()
    if zero3:
        if any(group["name"] == "muon" for group in optimizer.param_groups):
            clip_gradients_first(deepspeed_engine.optimizer)
        of_head = head_parameters(distiller.student)
        gathered_bytes = count_and_order_gathers(distiller, exact=of_head)
        # ZeRO-3 restarts its prefetch trace at each forward and drops it when the module order
        # changes. Ours repeats per optimizer step only: Engine.start_step restarts it instead.
        deepspeed_engine.optimizer.parameter_offload.fwd_pre_hook.remove()
        # FusedHead reads the student's head, not the module that owns it: tell ZeRO-3's hooks.
        for parameter in of_head:
            deepspeed.zero.register_external_parameter(distiller.head, parameter)
        register_outside_reads(sharded)
    return Engine(deepspeed_engine, world, gathered_bytes, decayed_parameters(recipe),
                  RunningMeans(deepspeed_engine, mean_decays(recipe)))
