"""The layers of a split body: what tensor parallelism adds to a layer of which a rank has a part.

A layer stays the object that it was, with the names of its parameters and its hooks; its class
becomes one that sums, joins or cuts before or after what the layer did before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amid_ds.distributed.tensor_group import Peers
from amid_ds.models.shape import text_config
from amid_ds.models.tp_plan import OUTPUT_BIAS, PartCut, Role, SplitBlock, part_of


class _ColumnLinear(nn.Linear):
    """Some of a linear layer's outputs, or all of them joined."""

    peers: Peers
    joins = False

    def forward(self, input: Tensor) -> Tensor:
        output = functional.linear(self.peers.enter(input), self.weight, self.bias)
        return self.peers.joined(output) if self.joins else output


class _JoinedLinear(_ColumnLinear):
    joins = True


class _RowLinear(nn.Linear):
    """A linear layer's outputs, from this rank's part of the input."""

    peers: Peers
    takes_own = False

    def forward(self, input: Tensor) -> Tensor:
        own = self.peers.own(input) if self.takes_own else input
        output = self.peers.total(functional.linear(own, self.weight))
        return output if self.bias is None else output + self.bias


class _OwnRowLinear(_RowLinear):
    takes_own = True


class _Latent(nn.Module):
    """The joint projection of a latent attention: its last outputs go to every head as they are."""

    peers: Peers
    to_heads: int

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        latent, shared = output.split([output.shape[-1] - self.to_heads, self.to_heads], -1)
        return torch.cat([latent, self.peers.enter(shared)], -1)


class _Experts(nn.Module):
    """A layer's experts, each split within. What comes in is whole: hidden states and the weights
    of the experts chosen, both of which have a gradient."""

    peers: Peers

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        output = super().forward(
            *(self._entered(each) for each in inputs),
            **{name: self._entered(each) for name, each in options.items()})
        return self.peers.total(output)

    def _entered(self, value: Any) -> Any:
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        return self.peers.enter(value) if is_number else value


class _BiasedExperts(_Experts):
    """Experts that each add a bias to their output: every rank does, and it counts once."""

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        entered = self._entered(weights)
        output = super(_Experts, self).forward(
            self._entered(hidden_states), chosen, entered)
        partial = output - self._bias(chosen, entered, output)
        return self.peers.total(partial) + self._bias(chosen, weights, output)

    def _bias(self, chosen: Tensor, weights: Tensor, output: Tensor) -> Tensor:
        bias: Tensor = getattr(self, OUTPUT_BIAS)
        by_expert = weights.new_zeros(len(weights), len(bias)).scatter_add(1, chosen, weights)
        return (by_expert.to(bias.dtype) @ bias).to(output.dtype).view_as(output)


class _IdentityExpert(nn.Module):
    """An expert that every rank has whole among those that are summed."""

    peers: Peers

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input / self.peers.size)


_CLASSES: dict[Role, type[nn.Module]] = {
    "column": _ColumnLinear, "column joined": _JoinedLinear, "row": _RowLinear,
    "row of own": _OwnRowLinear, "latent": _Latent, "experts": _Experts,
    "identity": _IdentityExpert}
# By what is added to a layer's class, and that class.
_made_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


@dataclass(frozen=True)
class Split:
    """How a model is split, at its attribute `split`."""

    blocks: list[SplitBlock]
    peers: Peers


def cut_in_memory(parameter: nn.Parameter, cut: PartCut, peers: Peers) -> nn.Parameter:
    """This rank's part of a whole parameter, as a new one."""
    ranges = cut.ranges(parameter.shape[cut.dim], peers.rank, peers.size)
    return nn.Parameter(part_of(parameter.data, cut.dim, ranges).clone(),
                        requires_grad=parameter.requires_grad)


def split_blocks(model: nn.Module, blocks: list[SplitBlock], peers: Peers,
                 cut: Callable[[nn.Parameter, PartCut, Peers], nn.Parameter] = cut_in_memory
                 ) -> None:
    """Split `blocks` of a causal LM, in place, those that stay whole excepted.

    cut: makes this rank's part of a parameter. It may be collective: parameters come in the same
    order on every rank.
    """
    for block in blocks:
        if block.whole is not None:
            continue
        for name, each in block.cuts.items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, key, cut(module.get_parameter(key), each, peers))
        for name, role in block.roles.items():
            _give_role(model.get_submodule(name), role, peers, model)
    model.split = Split(blocks, peers)   # type: ignore[assignment]


def _give_role(module: Any, role: Role, peers: Peers, model: nn.Module) -> None:
    mixin = _CLASSES[role]
    if role == "experts" and getattr(module, OUTPUT_BIAS, None) is not None:
        mixin = _BiasedExperts
    if role == "latent":
        module.to_heads = text_config(model).qk_rope_head_dim
    module.peers = peers
    module.whole_class = type(module)
    module.__class__ = _split_class(mixin, type(module))


def _split_class(mixin: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """A class that has both, and the name of a layer's own."""
    if issubclass(mixin, own):
        return mixin
    if (mixin, own) not in _made_classes:
        _made_classes[mixin, own] = type(own.__name__, (mixin, own), {"__module__": own.__module__})
    return _made_classes[mixin, own]


def sum_gradients(model: nn.Module) -> None:
    """Let the gradients of a split model's whole weights on split heads be summed over the group.

    Called once every parameter is the one that trains.
    """
    split: Split = model.split   # type: ignore[assignment]
    for block in split.blocks:
        for name in block.summed if block.whole is None else []:
            parameter = model.get_parameter(name)
            if parameter.requires_grad:
                parameter.register_hook(split.peers.add)
