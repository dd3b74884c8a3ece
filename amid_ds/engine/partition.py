"""ZeRO-3 partitions that each rank fills itself: no weight is ever whole, and nothing is sent.

transformers loads a model under ZeRO-3 on one rank, which sends every weight to all. Here the model
is built on the meta device, DeepSpeed is given a partition of each weight, and says which range of
the weight it is: the rank reads that range and no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from amid_ds.distributed.nodes import ShardGroups
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.ds_config import DeepSpeedConfig


class OwnRange(NamedTuple):
    """`values` [n] is to hold the elements from `start` on of a flattened parameter (on this
    tensor-parallel rank), and zeros beyond its end."""

    parameter: nn.Parameter
    start: int
    values: Tensor


def replace_parameters(model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put what `make` returns in place of every parameter of `model`, of a shared one once."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = make(parameter)
            module._parameters[key] = made[id(parameter)]


def partition_parameters(model: nn.Module, config: DeepSpeedConfig,
                         shards: ShardGroups | None = None) -> list[OwnRange]:
    """Make every meta parameter of `model` one of ZeRO-3, in place; returns what is to be filled.

    config: DeepSpeed's, with bf16 as the weights are to have it. shards: the ranks that they lie
    over; None: all. What tensor parallelism has split lies over the ranks with the same part. A
    parameter keeps its attributes. Secondary partitions (hpZ) are left to DeepSpeed, which makes
    them at the first gather. No collective, except that it makes their groups, where the config
    asks for them.
    """
    import_deepspeed()
    from deepspeed.runtime.zero.partition_parameters import Init

    init = Init(data_parallel_group=None if shards is None else shards.whole,
                config_dict_or_path=dict(config))
    ranges: list[OwnRange] = []

    def make(meta: nn.Parameter) -> nn.Parameter:
        parameter = _declare(meta, init, shards)
        ranges.append(_allocate(parameter, init))
        return parameter

    replace_parameters(model, make)
    if init.mem_efficient_linear:
        init._enable_mem_efficient_linear()
    init._keep_in_fp32(model)
    return ranges


@torch.no_grad()
def move_partitions(model: nn.Module, config: DeepSpeedConfig, shards: ShardGroups) -> None:
    """Partition over `shards` the weights of `model`, in place, which lie over all ranks or, once
    cut, whole on each.

    Collective: each weight is gathered once, one after the other, and the lowest rank of each group
    sends it to the group.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    init = Init(data_parallel_group=shards.whole, config_dict_or_path=dict(config))
    replace_parameters(model, lambda parameter: _moved(parameter, init, shards))


def _moved(parameter: Any, init: Any, shards: ShardGroups) -> nn.Parameter:
    with import_deepspeed().zero.GatheredParameters([parameter]):
        moved: Any = nn.Parameter(parameter.data.clone(), requires_grad=parameter.requires_grad)
    vars(moved).update({name: value for name, value in vars(parameter).items()
                        if not name.startswith("ds_")})
    if hasattr(parameter, "tensor_model_parallel"):
        moved.ds_zero_partition_process_group = shards.split
    init._convert_to_zero_parameters([moved])
    return cast(nn.Parameter, moved)


def _declare(meta: nn.Parameter, init: Any, shards: ShardGroups | None) -> nn.Parameter:
    """A parameter of the shape of `meta` that DeepSpeed knows, and that has no memory."""
    from deepspeed.utils import groups

    hollow = torch.empty(1, dtype=init.dtype, device=init.local_device).expand(meta.shape)
    parameter: Any = nn.Parameter(hollow, requires_grad=meta.requires_grad)
    vars(parameter).update(vars(meta))
    if hasattr(meta, "tensor_model_parallel"):
        parameter.ds_zero_partition_process_group = (
            groups.get_data_parallel_group() if shards is None else shards.split)
    init._convert_to_deepspeed_param(parameter)
    return parameter


def _allocate(parameter: Any, init: Any) -> OwnRange:
    """Give `parameter` its partition on this rank, as DeepSpeed's `_partition_param` leaves it."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.ds_numel_aligned = init._aligned_size(parameter)
    size = parameter.ds_numel_aligned // init._partition_world_size(parameter)
    parameter.ds_tensor = _new_partition(
        size, init, init.local_device if parameter.ds_persist else init.remote_device)
    parameter.data = torch.empty(0, dtype=init.dtype, device=init.local_device)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    return OwnRange(parameter, size * init._partition_rank(parameter), parameter.ds_tensor)


def _new_partition(size: int, init: Any, device: Any) -> Tensor:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    own: Any = torch.empty(size, dtype=init.dtype, device=device)
    if init.pin_memory and own.device.type == "cpu":
        own = get_accelerator().pin_memory(own)
    own.ds_numel, own.status, own.final_location = size, PartitionedParamStatus.AVAILABLE, None
    return own
