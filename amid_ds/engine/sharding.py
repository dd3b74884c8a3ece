"""Models that are shaped first and read afterwards, each rank its own ranges of their weights.

While a model has no memory, its head is cut and its body split (engine/body_split.py) at no cost;
then its parameters become ZeRO-3's partitions, and each rank reads what it holds from the files. A
model whose files cannot be read so is loaded by transformers, and is whole here from the start.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amid_ds.config.recipe import Dtype, Student, Teacher
from amid_ds.distributed.nodes import ShardGroups
from amid_ds.distributed.world import World
from amid_ds.engine.body_split import own_part, own_ranges
from amid_ds.engine.ds_config import DeepSpeedConfig, sharded_loading, zero_stage
from amid_ds.engine.partition import (
    OwnRange,
    move_partitions,
    partition_parameters,
    replace_parameters,
)
from amid_ds.models.adapters import FirstValues, stored_name
from amid_ds.models.hollow import hollow_causal_lm
from amid_ds.models.loading import DTYPES, checkpoint_dtype, load_causal_lm, open_weights
from amid_ds.models.weight_reader import ParameterSource, WeightReader
from amid_ds.models.weights import refuse_other_keys
from amid_ds.run.reading import ReadingProgress

logger = logging.getLogger(__name__)


@dataclass
class OpenModel:
    """A causal LM of which nothing has been read yet, or one that transformers has loaded.

    config: DeepSpeed's, with bf16 as the weights are to have it. shards: the ranks that ZeRO-3
    shards it over; None: all. weights: of its files; None: they are not to be read. zeros: what
    trains is to be zeros, and of its files buffers and frozen parameters alone count. first: of
    parameters that no file holds, what makes their first values.
    """

    module: nn.Module
    config: DeepSpeedConfig
    shards: ShardGroups | None = None
    weights: WeightReader | None = None
    zeros: bool = False
    first: FirstValues = field(default_factory=dict)

    def read(self, world: World) -> nn.Module:
        """The model with its weights, at ZeRO stage 3 this rank's partitions of them.

        Nothing is sent but the agreement, by all ranks and at the end, that each has read what it
        holds, except where transformers has loaded it. Raises InputError.
        """
        if not any(parameter.is_meta for parameter in self.module.parameters()):
            for name, value in self.first.items():
                parameter = self.module.get_parameter(name)
                parameter.data.copy_(own_part(parameter, value()))
            if self.shards is not None:
                move_partitions(self.module, self.config, self.shards)
            return self.module
        sharded = zero_stage(self.config) == 3
        ranges = (partition_parameters(self.module, self.config, self.shards) if sharded
                  else _whole_parameters(self.module))
        buffers = _place_buffers(self.module, world.device if sharded else torch.device("cpu"))
        world.run_checked(lambda: self._fill(ranges, buffers, world))
        return self.module

    def _fill(self, ranges: list[OwnRange], buffers: Mapping[str, Tensor], world: World) -> None:
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        stored = []
        for own in ranges:
            name = names[id(own.parameter)]
            if name in self.first:
                _set_range(own, own_part(own.parameter, self.first[name]()))
            elif self.zeros and own.parameter.requires_grad:
                own.values.zero_()
            else:
                stored.append(own)
        if self.weights is None:
            return
        reads = list(_reads(names, self.weights, stored, buffers))
        with self.weights as reader, contextlib.ExitStack() as stack:
            if stored:
                untied = reader.unequal_twins(world.rank, world.size)
                refuse_other_keys(_name(self.module), {"untied": untied})
                progress = stack.enter_context(_progress(self.module, reader, reads))
                reader.on_bytes = progress.add
            reader.fill(reads)


def open_causal_lm(source: Student | Teacher, dtype: Dtype, config: DeepSpeedConfig, world: World,
                   shards: ShardGroups | None = None, read: bool = True,
                   choose: Callable[[nn.Module], FirstValues] = lambda module: {}) -> OpenModel:
    """The model of `source`, ready to be shaped and then read. Its module is in eval mode.

    read: False: what trains will be zeros, for a checkpoint to replace, at any ZeRO stage; True: at
    stage 3. choose: freezes what does not train, and puts adapters there (models/trained.py).
    Collective: ranks agree on the files, and transformers sends what it must load. Raises
    InputError where the weights are not exactly those of the model's config.
    """
    torch_dtype = world.run_checked(
        lambda: DTYPES.get(dtype) or checkpoint_dtype(source.model, **source.hub_kwargs))
    config = {**config, "bf16": {"enabled": torch_dtype == torch.bfloat16}}

    def shaped() -> tuple[nn.Module, FirstValues]:
        module = hollow_causal_lm(source.model, torch_dtype, **source.hub_kwargs)
        return module, choose(module)

    weights = open_weights(source.model, **source.hub_kwargs, world=world) if read else None
    if not isinstance(weights, str):
        module, first = world.run_checked(shaped)
        if weights is None and _needs_files(module):
            weights = open_weights(source.model, **source.hub_kwargs, world=world)
    if not isinstance(weights, str):
        return OpenModel(module, config, shards, weights, zeros=not read, first=first)
    logger.info("transformers loads %s, %s: %s", source.model,
                "whole on every rank" if zero_stage(config) < 3 else "on rank 0 for all", weights)
    loaded = load_causal_lm(source.model, dtype, sharded_loading(config), **source.hub_kwargs)
    return OpenModel(loaded, config, shards, first=choose(loaded))


def _needs_files(module: nn.Module) -> bool:
    """True where a checkpoint does not have all of a hollow model that it resumes."""
    return (any(buffer.is_meta for buffer in module.buffers())
            or not all(parameter.requires_grad for parameter in module.parameters()))


def _progress(model: Any, reader: WeightReader,
              reads: Iterable[tuple[ParameterSource, int, Tensor]]) -> ReadingProgress:
    """The progress of these reads of a model's weights."""
    own = sum(max(0, min(len(out), source.numel() - start)) * source.dtype.itemsize
              for source, start, out in reads)
    # A tied one is there under each of its names.
    whole = sum(source.numel() * source.dtype.itemsize for source in set(reader.sources.values()))
    return ReadingProgress(_name(model), own, whole)


