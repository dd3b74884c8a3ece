"""Where the teacher lies on the ranks of this start.

It changes no number, so that each start of a run decides anew, by the nodes and GPUs that it has.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from amid_ds.config.recipe import Recipe
from amid_ds.distributed.nodes import Nodes, find_nodes
from amid_ds.distributed.world import World
from amid_ds.engine.ds_config import data_parallel_size, secondary_ranks, zero_stage
from amid_ds.errors import InputError
from amid_ds.planning.devices import local_device
from amid_ds.planning.placement import ChosenPlacement, choose_placement, settled_placement
from amid_ds.planning.setting import make_setting
from amid_ds.training.job import Job

logger = logging.getLogger(__name__)


def place_teacher(job: Job, world: World) -> Job:
    """The job with its teacher's placement on these ranks and nodes, which it logs. Collective.

    Rank 0 decides. Raises InputError where the recipe asks for `node` and the nodes' ranks do not
    allow it.
    """
    if job.recipe.live_teacher is None:
        return job

    def place() -> ChosenPlacement:
        nodes = find_nodes(world)
        _warn_of_wide_copies(job, nodes)
        return _placement(job, nodes)

    chosen = world.run_on_main(place)
    logger.info("teacher.placement: %s", chosen)
    return replace(job, placement=chosen)


def _warn_of_wide_copies(job: Job, nodes: Nodes) -> None:
    """Say so where the student's second copies (hpZ) do not save what they are for."""
    ranks = secondary_ranks(job.deepspeed_config)
    if not nodes.hold_groups_of(ranks):
        logger.warning("zero_hpz_partition_size %d: so many neighbouring ranks do not share a node,"
                       " and what they gather from one another goes between nodes; set it to the "
                       "ranks of a node, neighbours on it", ranks)


def _with_warning(chosen: ChosenPlacement, recipe: Recipe, nodes: Nodes) -> ChosenPlacement:
    """`chosen`, its reason with a remark where the ranks that share a copy share no node."""
    over = chosen.shard_over
    if over is None or nodes.hold_groups_of(over * recipe.tensor_parallel):
        return chosen
    return replace(chosen, reason=f"{chosen.reason}; so many neighbours do not share a node, and "
                                  "exchange it between nodes")


def _placement(job: Job, nodes: Nodes) -> ChosenPlacement:
    """The recipe's own placement, or the one that `auto` stands for here."""
    recipe, ranks = job.recipe, len(nodes.node_of)
    assert recipe.live_teacher is not None
    try:
        settled = settled_placement(recipe, zero_stage(job.deepspeed_config),
                                    data_parallel_size(recipe, ranks),
                                    lambda: nodes.copies_per_node(recipe.tensor_parallel))
        if settled is not None:
            return _with_warning(settled, recipe, nodes)
        device = local_device(ranks // nodes.count)
        if device is None:
            return ChosenPlacement("zero3", None, "nothing is known of this GPU to plan by")
        return choose_placement(make_setting(recipe, ranks, device, nodes.count))
    except InputError as error:
        if recipe.live_teacher.placement == "node":
            raise
        # Irregular nodes, or a model that cannot be planned.
        return ChosenPlacement("zero3", None, error.found)
