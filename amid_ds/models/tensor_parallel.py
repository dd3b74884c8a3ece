"""Tensor-parallel splits: bodies by their own plans in transformers, heads by rows.

DeepSpeed's AutoTP splits the bodies; here are the weights that it splits. A body that cannot be
split evenly by its own plan stays whole on every rank of the group, which costs memory and time and
changes no number. Both heads are cut at the same rows of the common vocabulary, because AutoTP
would cut each by its own width. A head that is tied to the embedding stays whole, and each rank
reads its rows of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypedDict

from torch import nn

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.models.adapters import ADAPTER_NAME, adapted_layers, is_adapted
from amid_ds.models.shape import body_name, body_of, head_module, is_tied

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# transformers' styles and AutoTP's names for them. A norm on split heads stays whole, and its
# gradient is summed.
STYLES = {"colwise": "column", "rowwise": "row", "replicated_with_grad_allreduce": "skip"}
# The parameters, of a layer in each split style, of which a rank has a part.
SPLIT_PARAMETERS = {"colwise": r"\.(weight|bias)", "rowwise": r"\.weight"}
# In an adapted layer, what is split as the layer is: W and B by rows, or W and A by columns.
ADAPTED = {"colwise": rf"(\.base_layer|\.lora_B\.{ADAPTER_NAME})?",
           "rowwise": rf"(\.base_layer|\.lora_A\.{ADAPTER_NAME})?"}
# Heads are cut at multiples of so many rows, so that every shard but the last has aligned rows of
# logits. Once they were cut as evenly as possible; a checkpoint says how (checkpoint/state.py).
HEAD_ROW_MULTIPLE = 64


class LayerSpec(TypedDict):
    """An entry of AutoTP's `layer_specs`: parameters by regular expressions, and their split."""

    patterns: list[str]
    partition_type: str
    grad_allreduce: bool