def _name(model: Any) -> str:
    """The folder or hub id that it comes from."""
    return str(model.config.name_or_path)


def _whole_parameters(model: nn.Module) -> list[OwnRange]:
    """Give every meta parameter of `model` memory on the CPU; returns them, to be filled."""
    ranges: list[OwnRange] = []

    def make(meta: nn.Parameter) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty_like(meta, device="cpu"),
                                 requires_grad=meta.requires_grad)
        # The marks of a split one among them.
        vars(parameter).update(vars(meta))
        ranges.append(OwnRange(parameter, 0, parameter.detach().view(-1)))
        return parameter

    replace_parameters(model, make)
    return ranges


def _place_buffers(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Move the buffers of `model` to `device`; returns, by name, those that are to be read."""
    stored = {}
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.is_meta:
                name = f"{prefix}.{key}" if prefix else key
                stored[name] = module._buffers[key] = torch.empty_like(buffer, device=device)
            else:
                module._buffers[key] = buffer.to(device)
    return stored


def _reads(names: Mapping[int, str], reader: WeightReader, ranges: Iterable[OwnRange],
           buffers: Mapping[str, Tensor]) -> Iterator[tuple[ParameterSource, int, Tensor]]:
    """(source, start, out) of each range and buffer: what `WeightReader.fill` takes.

    names: of the parameters, by their id().
    """
    for own in ranges:
        source = reader.sources[stored_name(names[id(own.parameter)])]
        place = own_ranges(own.parameter)
        yield source if place is None else source.parts(*place), own.start, own.values
    for name, buffer in buffers.items():
        yield reader.sources[stored_name(name)], 0, buffer.view(-1)


def _set_range(own: OwnRange, value: Tensor) -> None:
    """Fill a range from the value of its parameter on this tensor-parallel rank."""
    piece = value.flatten()[own.start:own.start + own.values.numel()]
    own.values.zero_()
    own.values[:piece.numel()].copy_(piece)
