"""DeepSpeed's AutoTP: the bodies of an engine's models split over the tensor-parallel ranks.

It is run before the engine is made, because it splits weights on the meta device too: they are
then read split (engine/sharding.py), and no rank ever gathers a layer to cut it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from amid_ds.distributed.world import World
from amid_ds.engine.backend import import_deepspeed
from amid_ds.models.delta import parts_of
from amid_ds.models.distiller import Distiller
from amid_ds.models.tensor_parallel import LayerSpec, layer_specs, tp_unsupported_reason

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
    gathered, split and partitioned again.
    """

    def __init__(self, distiller: Distiller, world: World) -> None:
        from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
        from deepspeed.module_inject import set_autotp_mode
        from deepspeed.module_inject.auto_tp import AutoTP
        from deepspeed.module_inject.autotp_config import AutoTPConfig
        from deepspeed.module_inject.layers import collect_autotp_universal_checkpoint_info

        set_autotp_mode(training=True)
        specs = AutoTPConfig.from_dict({"tp_size": world.tp_size, "use_default_specs": False,
                                        "layer_specs": _specs(distiller, world)})
        # As DeepSpeed's engine makes it for specs of one's own.
        self._autotp = AutoTP(module=distiller, all_reduce_linears=(), prefix="", state_dict=None,
                              linear_layer_setting=(nn.Linear, nn.Embedding), orig_layer_impl=None,
                              partition_config=specs, training_mode=True)
        self._autotp.set_tensor_parallel_config(world.tp_size, world.tp_group)
        self._autotp.update_linear_policies()
        with _adapters_opened(), _partitioned_layer_by_layer(distiller):
            self._autotp._replace_module(distiller)
        setattr(distiller, UNIVERSAL_CHECKPOINT_INFO,
                collect_autotp_universal_checkpoint_info(distiller))
        # DeepSpeed's engine then splits nothing.
        distiller.ds_autotp_parsed = True   # type: ignore[assignment]
        self._distiller = distiller

    def sum_gradients(self) -> None:
        """Let the gradients of weights that work on split heads be summed over the group.

        Called once every parameter is the one that trains.
        """
        self._autotp.register_replicated_grad_hooks(self._distiller)


def own_part(parameter: Any) -> tuple[int, int, int] | None:
    """(dimension, start, stop): what AutoTP, or the head's cut, has left this rank of a weight.

    None: all of it.
    """
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
    from deepspeed.utils import groups

    for mark in ("head_rows", "expert_rows"):
        if hasattr(parameter, mark):
            return 0, *getattr(parameter, mark)
    split = getattr(parameter, DS_AUTOTP_UC_META, None)
    if split is None or split["partition_sizes"] is None:
        return None
    sizes, rank = split["partition_sizes"], groups.get_tensor_model_parallel_rank()
    return split["partition_dim"], sum(sizes[:rank]), sum(sizes[:rank + 1])


def _specs(distiller: Distiller, world: World) -> list[LayerSpec]:
    """The weights of both bodies that AutoTP splits."""
    specs = []
    # A replicated teacher is no submodule, and stays whole by request.
    whole = distiller.student, *(parts_of(distiller.teacher) if "teacher" in distiller._modules
                                 else [])
    for name, model in ((name, model) for name, model in distiller.named_modules()
                        if any(model is each for each in whole)):
        reason = tp_unsupported_reason(model, world.tp_size)
        if reason is None:
            specs += layer_specs(model, name)
        else:
            logger.info("tensor_parallel %d: the %s's body stays whole on every rank, "
                        "its head is split: %s", world.tp_size, name, reason)
    return specs


@contextlib.contextmanager
def _adapters_opened() -> Iterator[None]:
    """A context in which AutoTP looks for layers to split inside an adapted one.

    It stops at what has a weight, and an adapted layer has its base layer's.
    """
    from deepspeed.module_inject.auto_tp import AutoTP

    replace_layer = AutoTP._replace_with_config

    def replace(autotp: Any, child: nn.Module, name: str) -> nn.Module:
        if not hasattr(child, "base_layer"):
            layer: nn.Module = replace_layer(autotp, child, name)
            return layer
        parent, _, own = name.rpartition(".")
        autotp._replace_module(child, own, parent)
        return child

    AutoTP._replace_with_config = replace
    try:
        yield
    finally:
        AutoTP._replace_with_config = replace_layer


@contextlib.contextmanager
def _partitioned_layer_by_layer(distiller: Distiller) -> Iterator[None]:
    """A context in which ZeRO-3 partitions AutoTP's part of a layer before it gathers the next.

    By itself DeepSpeed partitions all of them at the end, and a rank holds its whole
    tensor-parallel share of both models until then. Without a weight of ZeRO-3's it does nothing.
    """
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.utils import groups

    partitioned: Any = next((p for p in distiller.parameters() if hasattr(p, "ds_id")), None)
    if partitioned is None:
        yield
        return
    replace_layer = AutoTP._replace_with_config

    def replace(autotp: Any, child: nn.Module, name: str) -> nn.Module:
        before: list[Any] = [p for p in child.parameters(recurse=False) if hasattr(p, "ds_id")]
        layer: nn.Module = replace_layer(autotp, child, name)
        if not before:
            return layer
        if layer is not child:
            for parameter in before:
                # AutoTP keeps the parameter to identify it by; its data would stay with it.
                parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
        fresh: list[Any] = [p for p in layer.parameters(recurse=False) if not hasattr(p, "ds_id")]
        for parameter in fresh:
            parameter.ds_zero_partition_process_group = groups.get_data_parallel_group()
        partitioned.convert_to_zero_parameters(param_list=fresh)
        return layer

    AutoTP._replace_with_config = replace
    try:
        yield
    finally:
        AutoTP._replace_with_config = replace_layer
