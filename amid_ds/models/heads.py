"""A causal LM's body and head as the fused loss needs them, and the checks that they give the
model's own logits."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from amid_ds.data.batch import Documents
from amid_ds.distributed.vocab_parallel import VocabShard, slice_replicated
from amid_ds.errors import InputError
from amid_ds.losses import AnyHead, LMHead, SummedHead
from amid_ds.models.adapters import ADAPTER_NAME, is_adapted
from amid_ds.models.attention import (
    attends_by_boundaries,
    boundary_arguments,
    exceeds_window,
    masks_by_positions,
)
from amid_ds.models.delta import DeltaTeacher
from amid_ds.models.head_form import HeadForm, head_form
from amid_ds.models.recurrence import running_on
from amid_ds.models.shape import body_of, head_module, layers_of, text_config

# A row, and the columns of it from the first to before the second.
_Place: TypeAlias = tuple[int, int, int]


def run_body(model: nn.Module, input_ids: Tensor, positions: Tensor | None,
             documents: Documents | None = None) -> Tensor:
    """Hidden states [B, L, H] of input_ids [B, L].

    Where `positions` [B, L] start again, another document begins; None: each row is one. A model
    that attends by boundaries keeps them apart by `documents`, any other, or without them, by the
    mask that transformers builds from the positions. Of a delta: the models' side by side.
    """
    if isinstance(model, DeltaTeacher):
        return torch.cat([run_body(part, input_ids, positions, documents)
                          for part in model.parts], -1)
    body = body_of(model)
    optional: dict[str, Any] = {}
    if positions is not None and "position_ids" in inspect.signature(body.forward).parameters:
        optional["position_ids"] = positions

    def boundaries() -> list[int]:
        if documents is not None:
            return documents.boundaries(input_ids.shape[1])
        assert positions is not None
        return [*(positions.flatten() == 0).nonzero()[:, 0].tolist(), input_ids.numel()]

    if (documents is not None and attends_by_boundaries(model)
            and (positions is not None or exceeds_window(model, input_ids.shape[1]))):
        optional |= boundary_arguments(documents, input_ids)
    with (running_on(model, None if positions is None else boundaries, input_ids),
          masks_by_positions(model, positions)):
        hidden: Tensor = body(input_ids=input_ids, use_cache=False, **optional).last_hidden_state
    return hidden


def head_of(model: nn.Module) -> LMHead:
    """A causal LM's head as the loss takes it: weight, bias, and the model's own scale and cap.

    Of one with an adapter the weight is [W, B], a copy, for hidden states as `head_input` makes
    them. Raises InputError for a model that does more to its logits.
    """
    projection, form = head_module(model), head_form(model)
    weight = projection.weight
    if is_adapted(projection):
        weight = torch.cat([weight, projection.lora_B[ADAPTER_NAME].weight], 1)
    return LMHead(weight, bias=projection.bias, softcap=form.softcap, scale=form.scale)


def head_parameters(model: nn.Module) -> list[Any]:
    """The parameters that `head_of` reads."""
    head = head_module(model)
    adapter = [head.lora_B[ADAPTER_NAME].weight] if is_adapted(head) else []
    return [*(p for p in (head.weight, head.bias) if p is not None), *adapter]


def head_input(model: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states [..., H] as the head of `head_of` takes them.

    Of one with an adapter, whose logits are h Wᵀ + (scaling · h Aᵀ) Bᵀ: [h, scaling · h Aᵀ].
    """
    if isinstance(model, DeltaTeacher):
        return hidden
    head = head_module(model)
    if not is_adapted(head):
        return hidden
    low = head.lora_A[ADAPTER_NAME](head.lora_dropout[ADAPTER_NAME](hidden))
    return torch.cat([hidden, head.scaling[ADAPTER_NAME] * low], -1)


def any_head_of(model: nn.Module, shard: VocabShard | None) -> AnyHead:
    """A model's head, its rows [start, stop): of a delta the sum of its models'."""
    if not isinstance(model, DeltaTeacher):
        return sharded_head_of(model, shard)
    return SummedHead(tuple(sharded_head_of(part, shard) for part in model.parts), model.factors)


def sharded_head_of(model: nn.Module, shard: VocabShard | None) -> LMHead:
    """A causal LM's head, its rows [start, stop): cut from the whole, or this rank's part."""
    head = head_of(model)
    if shard is None:
        return head
    # Set by tensor_parallel.cut_head, where this rank holds a part alone.
    first = getattr(head_module(model), "first_row", None)

    def take(tensor: Tensor) -> Tensor:
        if first is None:
            return slice_replicated(tensor, slice(shard.start, shard.stop), shard.group)
        return tensor[shard.start - first:shard.stop - first]

    return replace(head, weight=take(head.weight),
                   bias=None if head.bias is None else take(head.bias))


def logits_of(head: AnyHead, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., H], in full: to compare a few tokens, not to train.

    Of a sum of heads, for hidden [n, Σ H_i], in fp32.
    """
    if isinstance(head, SummedHead):
        parts = zip(head.heads, head.factors, head.parts(hidden), strict=True)
        return torch.stack([factor * logits_of(own, part).float()[:, :head.rows]
                            for own, factor, part in parts]).sum(0)
    product = nn.functional.linear(hidden, head.weight, head.bias)
    return HeadForm(head.scale, head.softcap).apply(product)


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference that rounding in `dtype` explains."""
    return 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def ids_to_check(model: nn.Module, vocab_size: int) -> Tensor:
    """Token ids [2, 16] for the checks below, random and the same on every rank; fewer columns for
    a model of fewer positions."""
    length = min(16, getattr(text_config(model), "max_position_embeddings", None) or 16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2, length), generator=generator)
    return ids.to(next(model.parameters()).device)


