"""Expert parallelism: neighbouring ranks hold a layer's experts together, and tokens travel.

Under ZeRO-3 alone every rank gathers every expert of every layer. Here N neighbours divide a
layer's experts, and ZeRO-3 shards each part over the ranks that have the same one: a rank gathers
the N-th of the experts, nothing where N is all ranks. A part is a parameter of fewer rows, marked
with its `expert_rows`, so that it is read, saved and put together like a head's rows.

DeepSpeed's own AutoEP replaces router and experts of six families by layers of its own, with other
names and shapes of their weights. What is used of it is the placement that ZeRO-3 knows by a
parameter's attributes: its gradient is summed over the ranks with the same part, divided by all
data-parallel ranks as any other, and counted once in the norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from amid_ds.config.recipe import Recipe
from amid_ds.distributed.nodes import ExpertGroups, divisors, expert_groups
from amid_ds.distributed.world import World
from amid_ds.engine.ds_config import (
    DeepSpeedConfig,
    quantizes_weights,
    secondary_ranks,
    teacher_shard_ranks,
    zero_stage,
)
from amid_ds.engine.sharding import OpenModel
from amid_ds.errors import InputError
from amid_ds.models.expert_exchange import exchange_tokens, unsplittable_reason
from amid_ds.models.experts import expert_layers

# DeepSpeed's name for the ranks with the same part of the student's experts.
GROUP_NAME = "ep_size_{}"


def require_expert_parallel(recipe: Recipe, config: DeepSpeedConfig, data_parallel: int,
                            models: Mapping[str, nn.Module]) -> None:
    """Raise InputError unless `expert_parallel` can be had of these models on so many ranks.

    models: on the meta device, the run's by a title such as `student folder`.
    """
    ranks = recipe.expert_parallel
    if ranks == 1:
        return
    reason = _conflict(recipe, config)
    if reason is None and data_parallel % ranks:
        reason = (f"it must divide the number of ranks, {data_parallel}, as "
                  f"{divisors(data_parallel)} do")
    layers = {title: expert_layers(model) for title, model in models.items()}
    if reason is None and not any(layers.values()):
        reason = f"no layer of experts in the {', the '.join(models)}"
    reasons = [f"the {title}: {each}" for title, model in models.items() for layer in layers[title]
               if (each := unsplittable_reason(model, layer, ranks)) is not None]
    if reason is None and reasons:
        reason = reasons[0]
    if reason is not None:
        raise InputError(f"expert_parallel {ranks}: {reason}",
                         "ZeRO stage 3 by itself, and a number of ranks that divides the ranks and "
                         "the experts of every layer",
                         "set expert_parallel to 1, or to what the line asks for")


def _conflict(recipe: Recipe, config: DeepSpeedConfig) -> str | None:
    """What expert parallelism cannot be had with, of the recipe and its DeepSpeed config."""
    zero = config.get("zero_optimization", {})
    if recipe.tensor_parallel > 1:
        return f"tensor_parallel {recipe.tensor_parallel} would split the same layers"
    if zero_stage(config) != 3:
        return f"ZeRO stage {zero_stage(config)} shards no weights; it needs stage 3"
    if secondary_ranks(config) > 1:
        return (f"zero_hpz_partition_size {secondary_ranks(config)} would keep second copies over "
                "ranks with other experts")
    if quantizes_weights(config) or zero.get("zero_quantized_gradients"):
        return "ZeRO++ sends in 8 bits over groups of its own, which know of no experts"
    if recipe.train.optimizer == "muon":
        return "train.optimizer muon needs whole gradients to be summed over all ranks"
    return None


def with_expert_groups(recipe: Recipe, config: DeepSpeedConfig, world: World) -> World:
    """The world with the groups for `expert_parallel`, where that is more than 1. Collective.

    recipe: with the teacher's placement. Raises InputError where that divides a group.
    """
    if recipe.expert_parallel == 1:
        return world
    over = teacher_shard_ranks(recipe, config)
    return replace(world, experts=expert_groups(world.rank, world.size, recipe.expert_parallel,
                                                over))


def distribute_experts(opened: OpenModel, title: str, groups: ExpertGroups) -> None:
    """Leave this rank its part of the experts of every layer, in place; tokens travel to them.

    opened: before its weights are read, titled `student` or otherwise. The student's experts lie
    over all ranks with the same part, a teacher's over those that its groups name. Raises
    InputError where transformers has read the weights.
    """
    model, trains = opened.module, title == "student"
    rank, size = groups.exchange.rank(), groups.exchange.size()
    for layer in expert_layers(model):
        experts: Any = model.get_submodule(layer.name)
        part = layer.experts // size
        for name, parameter in list(experts.named_parameters(recurse=False)):
            if not parameter.is_meta:
                raise InputError(f"expert_parallel {size}, and the weights of the {title} "
                                 f"{model.config.name_or_path} are loaded by transformers",   # type: ignore[union-attr]
                                 "a folder of safetensors files, of which each rank reads its part",
                                 "write it anew with save_pretrained, or set expert_parallel to 1")
            own: Any = nn.Parameter(parameter[rank * part:(rank + 1) * part].clone(),
                                    requires_grad=parameter.requires_grad)
            own.expert_rows = rank * part, (rank + 1) * part
            _place(own, groups, trains)
            setattr(experts, name, own)
        exchange_tokens(experts, groups.exchange)


def _place(parameter: Any, groups: ExpertGroups, trains: bool) -> None:
    """Tell ZeRO-3 over which ranks the parameter lies, and of which experts its gradient is."""
    from deepspeed.utils import groups as known

    parameter.ds_zero_partition_process_group = groups.alike if trains else groups.teachers
    if not trains:
        return
    name = GROUP_NAME.format(groups.exchange.size())
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_group_name = name
    known._EXPERT_PARALLEL_GROUP[name] = groups.exchange
    known._EXPERT_DATA_PARALLEL_GROUP[name] = groups.alike
