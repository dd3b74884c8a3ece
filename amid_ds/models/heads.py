"""A causal LM's body and head as the fused loss needs them, and the checks that they give the
model's own logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from amid_ds.distributed.vocab_parallel import VocabShard
from amid_ds.distributed.world import slice_replicated
from amid_ds.errors import InputError
from amid_ds.losses import LMHead


def body_of(model: nn.Module) -> nn.Module:
    """The part of a transformers causal LM that ends in hidden states."""
    return model.base_model   # type: ignore[return-value]


def run_body(model: nn.Module, input_ids: Tensor, positions: Tensor | None) -> Tensor:
    """Hidden states [B, L, H]. Where `positions` [B, L] start again, transformers takes another document to begin, and
    builds the attention mask that keeps it from the ones before; None: each row is one document."""
    more = {} if positions is None else {"position_ids": positions}     # not every architecture has positions
    hidden: Tensor = body_of(model)(input_ids=input_ids, use_cache=False, **more).last_hidden_state
    return hidden


def head_of(model: nn.Module) -> LMHead:
    """A causal LM's head as the loss takes it. What the config names is applied; `check_head` refuses what it hides."""
    projection = model.get_output_embeddings()   # type: ignore[operator]
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)          # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)      # Granite divides
    return LMHead(projection.weight, bias=projection.bias,
                  softcap=getattr(config, "final_logit_softcapping", None), scale=scale)


def sharded_head_of(model: nn.Module, shard: VocabShard | None) -> LMHead:
    """The rows [start, stop) of a causal LM's head, whether this rank holds the whole head or was given its part."""
    head = head_of(model)
    if shard is None:
        return head
    first = getattr(model.get_output_embeddings(), "first_row", None)   # type: ignore[operator]   # see cut_head

    def take(tensor: Tensor) -> Tensor:
        if first is None:
            return slice_replicated(tensor, slice(shard.start, shard.stop), shard.group)
        return tensor[shard.start - first:shard.stop - first]

    return replace(head, weight=take(head.weight), bias=None if head.bias is None else take(head.bias))


def logits_of(head: LMHead, hidden: Tensor) -> Tensor:
    """What a head makes of hidden states [..., H]: logits [..., V], in full. To compare a few tokens, not to train."""
    logits = head.scale * nn.functional.linear(hidden, head.weight, head.bias)
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


@torch.no_grad()
def check_isolation(model: nn.Module, name: str, input_ids: Tensor) -> None:
    """Refuse a model in which a document sees another one of its row, though positions start again.

    Collective under ZeRO-3: every rank calls it with the same ids [2, L].
    """
    half = input_ids.shape[1] // 2
    rows = torch.cat([input_ids[:, :half], input_ids[:1, :half].expand(2, -1)], 1)      # two beginnings, one end
    positions = torch.arange(half, device=rows.device).repeat(2, 2)
    was_training = model.training
    model.eval()
    problem = None
    if "position_ids" not in inspect.signature(body_of(model).forward).parameters:
        problem = "it takes no positions"
    else:
        ends = run_body(model, rows, positions)[:, half:].float()
        alone = run_body(model, rows[:1, half:], positions[:1, half:]).float()
        tolerance = 2e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if not (ends - alone).abs().max() <= tolerance * alone.abs().max():
            problem = "a document's hidden states change with the document before it"
    model.train(was_training)
    if problem is not None:
        raise InputError(f"{name} ({type(model).__name__}) does not keep the documents of one row apart: {problem}",
                         "a model whose attention and positions start again where `position_ids` do",
                         "set data.isolate_documents=false, or choose another model or attention implementation")


@torch.no_grad()
def check_head(model: nn.Module, name: str, input_ids: Tensor, gathered: Callable[[nn.Module], object]) -> None:
    """Refuse a model whose own logits our body and head do not reproduce (an unknown scale, cap or bias).

    `gathered(model)` is a context in which the head's weight can be read. Collective under ZeRO-3: every rank calls it
    with inputs of one shape.
    """
    was_training = model.training
    model.eval()
    own = model(input_ids=input_ids, use_cache=False).logits.float()
    hidden = body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    with gathered(model):   # type: ignore[attr-defined]
        ours = logits_of(head_of(model), hidden).float()
    model.train(was_training)
    tolerance = 2e-2 if hidden.dtype in (torch.bfloat16, torch.float16) else 1e-3
    worst, size = (ours - own).abs().max().item(), own.abs().max().item()
    if not worst <= tolerance * max(size, 1e-6):
        raise InputError(
            f"the fused head does not reproduce the logits of {name} ({type(model).__name__}): they differ by up to "
            f"{worst:.3g} where the model's own reach {size:.3g}",
            "logits = scale · (h Wᵀ + b), with a soft cap where the config names one",
            "this architecture changes its logits in a way that the loss does not know; choose another model")
