"""What each part of a model does on calibration text: sums over tokens, on any number of ranks.

Channels are judged by the outputs of the norms over them and heads and neurons by their outputs, as
in Minitron (arXiv 2407.14679, section 2.2), layers by the cosine between the hidden states before
and after them, as in ShortGPT (arXiv 2403.03853). Batches are the same on any number of ranks, and
the sums are in fp64 and added up once, so what is chosen by them is too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from amid_ds.data import Batch
from amid_ds.distributed.world import World
from amid_ds.errors import TrainingError
from amid_ds.models.heads import run_body
from amid_ds.models.pruning import ModelSizes, PrunedFamily

# Hidden states of all layers that are compared in fp32 at once, in elements.
COMPARED_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Importance:
    """Sums over tokens in fp64, on the CPU.

    cosines: [L+1, L+1], of the hidden states before each of the L layers, and after the last.
    changes: [L], the square of what each layer adds to them. neurons: [L, I], |output|. heads:
    [L, heads], the output's Euclidean norm. outputs: by the name of a norm over the hidden states,
    [H], |output|.
    """

    cosines: Tensor
    changes: Tensor
    neurons: Tensor
    heads: Tensor
    outputs: Mapping[str, Tensor]


def hidden_norms(model: nn.Module, family: PrunedFamily) -> list[str]:
    """The names of the norms over the hidden states."""
    return [name.removesuffix(".weight") for name, _ in model.named_parameters()
            if family.axes_of(name) == ("norm",)]


class ImportanceHooks:
    """Forward hooks on a model of the family that add up its `Importance`, on its device.

    `measure` runs the batches; a context manager that takes the hooks off again.
    """

    def __init__(self, model: nn.Module, family: PrunedFamily, device: torch.device) -> None:
        self.model, self.family = model, family
        config: Any = model.config
        self.sizes = ModelSizes.of(config)
        layers, hidden, intermediate, heads = self.sizes
        self.norms = hidden_norms(model, family)
        self.sums: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in (
                ("cosines", (layers + 1, layers + 1)), ("changes", (layers,)),
                ("neurons", (layers, intermediate)), ("heads", (layers, heads)),
                ("outputs", (len(self.norms), hidden)))}
        # Of the batch that runs: its labelled tokens, and their hidden states layer by layer.
        self.kept = torch.empty(0)
        self.states: list[Tensor] = []
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> ImportanceHooks:
        for layer in range(self.sizes.layers):
            module = self.model.get_submodule(f"{self.family.layers}.{layer}")
            self._before(module, lambda _, x: self.states.append(x))
            self._before(module.get_submodule(self.family.neurons_out),
                         lambda layer, x: self._add("neurons", layer, x.float().abs()), layer)
            self._before(module.get_submodule(self.family.heads_out),
                         lambda layer, x: self._add("heads", layer, x.float().unflatten(
                             1, (self.sizes.heads, -1)).norm(dim=2)), layer)
        self.handles.append(module.register_forward_hook(
            lambda _, __, output: self.states.append(self._rows(output))))
        for number, name in enumerate(self.norms):
            self.handles.append(self.model.get_submodule(name).register_forward_hook(
                lambda _, __, output, number=number: self._add(
                    "outputs", number, self._rows(output).float().abs())))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, add: Any, number: int = 0) -> None:
        """Call add(number, x) with the input of `module` at the kept tokens, [n, width]."""
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            add(number, self._rows(args[0] if args else kwargs["hidden_states"]))

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _rows(self, values: Any) -> Tensor:
        values = values if isinstance(values, Tensor) else values[0]
        rows: Tensor = values.flatten(0, 1)[self.kept]
        return rows

    def _add(self, name: str, number: int, values: Tensor) -> None:
        self.sums[name][number] += values.sum(0, dtype=torch.float64)

    @torch.no_grad()
    def measure(self, batch: Batch) -> None:
        """Run the model's body on a batch on its device and add its tokens to the sums."""
        self.kept = batch.valid
        self.states.clear()
        run_body(self.model, batch.input_ids, batch.positions, batch.documents)
        count = len(self.states) * self.sizes.hidden
        step = max(1, COMPARED_ELEMENTS // count)
        for start in range(0, len(self.kept), step):
            states = torch.stack([state[start:start + step].float() for state in self.states])
            self.sums["changes"] += states.diff(dim=0).square().sum((1, 2), dtype=torch.float64)
            unit = nn.functional.normalize(states, dim=2).flatten(1)
            self.sums["cosines"] += unit @ unit.T
        self.states.clear()

    def result(self, world: World) -> Importance:
        """The sums over all ranks. One collective. Raises TrainingError for NaN or infinity."""
        total = torch.tensor(world.sum(torch.cat([s.flatten() for s in self.sums.values()])),
                             dtype=torch.float64)
        if not total.isfinite().all():
            raise TrainingError(f"activations of {self.model.name_or_path} hold NaN or infinity: "
                                "there is nothing to judge by\n"
                                "  its weights are damaged, or too large for its dtype")
        parts = total.split([s.numel() for s in self.sums.values()])
        sums = {name: part.view(s.shape) for (name, s), part in zip(self.sums.items(), parts,
                                                                    strict=True)}
        by_norm = dict(zip(self.norms, sums.pop("outputs"), strict=True))
        return Importance(**sums, outputs=by_norm)


def kept_layers(importance: Importance, kept: int) -> list[int]:
    """The layers that stay when those that change the hidden states least are dropped.

    First those that change nothing at all, then the block of consecutive ones whose input and
    output have the largest mean cosine: what a block does together, which Gromov et al. (arXiv
    2403.17887) drop by, and what ShortGPT's score is of one layer.
    """
    count = len(importance.changes)
    idle = [layer for layer in range(count) if importance.changes[layer] == 0][:count - kept]
    left = [layer for layer in range(count) if layer not in idle]
    size = len(left) - kept
    if size == 0:
        return left
    blocks = [left[first:first + size] for first in range(kept + 1)]
    least = max(blocks, key=lambda block: importance.cosines[block[0], block[-1] + 1].item())
    return [layer for layer in left if layer not in least]


def best(scores: Tensor, count: int) -> Tensor:
    """The numbers of the `count` largest scores [n], ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def channel_scores(importance: Importance, norms: Iterable[str]) -> Tensor:
    """[H] the importance of each channel: its |output| summed over these norms."""
    return torch.stack([importance.outputs[name] for name in norms]).sum(0)