@torch.no_grad()
def check_isolation(model: nn.Module, name: str, input_ids: Tensor) -> None:
    """Refuse a model in which a document sees another one of its row, though positions start again.

    Two rows of documents, at odd places and with padding behind the last, are held against the same
    rows with other tokens in every second document, which changes not even rounding in the ones
    between, and against the same documents one a row. Collective under ZeRO-3: every rank calls it
    with the same ids [2, L]. Raises InputError.
    """
    length = input_ids.shape[1]
    # The first row ends in padding, which is no document.
    starts = [(0, *(cut for cut in cuts if cut < length), length)
              for cuts in ((3, 4, 11, 14), (6, 13))]
    starts[0] = starts[0][:-1]
    spans = [(row, *span) for row in (0, 1) for span in itertools.pairwise(starts[row])]
    # Rows 2 and 3 are rows 0 and 1 with others of their even documents, 4 and 5 of their odd ones.
    ids = input_ids.repeat(3, 1)
    positions = torch.zeros_like(ids)
    alone = ids.new_zeros(len(spans), max(stop - start for _, start, stop in spans))
    same = []
    for number, (row, start, stop) in enumerate(spans):
        positions[row::2, start:] = torch.arange(length - start)
        alone[number, :stop - start] = ids[row, start:stop]
        ids[row + 2 + number % 2 * 2, start:stop] = input_ids[1 - row, start:stop]
        same.append((row + 4 - number % 2 * 2, start, stop))
    with eval_mode(model):
        # Without boundaries, so that flash attention is held against torch's own.
        expected = _layer_states(model, alone, None, None)
        found = _layer_states(model, ids, positions, Documents(tuple(starts) * 3))
    layers, allowed = layers_of(model), tolerance(model.dtype)   # type: ignore[arg-type]
    own = [(number, 0, stop - start) for number, (_, start, stop) in enumerate(spans)]
    changed = _differences(found, same, found, spans)
    apart = _differences(found, spans, expected, own)
    # Against rows of another shape, the rounding of each layer adds up.
    for off, most, what in (
            (changed, allowed, "change with the documents before it"),
            (apart, allowed * math.sqrt(len(layers)), "are not those that it has in a row alone")):
        if off[-1] <= most:
            continue
        at = [not each <= most for each in off].index(True)
        where = f"in its layer {at} ({type(layers[at]).__name__}) " if at < len(layers) else ""
        raise InputError(
            f"{name} ({type(model).__name__}) does not keep the documents of one row apart: "
            f"{where}a document's hidden states {what}",
            "a model whose layers start again where `position_ids` do",
            "set data.isolate_documents=false (a prompt or a conversation then has a row of its "
            "own, a text sees those before it in its row), or choose another model")


def _differences(found: list[Tensor], places: Sequence[_Place], expected: list[Tensor],
                 theirs: Sequence[_Place]) -> list[float]:
    """For each layer ‖found - expected‖ / ‖expected‖ of the states at these places; NaN where one
    has NaN.

    The root mean square, since rounding may send a few tokens to other experts.
    """
    def of(states: Tensor, places: Sequence[_Place]) -> Tensor:
        return torch.cat([states[row, start:stop] for row, start, stop in places]).float()

    differences = []
    for states, others in zip(found, expected, strict=True):
        truth = of(others, theirs)
        differences.append(((of(states, places) - truth).norm() / truth.norm()).item())
    return differences


def _layer_states(model: nn.Module, input_ids: Tensor, positions: Tensor | None,
                  documents: Documents | None) -> list[Tensor]:
    """The hidden states [B, L, H] after each layer, and last those of `run_body`."""
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    try:
        last = run_body(model, input_ids, positions, documents)
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, last]


@torch.no_grad()
def check_head(model: nn.Module, name: str, input_ids: Tensor,
               gathered: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    """Refuse a model whose own logits our body and head do not reproduce.

    Called wherever a head is used, before it is. `gathered(model)` is a context in which the head's
    weight can be read. Collective under ZeRO-3: every rank calls it with inputs of one shape.
    Raises InputError.
    """
    with eval_mode(model):
        own = model(input_ids=input_ids, use_cache=False).logits.float()
        hidden = body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state
        with gathered(model):
            ours = logits_of(head_of(model), head_input(model, hidden)).float()
    # A token that is never said has a logit of -inf; NaN is reported where it is met.
    same = (ours == own) | (ours.isnan() & own.isnan())
    worst = (ours - own).masked_fill(same, 0).abs().max().item()
    size = own.masked_fill(~own.isfinite(), 0).abs().max().item()
    if not worst <= tolerance(hidden.dtype) * max(size, 1e-6):
        raise InputError(
            f"the fused head does not reproduce the logits of {name} ({type(model).__name__}): "
            f"they differ by up to {worst:.3g} where the model's own reach {size:.3g}",
            "logits = scale · (h Wᵀ + b), with or without a soft cap",
            "this architecture changes its logits in a way that the loss does not know; "
            "choose another model")
