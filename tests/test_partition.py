"""Each rank reads its own part of a model, bit for bit what transformers and DeepSpeed give it."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import Ranks, world_main
from torch import Tensor

from amid_ds.config.recipe import Teacher
from amid_ds.distributed.nodes import ShardGroups
from amid_ds.distributed.world import World
from amid_ds.engine import sharding
from amid_ds.models.loading import load_causal_lm

FAMILIES = ["llama", "llama-tied", "qwen3", "mistral", "gemma3", "gemma2", "qwen2-tied", "gpt2"]
# Some of the tiny models' parameters persist, and some do not.
ZERO_3 = {"train_micro_batch_size_per_gpu": 1,
          "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}


def read_model(folder: str, dtype: str, config: dict, world: World,
               shards: ShardGroups | None = None) -> Any:
    source = Teacher(model=folder, dtype=dtype)
    return sharding.open_model(source, dtype, config, world, shards).read(world)


def own_elements(parameter: Any) -> Tensor:
    """This rank's partition of a parameter, without what pads the last one."""
    start = len(parameter.ds_tensor) * dist.get_rank(parameter.ds_process_group)
    return parameter.ds_tensor[:max(0, parameter.ds_numel - start)]


def facts(parameter: Any) -> tuple[object, ...]:
    """What DeepSpeed knows of a parameter, beside its values."""
    return (parameter.ds_shape, parameter.ds_numel, parameter.ds_numel_aligned, parameter.ds_status,
            parameter.ds_persist, parameter.ds_tensor.shape, parameter.ds_tensor.dtype,
            parameter.ds_tensor.device, parameter.ds_tensor.ds_numel, parameter.ds_tensor.status,
            parameter.ds_tensor.requires_grad, parameter.requires_grad, parameter.dtype,
            parameter.shape, parameter.device, dist.get_process_group_ranks(
                parameter.ds_process_group), type(parameter))


def same_as_transformers(world: World, config: str, *models: str) -> None:
    """Run by every rank: hold each of `models` (a folder:dtype) against from_pretrained's."""
    for model in models:
        folder, dtype = model.rsplit(":", 1)
        ours = read_model(folder, dtype, json.loads(config), world)
        theirs: Any = load_causal_lm(folder, dtype, json.loads(config))
        named, expected = (dict(each.named_parameters(remove_duplicate=False))
                           for each in (ours, theirs))
        assert list(named) == list(expected)
        assert len({*map(id, named.values())}) == len({*map(id, expected.values())}), "ties"
        for name, parameter in named.items():
            assert facts(parameter) == facts(expected[name]), (model, name)
            assert torch.equal(own_elements(parameter), own_elements(expected[name])), (model, name)
            second, other = (each.ds_secondary_tensor for each in (parameter, expected[name]))
            assert (second is None) == (other is None)
            assert second is None or torch.equal(second, other), (model, name)
        buffers = dict(theirs.named_buffers())
        for name, buffer in ours.named_buffers():
            assert buffer.dtype == buffers[name].dtype, (model, name)
            assert torch.equal(buffer, buffers.pop(name)), (model, name)
        assert not buffers
        for each in ("config", "generation_config"):
            assert getattr(ours, each).to_dict() == getattr(theirs, each).to_dict()
        assert ours.config._attn_implementation == theirs.config._attn_implementation
        assert not ours.training


def run_world(ranks: int, work: Any, *arguments: object) -> None:
    started = Ranks(ranks, *arguments, target=functools.partial(world_main, work))
    statuses = started.wait(300)
    assert statuses == [0] * ranks, "\n".join(started.output(rank) for rank in range(ranks))


def test_partitions_are_those_that_from_pretrained_under_zero_3_gives(shared_model):
    models = [f"{shared_model(family)}:{('fp32', 'bf16')[number % 2]}"
              for number, family in enumerate(FAMILIES)]
    run_world(3, same_as_transformers, json.dumps(ZERO_3), *models)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_so_they_are_for_every_family_dtype_and_number_of_ranks(ranks, shared_model):
    models = [f"{shared_model(family)}:{dtype}"
              for family in FAMILIES for dtype in ("fp32", "bf16")]
    run_world(ranks, same_as_transformers, json.dumps(ZERO_3), *models)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [{"zero_hpz_partition_size": 2},
                                  {"offload_param": {"device": "cpu", "pin_memory": False}}])
def test_so_they_are_with_secondary_partitions_and_offloaded(zero, shared_model):
    config = {**ZERO_3, "zero_optimization": {**ZERO_3["zero_optimization"], **zero}}
    models = [f"{shared_model(family)}:bf16" for family in ("llama", "qwen2-tied")]
    run_world(4, same_as_transformers, json.dumps(config), *models)