def vocab_shard(vocab_size: int, tp_rank: int, tp_size: int, group: ProcessGroup | None
                ) -> VocabShard | None:
    """This rank's rows of the common vocabulary, nearly as many as any other's; None with a tp_size
    of 1.

    Cut at multiples of HEAD_ROW_MULTIPLE, or anywhere if there are not so many rows for each.
    """
    if tp_size == 1:
        return None
    multiple = HEAD_ROW_MULTIPLE if vocab_size >= HEAD_ROW_MULTIPLE * tp_size else 1
    units = -(-vocab_size // multiple)
    start, stop = (min(vocab_size, multiple * (units * rank // tp_size))
                   for rank in (tp_rank, tp_rank + 1))
    return VocabShard(start, stop, group)


def tp_unsupported_reason(model: nn.Module, tp_size: int) -> str | None:
    """The reason that the body of `model` is not split over `tp_size` ranks; None if it is.

    model: a transformers causal LM, on any device. AutoTP splits by elements, so `tp_size` has to
    divide the number of heads, or attention would change.
    """
    config: Any = model.config
    plan = _plan(model)
    if not plan:
        return f"{type(model).__name__} has no tensor-parallel plan in transformers"
    if unknown := sorted(set(plan.values()) - set(STYLES)):
        return f"its plan has {', '.join(unknown)}, and only {', '.join(STYLES)} are known here"
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % tp_size:
            return f"tensor_parallel {tp_size} does not divide its {name} {heads}"
    modules = dict(body_of(model).named_modules())
    adapted = tuple(f"{name}." for name, _ in adapted_layers(body_of(model)))
    planned = {name: style for pattern, style in plan.items()
               for name in modules if re.fullmatch(_regex(pattern), name)}
    split = [name for name, style in planned.items() if style in SPLIT_PARAMETERS]
    for name in split:
        if not isinstance(getattr(modules[name], "base_layer", modules[name]), nn.Linear):
            return f"{name} of its plan is not a linear layer"
    # Any other module with parameters next to a split layer works on split heads, so the plan must
    # name it.
    blocks = tuple({f"{name.rpartition('.')[0]}." for name in split})
    for name, module in modules.items():
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if (f"{name}.".startswith(blocks) and name not in planned and has_parameters
                and not name.startswith(adapted)):
            return f"{name} is not in its plan"
    return None


def layer_specs(model: nn.Module, name: str) -> list[LayerSpec]:
    """AutoTP's layer specs for `model`, the submodule `name` of the engine's module, by its plan.

    A replicated weight on split heads is in them where it trains: it has a gradient to sum.
    """
    prefix = f"{name}.{body_name(model)}."
    specs: list[LayerSpec] = []
    for pattern, style in _plan(model).items():
        if style in SPLIT_PARAMETERS:
            patterns = [rf"{re.escape(prefix)}{_regex(pattern)}{ADAPTED[style]}\.weight$"]
        else:
            patterns = [rf"{re.escape(prefix + each)}$"
                        for each, parameter in body_of(model).named_parameters()
                        if parameter.requires_grad
                        and re.fullmatch(rf"{_regex(pattern)}\.weight", each)]
        if patterns:
            specs.append({"patterns": patterns, "partition_type": STYLES[style],
                          "grad_allreduce": style not in SPLIT_PARAMETERS})
    return specs


def split_parameters(model: nn.Module, tp_size: int) -> set[str]:
    """The names of the parameters of which a tensor-parallel rank has a part.

    Those of the body by its plan, and of a head that is not tied to the embedding.
    """
    if tp_size == 1:
        return set()
    head = head_module(model)
    split = set()
    if not is_tied(model):
        of_head = [parameter for _, _, parameter in _cut_parameters(head)]
        split |= {name for name, parameter in model.named_parameters()
                  if any(parameter is each for each in of_head)}
    if tp_unsupported_reason(model, tp_size) is None:
        for pattern, style in _plan(model).items():
            if style in SPLIT_PARAMETERS:
                regex = (rf"{body_name(model)}\.{_regex(pattern)}{ADAPTED[style]}"
                         rf"{SPLIT_PARAMETERS[style]}")
                split |= {name for name, _ in model.named_parameters() if re.fullmatch(regex, name)}
    return split


def shrink_to_tp_rank(model: nn.Module, tp_size: int) -> tuple[int, int]:
    """Shrink a meta-device body, in place, to the shapes of one of `tp_size` ranks.

    Returns the elements per token that AutoTP sums over the group: in forward the outputs of the
    row-wise layers, in backward the gradients of the column-wise layers' inputs, each layer by
    itself, and marked with `sums_input_gradient`. (0, 0) if the body stays whole.
    """
    forward = backward = 0
    if tp_size == 1 or tp_unsupported_reason(model, tp_size) is not None:
        return forward, backward
    for pattern, style in _plan(model).items():
        for name, module in body_of(model).named_modules():
            if STYLES[style] == "skip" or not re.fullmatch(_regex(pattern), name):
                continue
            for layer in _split_layers(module, style):
                rows, columns = layer.weight.shape
                if STYLES[style] == "column":
                    backward, rows = backward + columns, rows // tp_size
                    layer.sums_input_gradient = True
                    if layer.bias is not None:
                        layer.bias = nn.Parameter(layer.bias[:rows])
                else:
                    forward, columns = forward + rows, columns // tp_size
                layer.weight = nn.Parameter(layer.weight[:rows, :columns].clone(),
                                            requires_grad=layer.weight.requires_grad)
    return forward, backward


def _split_layers(module: Any, style: str) -> list[Any]:
    """The linear layers that are split where the plan splits `module`: itself, or what its adapter
    has made of it."""
    if not hasattr(module, "base_layer"):
        return [module]
    factors = module.lora_B if style == "colwise" else module.lora_A
    return [module.base_layer, factors[ADAPTER_NAME]]


def cut_head(model: nn.Module, shard: VocabShard, vocab_size: int,
             gathered: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    """Reduce an untied head, in place, to this rank's rows; the last rank keeps the padding too.

    The padding is the rows from `vocab_size` on. `gathered(model)` is a context in which the head's
    weights are complete (collective). The rows are new parameters, split over the data-parallel
    ranks like any other.
    """
    if is_tied(model):
        return
    head = head_module(model)
    with gathered(model):
        for layer, name, parameter in _cut_parameters(head):
            stop = len(parameter) if shard.stop == vocab_size else shard.stop
            part: Any = nn.Parameter(parameter.data[shard.start:stop].clone(),
                                     requires_grad=parameter.requires_grad)
            # DeepSpeed's mark: the gradient norm counts every rank's part.
            part.tensor_model_parallel = True
            part.head_rows = shard.start, stop
            setattr(layer, name, part)
    head.first_row = shard.start


def _cut_parameters(head: Any) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(layer, name, parameter) of what of a head has a row for each id: of an adapted one W and B.
    """
    layers = [head.base_layer, head.lora_B[ADAPTER_NAME]] if is_adapted(head) else [head]
    return [(layer, name, parameter) for layer in layers
            for name, parameter in layer.named_parameters()]


def _plan(model: nn.Module) -> dict[str, str]:
    """The body's plan in transformers, {} for none.

    Without a tied embedding, which transformers 5.17 adds to each: it stays whole here, as its head
    does.
    """
    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    return {pattern: style for pattern, style in plan.items()
            if style != "embedding_rowwise" or not is_tied(model)}


def _regex(pattern: str) -> str:
    """A plan's `layers.*.mlp.up_proj` as a regular expression; the star is the layer's number."""
    return re.escape(pattern).replace(r"\*", r"\d+")
