"""Tensor-parallel splits: bodies block by block by their plans, heads by rows.

What of a body is split is said in tp_plan.py, and done in tp_layers.py. Both heads are cut at the
same rows of the common vocabulary. A head that is tied to the embedding stays whole, and each rank
reads its rows of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from amid_ds.distributed.tensor_group import Peers
from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.models.adapters import ADAPTER_NAME, is_adapted
from amid_ds.models.shape import body_name, embedding_of, head_module, is_tied, layers_of
from amid_ds.models.tp_layers import split_blocks
from amid_ds.models.tp_plan import SplitBlock, blocks_of, generic, own_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NO_PLAN = "its family's plan does not split it"
# Parts of a body below this share of its model are not named where it is said what stays whole.
NAMED_SHARE = 0.01
# Heads are cut at multiples of so many rows, so that every shard but the last has aligned rows of
# logits. Once they were cut as evenly as possible; a checkpoint says how (checkpoint/state.py).
HEAD_ROW_MULTIPLE = 64


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


@dataclass(frozen=True)
class WholePart:
    """Weights of a body's layers that every rank of a tensor-parallel group holds whole.

    name: of their modules, a star for each number. count: of their elements, over all layers.
    """

    name: str
    reason: str
    count: int

    def __str__(self) -> str:
        return f"{self.name} ({self.count:,} weights): {self.reason}"


def split_kinds(blocks: Iterable[SplitBlock]) -> tuple[str, ...]:
    """What of a body is split, and how: a part of a checkpoint's layout.

    The parameters' names with a star for each number, `/2` after those that are cut in halves each.
    """
    return tuple(sorted({
        generic(name) + (f"/{cut.pieces}" if cut.pieces > 1 else "")
        for block in blocks for name, cut in block.cuts.items()}))


def pieces_of(name: str, kinds: Iterable[str]) -> int:
    """The pieces of its dimension of which a rank has a share each, by `split_kinds`."""
    return next((int(kind.partition("/")[2]) for kind in kinds
                 if kind.partition("/")[0] == generic(name) and "/" in kind), 1)


def split_parameters(model: nn.Module, tp_size: int) -> set[str]:
    """The names of the parameters of which a tensor-parallel rank has a part.

    Those of the body by its plan, and of a head that is not tied to the embedding.
    """
    if tp_size == 1:
        return set()
    split = {name for block in blocks_of(model, tp_size) for name in block.cuts}
    if not is_tied(model):
        of_head = [parameter for _, _, parameter in _cut_parameters(head_module(model))]
        split |= {name for name, parameter in model.named_parameters()
                  if any(parameter is each for each in of_head)}
    return split


def whole_parts(model: nn.Module, blocks: Collection[SplitBlock],
                shape_of: Callable[[nn.Parameter], tuple[int, ...]] = own_shape) -> list[WholePart]:
    """The matrices of a body's layers that tensor parallelism leaves whole on every rank, by block
    or module, the largest first.

    blocks, shape_of: as `blocks_of` gives and takes them; the model is not yet split.
    """
    split = {name for block in blocks for name in block.cuts}
    reasons = {f"{block.name}.": block.whole for block in blocks if block.whole is not None}
    counts: dict[tuple[str, str], int] = {}
    layers = {id(parameter) for parameter in layers_of(model).parameters()}
    for name, parameter in model.named_parameters():
        shape = shape_of(parameter)
        if id(parameter) not in layers or name in split or len(shape) < 2:
            continue
        place = next((each for each in reasons if name.startswith(each)),
                     f"{name.rpartition('.')[0] if blocks else body_name(model)}.")
        key = generic(place[:-1]), reasons.get(place, NO_PLAN) if blocks else (
            f"{type(model).__name__} has no tensor-parallel plan in transformers")
        counts[key] = counts.get(key, 0) + math.prod(shape)
    return sorted((WholePart(name, reason, count) for (name, reason), count in counts.items()),
                  key=lambda part: -part.count)


def named_parts(parts: Iterable[WholePart], total: int) -> list[WholePart]:
    """Those that are a share of a model's `total` weights that is worth naming."""
    return [part for part in parts if part.count >= NAMED_SHARE * total]


def shrink_to_tp_rank(model: nn.Module, tp_size: int) -> tuple[int, int]:
    """Shrink a meta-device body, in place, to one of `tp_size` ranks: shapes, and what it exchanges
    over the group, without a group.

    Returns the elements per token that are summed over the group: in forward the outputs of
    row-wise layers and of experts, in backward the gradients of what column-wise layers and experts
    take in, each layer by itself, and marked with `sums_input_gradient`. Half of a sum stands for
    each output that is joined, which sends half as much. (0, 0) if the body stays whole.
    """
    forward = backward = 0
    blocks = blocks_of(model, tp_size)
    width = embedding_of(model).weight.shape[1]
    for block in blocks:
        for name, role in block.roles.items() if block.whole is None else ():
            layer: Any = model.get_submodule(name)
            if role == "experts":
                forward, backward = forward + width, backward + width
            elif role.startswith("column"):
                backward += layer.in_features
                forward += layer.out_features // 2 if role == "column joined" else 0
            elif role.startswith("row"):
                forward += layer.out_features
                backward += layer.in_features // 2 if role == "row of own" else 0
            layer.sums_input_gradient = role == "experts" or role.startswith("column")
    split_blocks(model, blocks, Peers(0, tp_size))
    return forward, backward


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
            mark_part(part, 0, [(shard.start, stop)])
            setattr(layer, name, part)
    head.first_row = shard.start


def mark_part(part: Any, dim: int, ranges: list[tuple[int, int]]) -> None:
    """Note of a parameter that it is those stretches of a dimension of the whole one."""
    # DeepSpeed's mark: the gradient norm counts every rank's part.
    part.tensor_model_parallel = True
    part.tp_part = dim, ranges


def _cut_parameters(head: Any) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(layer, name, parameter) of what of a head has a row for each id: of an adapted one W and B.
    """
    layers = [head.base_layer, head.lora_B[ADAPTER_NAME]] if is_adapted(head) else [head]
    return [(layer, name, parameter) for layer in layers
            for name, parameter in layer.named_parameters()]
