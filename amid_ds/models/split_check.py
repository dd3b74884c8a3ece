"""Does a split block compute what the whole one does: values, and the gradients that leave it.

A wrong split is silent: the shapes fit, and a model learns from other numbers. So one block of each
kind is put together again from all ranks' parts at the start, and both run on the hidden states
that a few tokens have there. The copies share nothing with the model but its weights, so neither
DeepSpeed's hooks nor its gradients see them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from amid_ds.models.heads import eval_mode, tolerance
from amid_ds.models.shape import body_of
from amid_ds.models.tp_layers import Split
from amid_ds.models.tp_plan import SplitBlock, whole_of

# Inputs of a call: positional, by keyword.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Shared:
    """What blocks leave for later ones, such as keys and values: kept from block to block."""

    def __init__(self) -> None:
        self.kept: MutableMapping[Any, Any] | None = None

    def of(self, given: MutableMapping[Any, Any]) -> MutableMapping[Any, Any]:
        """What stands for the mapping that the model gives its blocks."""
        if self.kept is None:
            self.kept = type(given)()
        return self.kept

    def detach(self) -> None:
        """Forget how its tensors were made."""
        for key, value in list((self.kept or {}).items()):
            if isinstance(value, tuple):
                assert self.kept is not None
                self.kept[key] = tuple(each.detach() for each in value)


def split_problem(model: nn.Module, input_ids: Tensor,
                  gathered: Callable[[nn.Module], AbstractContextManager[None]]) -> str | None:
    """What of a split model is not what the whole one is; None: nothing was found.

    input_ids: [B, L], the same on every rank. gathered(module): a context in which this rank's
    part of the module's weights can be read. Collective over all ranks; the ranks of a group may
    differ in what they find.
    """
    split: Split | None = getattr(model, "split", None)
    if split is None:
        return None
    chosen = _one_of_each_kind(model, split)
    try:
        calls = _calls(model, input_ids, chosen)
    # What a layer raises where the split leaves it shapes that it does not expect.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    problems, shared = [], (_Shared(), _Shared())
    for block in chosen:
        module = model.get_submodule(block.name)
        with gathered(module):
            parts = {name: parameter.detach() for name, parameter
                     in module.named_parameters(prefix=block.name)}
            problem = _difference(block, module, parts, split, calls[block.name], shared)
        problems += [f"{block.name} ({type(module).__name__}): {problem}"] if problem else []
    return problems[0] if problems else None


def _one_of_each_kind(model: nn.Module, split: Split) -> list[SplitBlock]:
    """The first block of each class and cut."""
    kinds: dict[object, SplitBlock] = {}
    for block in split.blocks:
        if block.whole is None:
            cuts = tuple((name.removeprefix(block.name), cut) for name, cut in block.cuts.items())
            module = model.get_submodule(block.name)
            kinds.setdefault((type(module).__name__, getattr(module, "layer_type", None), cuts),
                             block)
    return list(kinds.values())


@torch.no_grad()
def _calls(model: nn.Module, input_ids: Tensor, blocks: list[SplitBlock]) -> dict[str, _Call]:
    """What each block is given while the body reads the ids, by its name."""
    calls: dict[str, _Call] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            calls[name] = inputs, dict(options)
        return hook

    hooks = [model.get_submodule(block.name).register_forward_pre_hook(
        keep(block.name), with_kwargs=True) for block in blocks]
    try:
        with eval_mode(model):
            body_of(model)(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _difference(block: SplitBlock, module: nn.Module, parts: Mapping[str, Tensor], split: Split,
                call: _Call, shared: tuple[_Shared, _Shared]) -> str | None:
    """What differs between the block on its parts and on the weights whole. Collective."""
    # One by one: a block may be a layer of all experts.
    whole = {name: whole_of(split.peers.parts(part), block.cuts[name]) if name in block.cuts
             else part for name, part in parts.items()}
    ours = _outcome(_copy(module, block.name, _leaves(block, parts, split), False), block, call,
                    shared[0])
    theirs = _outcome(_copy(module, block.name, _leaves(block, whole, None), True), block, call,
                      shared[1])
    for name, expected in theirs.items():
        worst = (ours[name] - expected).abs().max().item()
        size = expected.abs().max().item()
        # Sums in another order, and gradients of them; what is wrong differs by its own size.
        if not worst <= 4 * tolerance(parts[next(iter(parts))].dtype) * max(size, 1e-6):
            return f"{name} differs by up to {worst:.3g} where the whole one's reaches {size:.3g}"
    return None


def _leaves(block: SplitBlock, values: Mapping[str, Tensor],
            split: Split | None) -> dict[str, Tensor]:
    """Parameters of a copy: those that are whole on every rank have gradients to compare."""
    leaves = {}
    for name, value in values.items():
        leaves[name] = value.detach().requires_grad_(name not in block.cuts)
        if split is not None and name in block.summed:
            leaves[name].register_hook(split.peers.add)
    return leaves


def _copy(module: Any, name: str, parameters: Mapping[str, Tensor], whole: bool) -> Any:
    """A module of the same class, without hooks, with these parameters; whole: of the class that it
    had before it was split."""
    copy = object.__new__(type(module))
    copy.__dict__ = {key: type(value)() if "hooks" in key and isinstance(value, dict) else value
                     for key, value in vars(module).items() if key != "forward"}
    if whole and hasattr(module, "whole_class"):
        copy.__class__ = module.whole_class
    copy._parameters = {key: None if own is None else parameters[f"{name}.{key}"]
                        for key, own in module._parameters.items()}
    copy._modules = {key: None if child is None else _copy(child, f"{name}.{key}", parameters,
                                                           whole)
                     for key, child in module._modules.items()}
    return copy.eval()


def _outcome(module: Any, block: SplitBlock, call: _Call, shared: _Shared) -> dict[str, Tensor]:
    """The output, and the gradients of a number made of it: of the inputs, of whole parameters."""
    watched: list[Tensor] = []
    takes_all = "experts" in block.roles.values()

    def entering(value: Any) -> Any:
        if isinstance(value, MutableMapping):
            return shared.of(value)
        if (not isinstance(value, Tensor) or not value.is_floating_point()
                or (watched and not takes_all)):
            return value
        watched.append(value.detach().clone().requires_grad_())
        return watched[-1]

    inputs, options = call
    with torch.enable_grad():
        output = module(*(entering(each) for each in inputs),
                        **{key: entering(each) for key, each in options.items()})
        output = output if isinstance(output, Tensor) else output[0]
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(output.shape, generator=generator).to(output)
        parameters = {name: each for name, each in _named_tensors(module, block.name)
                      if each.requires_grad}
        found = torch.autograd.grad((output * weights).sum(), [*watched, *parameters.values()],
                                    allow_unused=True, materialize_grads=True)
    shared.detach()
    names = [*(f"the gradient of input {index}" for index in range(len(watched))),
             *(f"the gradient of {name}" for name in parameters)]
    return {"the output": output.detach().float(),
            **{name: each.float() for name, each in zip(names, found, strict=True)}}


def _named_tensors(module: Any, prefix: str) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{key}", each) for name, child in module.named_modules(prefix=prefix)
            for key, each in child._parameters.items() if each is not None]
