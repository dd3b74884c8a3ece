"""The bodies of an engine's models split over the tensor-parallel ranks, by their plans.

It is done before the engine is made, on the meta device: the weights are then read split
(engine/sharding.py), and no rank ever gathers a layer to cut it. DeepSpeed's part is the groups,
the mark of a split weight, and the partitions over the ranks that have the same part.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from amid_ds.distributed.tensor_group import Peers
from amid_ds.distributed.world import World
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.gather import full_shape, models_in_engine
from amid_ds.errors import InputError
from amid_ds.models.distiller import Distiller
from amid_ds.models.split_check import split_problem
from amid_ds.models.tensor_parallel import mark_part, named_parts, whole_parts
from amid_ds.models.tp_layers import split_blocks, sum_gradients
from amid_ds.models.tp_plan import PartCut, SplitBlock, blocks_of, part_of

logger = logging.getLogger(__name__)


def make_tensor_parallel_groups(tp_size: int) -> None:
    """Make DeepSpeed's groups one by one. Collective.

    By itself it makes a mesh, which torch splits off a default group that is bound to a GPU in one
    act: with a warning, and with torch's own timeout in what gloo has of it.
    """
    from deepspeed.utils import groups

    # Takes up the default group, which it has not where no model was loaded sharded.
    import_deepspeed().init_distributed()
    groups._init_tp_groups_with_new_group(tp_size)


class BodySplit:
    """The bodies of `distiller`, whose heads are cut, split in place by their own plans.

    What is on the meta device stays there. Collective where a weight is ZeRO-3's already: it is
    gathered, cut and partitioned again, one after the other.
    """

    def __init__(self, distiller: Distiller, world: World) -> None:
        peers = Peers(world.tp_rank, world.tp_size, world.tp_group)
        models = models_in_engine(distiller)
        self._models = {name: model for name, model in distiller.named_modules()
                        if any(model is each for each in models)}
        for name, model in self._models.items():
            blocks = blocks_of(model, world.tp_size, full_shape)
            _say_what_stays_whole(model, name, blocks, world.tp_size)
            split_blocks(model, blocks, peers, _cut)
        # DeepSpeed's engine then splits nothing.
        distiller.ds_autotp_parsed = True   # type: ignore[assignment]

    def sum_gradients(self) -> None:
        """Let the gradients of weights that work on split heads be summed over the group.

        Called once every parameter is the one that trains.
        """
        for model in self._models.values():
            sum_gradients(model)


def check_split(model: nn.Module, title: str, input_ids: Tensor, world: World) -> None:
    """Refuse a split model of which a block is not what the whole one is. Collective.

    A layer's block is gathered whole on every rank for a moment, one of each kind. Raises
    InputError on all ranks.
    """
    def gathered(module: nn.Module) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = import_deepspeed().zero.GatheredParameters(
            list(module.parameters()))
        return context

    problem = split_problem(model, input_ids, gathered)

    def refuse() -> None:
        if problem is not None:
            raise InputError(
                f"split over {world.tp_size} ranks, {title} is not what it is whole: {problem}",
                "the same numbers and gradients as on one rank",
                "set tensor_parallel=1; the model's plan in transformers does not fit its code")

    world.run_checked(refuse)


def own_part(parameter: Any, whole: Tensor) -> Tensor:
    """What `own_ranges` says of a parameter, of its whole value."""
    place = own_ranges(parameter)
    return whole if place is None else part_of(whole, *place)


def own_ranges(parameter: Any) -> tuple[int, list[tuple[int, int]]] | None:
    """(dimension, [(start, stop)]): what this rank of a tensor-parallel or expert-parallel group
    holds of a weight; None: all."""
    if hasattr(parameter, "expert_rows"):
        return 0, [parameter.expert_rows]
    place: tuple[int, list[tuple[int, int]]] | None = getattr(parameter, "tp_part", None)
    return place


def _cut(parameter: Any, cut: PartCut, peers: Peers) -> nn.Parameter:
    """This rank's part of a parameter; of one of ZeRO-3's one of ZeRO-3's, over the ranks with the
    same part."""
    from deepspeed.utils import groups

    shape = full_shape(parameter)
    ranges = cut.ranges(shape[cut.dim], peers.rank, peers.size)
    with import_deepspeed().zero.GatheredParameters([parameter]):
        part: Any = nn.Parameter(part_of(parameter.data, cut.dim, ranges).clone(),
                                 requires_grad=parameter.requires_grad)
    mark_part(part, cut.dim, ranges)
    if hasattr(parameter, "ds_id"):
        part.ds_zero_partition_process_group = groups.get_data_parallel_group()
        parameter.convert_to_zero_parameters(param_list=[part])
    return part


def _say_what_stays_whole(model: nn.Module, name: str, blocks: list[SplitBlock],
                          tp_size: int) -> None:
    """Log which weights of a body every rank will hold whole, if they are a part worth naming."""
    whole = whole_parts(model, blocks, full_shape)
    total = sum(math.prod(full_shape(parameter)) for parameter in model.parameters())
    named = named_parts(whole, total)
    if named:
        logger.info("tensor_parallel %d: %.0f%% of the %s's weights stay whole on every rank, "
                    "which computes with them: %s", tp_size,
                    100 * sum(part.count for part in whole) / total, name,
                    "; ".join(map(str, named)))
