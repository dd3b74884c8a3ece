"""What a tensor-parallel group splits: the bodies by their own plans in transformers, and both heads by rows.

The bodies are AutoTP's work, and we only say which weights it splits. A body that cannot be split evenly by its own
plan stays whole on every rank of the group, which costs memory and time and changes no number. The heads are ours: both
are cut at the same rows of the common vocabulary, because AutoTP would cut each by its own width. A head that is tied
to the embedding stays whole, each rank reading its rows of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from amid_ds.distributed.vocab_parallel import VocabShard

# transformers' styles and AutoTP's names for them. A norm on split heads stays whole; its gradient is summed.
STYLES = {"colwise": "column", "rowwise": "row", "replicated_with_grad_allreduce": "skip"}


def vocab_shard(vocab_size: int, tp_rank: int, tp_size: int, group: Any) -> VocabShard | None:
    """This rank's rows of the common vocabulary, as even as they get; None where there is nobody to share with."""
    if tp_size == 1:
        return None
    return VocabShard(vocab_size * tp_rank // tp_size, vocab_size * (tp_rank + 1) // tp_size, group)


def tp_unsupported_reason(model: nn.Module, tp_size: int) -> str | None:
    """Why the body of `model` (a transformers causal LM, on any device) is not split over `tp_size` ranks; None: it is.

    AutoTP splits by elements: only whole heads keep attention what it was.
    """
    config: Any = model.config
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        return f"{type(model).__name__} has no tensor-parallel plan in transformers"
    if unknown := sorted(set(plan.values()) - set(STYLES)):
        return f"its plan has {', '.join(unknown)}, and only {', '.join(STYLES)} are known here"
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % tp_size:
            return f"tensor_parallel {tp_size} does not divide its {name} {heads}"
    modules = dict(model.base_model.named_modules())   # type: ignore[union-attr]
    planned = {name: style for pattern, style in plan.items()
               for name in modules if re.fullmatch(_regex(pattern), name)}
    split = [name for name, style in planned.items() if style in ("colwise", "rowwise")]
    for name in split:
        if not isinstance(modules[name], nn.Linear):
            return f"{name} of its plan is not a linear layer"
    # Whatever else has parameters beside a split layer works on split heads: the plan must know of it.
    blocks = tuple({f"{name.rpartition('.')[0]}." for name in split})
    for name, module in modules.items():
        if f"{name}.".startswith(blocks) and name not in planned and list(module.parameters(recurse=False)):
            return f"{name} is not in its plan"
    return None


def layer_specs(model: nn.Module, name: str, trains: bool) -> list[dict[str, Any]]:
    """AutoTP's layer specs for `model`, the submodule `name` of the engine's module, from the model's own plan."""
    prefix = re.escape(f"{name}.{model.base_model_prefix}.")
    specs = []
    for pattern, style in model.config.base_model_tp_plan.items():   # type: ignore[union-attr, operator]
        summed = style == "replicated_with_grad_allreduce"
        if not summed or trains:
            specs.append({"patterns": [rf"{prefix}{_regex(pattern)}\.weight$"], "partition_type": STYLES[style],
                          "grad_allreduce": summed})
    return specs


def split_parameters(model: nn.Module, tp_size: int) -> set[str]:
    """The names of the parameters that a tensor-parallel rank has a part of: the body's by its plan, an untied head."""
    if tp_size == 1:
        return set()
    head: Any = model.get_output_embeddings()   # type: ignore[operator]
    split = set()
    if head.weight is not model.get_input_embeddings().weight:   # type: ignore[operator]
        split |= {name for name, parameter in model.named_parameters() if parameter is head.weight
                  or parameter is head.bias}
    if tp_unsupported_reason(model, tp_size) is None:
        prefix = model.base_model_prefix
        for pattern, style in model.config.base_model_tp_plan.items():   # type: ignore[union-attr, operator]
            own = {"colwise": r"\.(weight|bias)", "rowwise": r"\.weight"}.get(style)
            if own is not None:
                split |= {name for name, _ in model.named_parameters()
                          if re.fullmatch(rf"{prefix}\.{_regex(pattern)}{own}", name)}
    return split


def shrink_to_tp_rank(model: nn.Module, tp_size: int) -> tuple[int, int]:
    """Make the body of a model on the meta device what one of `tp_size` ranks has of it.

    Returns the widths that AutoTP sums over the group for each token: of what its row-wise layers give, in forward, and
    of what its column-wise layers took, in backward, where each is summed by itself.
    """
    given = taken = 0
    if tp_size == 1 or tp_unsupported_reason(model, tp_size) is not None:
        return given, taken
    for pattern, style in model.config.base_model_tp_plan.items():   # type: ignore[union-attr, operator]
        for name, module in model.base_model.named_modules():   # type: ignore[union-attr]
            if STYLES[style] == "skip" or not re.fullmatch(_regex(pattern), name):
                continue
            rows, columns = module.weight.shape
            if STYLES[style] == "column":
                taken, rows = taken + columns, rows // tp_size
                if module.bias is not None:
                    module.bias = nn.Parameter(module.bias[:rows])
            else:
                given, columns = given + rows, columns // tp_size
            module.weight = nn.Parameter(module.weight[:rows, :columns].clone())
    return given, taken


def _regex(pattern: str) -> str:
    """transformers writes `layers.*.mlp.up_proj`, with a star for the layer's number."""
    return re.escape(pattern).replace(r"\*", r"\d+")


def cut_head(model: nn.Module, shard: VocabShard, vocab_size: int,
             gathered: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    """Keep this rank's rows of an untied head alone, and on the last rank the padding after the common vocabulary too.

    The rows are parameters of their own from here on, split over the data-parallel ranks like any other.
    """
    projection: Any = model.get_output_embeddings()   # type: ignore[operator]
    if projection.weight is model.get_input_embeddings().weight:   # type: ignore[operator]
        return
    with gathered(model):
        rows = slice(shard.start, None if shard.stop == vocab_size else shard.stop)
        for name, parameter in list(projection.named_parameters()):
            part = nn.Parameter(parameter.data[rows].clone(), requires_grad=parameter.requires_grad)
            part.tensor_model_parallel = True      # type: ignore[attr-defined]  # the gradient norm counts every rank's
            setattr(projection, name, part)
    projection.first_row = shard.start
