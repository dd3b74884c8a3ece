"""Where the teacher lies on the ranks of this start.

It changes no number, so that each start of a run decides anew, by the nodes and GPUs that it has.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from amid_ds.config.recipe import Recipe, Teacher
from amid_ds.distributed.nodes import Nodes, find_nodes
from amid_ds.distributed.world import World
from amid_ds.engine.ds_config import data_parallel_size, secondary_ranks, zero_stage
from amid_ds.errors import InputError
from amid_ds.planning.devices import local_device
from amid_ds.planning.placement import ChosenPlacement, choose_placement
from amid_ds.planning.setting import PlacementName
from amid_ds.training.job import Job

logger = logging.getLogger(__name__)


def place_teacher(job: Job, world: World) -> Job:
    """The job with its teacher's placement on these ranks and nodes, which it logs. Collective.

    Rank 0 decides. Raises InputError where the recipe asks for `node` and the nodes' ranks do not
    allow it.
    """
    if job.recipe.teacher is None:
        return job
    def place() -> ChosenPlacement:
        nodes = find_nodes(world)
        _warn_of_wide_copies(job, nodes)
        return _placement(job, nodes)

    chosen = world.run_on_main(place)
    over = "" if chosen.shard_over is None else f" over {chosen.shard_over} data-parallel rank(s)"
    logger.info("teacher.placement: %s%s: %s", chosen.placement, over, chosen.reason)
    return replace(job, placement=chosen)


def _warn_of_wide_copies(job: Job, nodes: Nodes) -> None:
    """Say so where the student's second copies (hpZ) do not save what they are for."""
    ranks = secondary_ranks(job.deepspeed_config)
    if not nodes.hold_groups_of(ranks):
        logger.warning("zero_hpz_partition_size %d: so many neighbouring ranks do not share a node,"
                       " and what they gather from one another goes between nodes; set it to the "
                       "ranks of a node, neighbours on it", ranks)


def _placement(job: Job, nodes: Nodes) -> ChosenPlacement:
    """The recipe's own placement, or the one that `auto` stands for here."""
    recipe, teacher = job.recipe, _teacher(job.recipe)
    if zero_stage(job.deepspeed_config) < 3:
        placement: PlacementName = "replicated" if teacher.placement == "replicated" else "zero3"
        return ChosenPlacement(placement, None, "ZeRO below stage 3 shards no weights")
    if teacher.placement == "auto":
        return _fastest(recipe, nodes)
    if teacher.placement != "node":
        return ChosenPlacement(teacher.placement, None, "the recipe says so")
    over = teacher.shard_over or nodes.copies_per_node(recipe.tensor_parallel)
    if over == data_parallel_size(recipe, len(nodes.node_of)):
        return ChosenPlacement("zero3", None, f"{over} data-parallel ranks are all")
    reason = "the recipe says so"
    if not nodes.hold_groups_of(over * recipe.tensor_parallel):
        reason += "; so many neighbours do not share a node, and exchange it between nodes"
    return ChosenPlacement("node", over, reason)


def _fastest(recipe: Recipe, nodes: Nodes) -> ChosenPlacement:
    """The fastest placement by the plan; `zero3` where nothing can be planned."""
    ranks = len(nodes.node_of)
    try:
        # The plan is of nodes like these alone.
        of_node = nodes.copies_per_node(recipe.tensor_parallel)
        if (_teacher(recipe).shard_over is None
                and of_node == data_parallel_size(recipe, ranks)):
            return ChosenPlacement("zero3", None, "all ranks share a node")
        device = local_device(ranks // nodes.count)
        if device is None:
            return ChosenPlacement("zero3", None, "nothing is known of this GPU to plan by")
        return choose_placement(recipe, nodes.count, ranks, device)
    except InputError as error:
        # Irregular nodes, or a model that cannot be planned.
        return ChosenPlacement("zero3", None, error.found)


def _teacher(recipe: Recipe) -> Teacher:
    assert recipe.teacher is not None
    return recipe.teacher
