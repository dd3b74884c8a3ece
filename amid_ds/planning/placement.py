"""Where the teacher lies: what each placement costs, and the one that `auto` takes.

A frozen teacher needs no gradients reduced, so it may be sharded over fewer ranks than the student:
that takes memory, and saves bytes between nodes and hops of the gathers' rings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from amid_ds.config.recipe import Recipe
from amid_ds.planning.memory import fits, memory_per_rank
from amid_ds.planning.network import step_traffic
from amid_ds.planning.setting import (
    Placement,
    PlacementName,
    Setting,
    ranks_of_shard,
    with_placement,
)
from amid_ds.planning.step_time import PartSeconds, step_time

# Steps that differ by less, as a share or in seconds, take the same time: a plan is not finer.
SAME_SHARE = 0.02
SAME_SECONDS = 1e-3


@dataclass(frozen=True)
class ChosenPlacement:
    """A placement, the data-parallel ranks of `node` (None for the others), and why."""

    placement: PlacementName
    shard_over: int | None
    reason: str

    def __str__(self) -> str:
        over = ("" if self.shard_over is None else
                f" over {self.shard_over} data-parallel rank{'s' * (self.shard_over > 1)}")
        return f"{self.placement}{over}: {self.reason}"


@dataclass(frozen=True)
class PlacementCosts:
    """What one placement of the teacher takes on each rank.

    Bytes: memory, and what the teacher's gathers receive in a step from neighbours and from other
    nodes; seconds, their parts and `binds` as `StepTime` has them.
    """

    placement: PlacementName
    shard_over: int
    memory: int
    from_neighbours: int
    from_other_nodes: int
    seconds: float
    parts: PartSeconds
    binds: str
    fits: bool


def settled_placement(recipe: Recipe, zero_stage: int, data_parallel: int,
                      copies_per_node: Callable[[], int]) -> ChosenPlacement | None:
    """The placement where nothing needs to be planned; None for `auto` where there is a choice.

    recipe: with a teacher. copies_per_node: the data-parallel ranks of a node, asked for where they
    matter; what it raises is raised.
    """
    teacher = recipe.live_teacher
    assert teacher is not None
    if teacher.placement in ("zero3", "replicated"):
        return ChosenPlacement(teacher.placement, None, "the recipe says so")
    if zero_stage < 3:
        return ChosenPlacement("zero3", None, "below ZeRO stage 3 nothing shards the teacher")
    # For `auto` asked in any case: the plan is of nodes that are alike.
    of_node = None if teacher.placement == "node" and teacher.shard_over else copies_per_node()
    over = teacher.shard_over or of_node
    if over == data_parallel:
        where = "all ranks share a node" if teacher.shard_over is None else f"{over} are all ranks"
        return ChosenPlacement("zero3", None, where)
    if teacher.placement == "node":
        return ChosenPlacement("node", over, "the recipe says so")
    return None


def choose_placement(setting: Setting) -> ChosenPlacement:
    """The recipe's placement, or for `auto` the fastest that fits, in a setting of any placement.

    Where steps take the same time, the one with fewer bytes between nodes, then with less memory.
    """
    if setting.teacher is None:
        return ChosenPlacement("zero3", None, "no step needs a teacher")
    if setting.recipe.live_teacher is None:
        return ChosenPlacement("zero3", None, "it is partitioned as the student is")
    settled = settled_placement(
        setting.recipe, setting.zero.stage, setting.data_parallel,
        lambda: ranks_of_shard(setting.recipe, setting.data_parallel, setting.ranks_per_node))
    if settled is not None:
        return settled
    costs = placement_costs(setting)
    fitting = [each for each in costs if each.fits]
    if not fitting:
        return ChosenPlacement("zero3", None, "none fits, and it needs the least memory")
    fastest = min(each.seconds for each in fitting)
    longest = max(fastest * (1 + SAME_SHARE), fastest + SAME_SECONDS)
    best = min((each for each in fitting if each.seconds <= longest),
               key=lambda each: (each.from_other_nodes, each.memory))
    return ChosenPlacement(best.placement, best.shard_over if best.placement == "node" else None,
                           _reason(best, costs))


def placed(setting: Setting, chosen: ChosenPlacement) -> Setting:
    """`setting` with its teacher as chosen."""
    over = {"zero3": setting.data_parallel, "node": chosen.shard_over or 1, "replicated": 1}
    return with_placement(setting, Placement(chosen.placement, over[chosen.placement]))


def placement_costs(setting: Setting) -> list[PlacementCosts]:
    """The costs of each placement that the layout may have, each once; [] without a teacher.

    [] too for the student's running mean, which lies as the student does.
    """
    if setting.teacher is None or setting.recipe.live_teacher is None:
        return []
    return [costs_of(with_placement(setting, placement)) for placement in _placements(setting)]


def _placements(setting: Setting) -> Iterator[Placement]:
    """Those that differ: a node that holds all ranks is zero3, one of a single rank replicated.

    Below ZeRO stage 3 nothing is sharded over a node.
    """
    recipe, data_parallel = setting.recipe, setting.data_parallel
    yield Placement("zero3", data_parallel)
    over = ranks_of_shard(recipe, data_parallel, setting.ranks_per_node)
    regular = (data_parallel % over == 0 and setting.ranks % setting.nodes == 0
               and over % recipe.expert_parallel == 0)
    if (setting.zero.stage == 3 and regular and over < data_parallel
            and over * setting.tensor_parallel > 1):
        yield Placement("node", over)
    yield Placement("replicated", 1)


def costs_of(setting: Setting) -> PlacementCosts:
    """The costs of the setting's own placement; there is a teacher."""
    memory, time = memory_per_rank(setting), step_time(setting)
    gathers = step_traffic(setting)["teacher"]["teacher_gathers"]
    return PlacementCosts(
        placement=setting.placement.name, shard_over=setting.placement.shard_over,
        memory=memory["total"], from_neighbours=int(gathers.inside),
        from_other_nodes=int(gathers.between), seconds=time.seconds, parts=time.parts,
        binds=time.binds, fits=fits(setting, memory))


def _reason(best: PlacementCosts, costs: Sequence[PlacementCosts]) -> str:
    """The seconds of the best one, and what of each other one is worse."""
    others = ", ".join(f"{each.placement} {_compared(each)}" for each in costs if each is not best)
    return f"{_compared(best)}; {others}"


def _compared(costs: PlacementCosts) -> str:
    if not costs.fits:
        return f"does not fit ({costs.memory / 1e9:,.1f} GB a rank)"
    return (f"{costs.seconds:,.3g} s a step, {costs.from_other_nodes / 1e9:,.3g} GB of the teacher "
            f"from other nodes, {costs.memory / 1e9:,.1f} GB a rank")
