"""ZeRO-3 partitions that each rank fills itself: no rank ever holds a whole weight, nothing is sent.

transformers loads a model under ZeRO-3 on one rank, which sends every weight to all. Here the model
is built on the meta device, and each rank gives DeepSpeed its own range of each weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import (
    Init,
    PartitionedParamStatus,
    ZeroParamStatus,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

# Fills a flat tensor with the elements of the named weight from `start` on; zeros beyond its end.
Fill = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class PartitionGroups:
    """The ranks over which a model's weights lie; None: all ranks.

    whole: for weights that tensor parallelism leaves whole; split: for those that it splits.
    """

    whole: ProcessGroup | None = None
    split: ProcessGroup | None = None


class _FilledInit(Init):
    """DeepSpeed's zero.Init, whose partitions are filled and not cut from whole weights."""

    def partition(self, meta: nn.Parameter, fill: Callable[[int, Tensor], None]) -> nn.Parameter:
        """The ZeRO-3 parameter of `meta`, this rank's range of it filled by fill(start, range)."""
        # Of the whole shape, and of no size in memory.
        hollow = torch.empty(1, dtype=self.dtype, device=self.local_device).expand(meta.shape)
        parameter: Any = nn.Parameter(hollow, requires_grad=meta.requires_grad)
        self._convert_to_deepspeed_param(parameter)
        size = self._aligned_size(parameter) // self._partition_world_size(parameter)
        own: Any = torch.empty(size, dtype=self.dtype, device=self.remote_device)
        fill(size * self._partition_rank(parameter), own)
        own.ds_numel, own.status = size, PartitionedParamStatus.AVAILABLE
        own.final_location = None
        parameter.ds_tensor, parameter.ds_numel_aligned = own, self._aligned_size(parameter)
        parameter.data = torch.empty(0, dtype=self.dtype, device=self.local_device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        return parameter   # type: ignore[no-any-return]


def partition_parameters(model: nn.Module, config: dict[str, object], fill: Fill,
                         groups: PartitionGroups) -> None:
    """Make every meta parameter of `model` one of ZeRO-3, in place. No collective.

    config: the DeepSpeed config, with bf16 as the weights are to have it.
    """
    init = _FilledInit(data_parallel_group=groups.whole, config_dict_or_path=config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                name = names[id(parameter)]

                def fill_own(start: int, own: Tensor, name: str = name) -> None:
                    fill(name, start, own)

                made[id(parameter)] = init.partition(parameter, fill_own)
            module._parameters[key] = made[id(parameter)]
    init._enable_mem_efficient_linear()
