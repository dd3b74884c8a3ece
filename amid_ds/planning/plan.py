"""The plan of `amid-ds plan`: an estimate, the data's epochs and remedies where it does not fit."""

from __future__ import annotations

from dataclasses import replace

from amid_ds.config.recipe import Recipe
from amid_ds.data import planned_epochs, with_steps
from amid_ds.planning.devices import Device, require_ranks
from amid_ds.planning.estimate import Plan, estimate_plan
from amid_ds.planning.reading import STORAGE_BANDWIDTH
from amid_ds.planning.remedies import find_remedies


def make_plan(recipe: Recipe, nodes: int, ranks_per_node: int, device: Device,
              storage_bandwidth: float = STORAGE_BANDWIDTH) -> Plan:
    """The plan of `recipe` on nodes x ranks_per_node ranks of `device`.

    storage_bandwidth: bytes/s of the models' files that a node reads at the start. Where the recipe
    names epochs, the steps are counted in the prepared data. Raises InputError for a layout that
    cannot be, for prepared data that are damaged, and for a model that does not run on torch's meta
    device.
    """
    require_ranks(nodes, ranks_per_node)
    recipe = with_steps(recipe)
    plan = estimate_plan(recipe, nodes, nodes * ranks_per_node, device, storage_bandwidth)
    epochs = None
    if plan.steps is not None:
        epochs = planned_epochs(recipe, plan.steps * recipe.train.global_batch_size)
    remedies = [] if plan.fits else find_remedies(recipe, nodes, plan)
    return replace(plan, epochs=epochs, remedies=remedies)
