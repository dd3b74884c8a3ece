"""Experts that neighbouring ranks hold together: tokens travel to them, and their outputs back.

transformers' layers of experts have one interface, `experts(hidden_states, top_k_index,
top_k_weights)`. A rank of a group of N holds the N-th part of a layer's experts, and its module's
own forward, whatever the family, runs over the tokens that any rank of the group has for them. A
token goes once to a rank however many of its experts are there, with their numbers and weights; the
rank's share of its output comes back as one sum. So a rank sends at most min(N, chosen) times its
tokens, each way.

Every rank makes the same collectives whatever the tokens choose: five in a forward pass (how many
rows, their experts, states and weights, what comes back), three in a backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amid_ds.distributed.nodes import divisors
from amid_ds.distributed.rows import Route
from amid_ds.models.experts import ExpertLayer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# (hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]
ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]
ARGUMENTS = 3


def unsplittable_reason(model: nn.Module, layer: ExpertLayer, ranks: int) -> str | None:
    """The reason that a layer of experts cannot be distributed over `ranks`; None if it can.

    model: not yet partitioned.
    """
    experts: Any = model.get_submodule(layer.name)
    arguments = list(inspect.signature(experts.forward).parameters)
    if len(arguments) != ARGUMENTS:
        return (f"{layer.name} ({type(experts).__name__}) takes {', '.join(arguments)}, not hidden "
                "states, the experts of each and their weights")
    own = dict(experts.named_parameters(recurse=False))
    uncounted = [name for name, parameter in own.items() if len(parameter) != layer.experts]
    if getattr(experts, "num_experts", None) != layer.experts or not own or uncounted:
        return (f"{layer.name} ({type(experts).__name__}) does not hold {layer.experts} experts "
                f"along the first dimension of each of its weights")
    if layer.experts % ranks:
        return (f"{layer.name} has {layer.experts} experts: it must divide them, as "
                f"{divisors(layer.experts)} do")
    return None


def exchange_tokens(experts: Any, group: ProcessGroup) -> None:
    """Let a module of experts serve all ranks of `group`, each of which holds its part of them.

    experts: one for which there is no `unsplittable_reason`, its weights cut to this rank's part.
    """
    own = experts.num_experts // group.size()
    experts.num_experts = own
    experts.forward = _Exchanged(experts.forward, own, group)


class _Exchanged:
    """A layer's forward over the experts of all ranks of a group.

    forward: over the `own` experts that this rank holds.
    """

    def __init__(self, forward: ExpertsForward, own: int, group: ProcessGroup) -> None:
        self.forward, self.own, self.group = forward, own, group

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], experts of all [T, K], their weights [T, K] -> [T, H]."""
        chosen = top_k_index.shape[1]
        # [N, T, K]: the choices that each rank serves.
        ranks = torch.arange(self.group.size(), device=top_k_index.device)
        serves = top_k_index.div(self.own, rounding_mode="floor") == ranks[:, None, None]
        sent = serves.any(-1)
        rank, token = sent.nonzero(as_tuple=True)
        served = serves[rank, token]
        route = Route.of(sent.sum(-1), self.group)
        # Of a choice that another rank serves, `own`: no expert's number.
        numbers = (top_k_index[token] % self.own).masked_fill(~served, self.own)
        numbers, = route.carry(numbers)
        hidden, weights = route.carry(hidden_states[token], top_k_weights[token])
        outputs, = route.back().carry(self._serve(hidden, numbers, weights))
        # A token's sum in one order: index_add on a GPU has none.
        by_choice = outputs.new_zeros(len(hidden_states), chosen, outputs.shape[-1])
        by_choice[token, served.int().argmax(-1)] = outputs
        return by_choice.sum(1)

    def _serve(self, hidden: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        """Sums of what this rank's experts make of the rows [R, H] that came: [R, H].

        numbers, weights [R, K]: the experts of each and how much they count.
        """
        row, choice = (numbers < self.own).nonzero(as_tuple=True)
        # A row of zeros more, whose output goes nowhere: without rows no weight would have a
        # gradient, and ZeRO-3 would wait for it on the other ranks.
        outputs = self.forward(
            torch.cat([hidden[row], hidden.new_zeros(1, hidden.shape[1])]),
            torch.cat([numbers[row, choice], numbers.new_zeros(1)])[:, None],
            torch.cat([weights[row, choice], weights.new_zeros(1)])[:, None])[:-1]
        by_choice = outputs.new_zeros(*numbers.shape, outputs.shape[-1])
        by_choice[row, choice] = outputs
        return by_choice.sum(1)
