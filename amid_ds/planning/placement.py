"""The placement of the teacher that `auto` stands for."""

from __future__ import annotations

from dataclasses import dataclass

from amid_ds.config.recipe import Recipe
from amid_ds.planning.devices import Device


@dataclass(frozen=True)
class ChosenPlacement:
    """A placement of the teacher; shard_over: the data-parallel ranks over which `node` shards it.
    """

    placement: str
    shard_over: int | None
    reason: str


def choose_placement(recipe: Recipe, nodes: int, ranks: int, device: Device) -> ChosenPlacement:
    """The placement for `recipe` on `ranks` ranks of `device`, on so many nodes."""
    assert recipe.teacher is not None
    shard_over = recipe.teacher.shard_over or ranks // recipe.tensor_parallel // nodes
    if nodes == 1 and recipe.teacher.shard_over is None:
        return ChosenPlacement("zero3", None, "one node")
    return ChosenPlacement("node", shard_over, "several nodes")
