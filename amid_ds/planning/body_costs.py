"""What a model's body costs, counted in one run on torch's meta device (shapes, no numbers).

Autograd's saved tensors give the activation memory, torch's counter the FLOPs; backward runs only
where a part of a student is frozen, and otherwise has two products for each of forward's. Attention
is replaced by one that keeps the tensors a fused kernel would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from amid_ds.models.shape import body_of

# The name under which the counting attention is registered with transformers.
ATTENTION_NAME = "planned"


class BodyCosts(NamedTuple):
    """Of one micro-batch through a body: bytes kept for backward, FLOPs of the forward pass, and
    those of the backward pass."""

    saved_bytes: int
    flops: float
    backward_flops: float

    def plus(self, other: BodyCosts, count: int) -> BodyCosts:
        """These costs and `count` times the other ones."""
        return BodyCosts(self.saved_bytes + count * other.saved_bytes,
                         self.flops + count * other.flops,
                         self.backward_flops + count * other.backward_flops)


def count_body(meta: Any, rows: int, length: int, layers: nn.ModuleList) -> tuple[BodyCosts, int]:
    """The costs of a body for [rows, length] tokens, and one layer's kept bytes.

    layers: its own. Of layers that are alike two are run, and the others cost what the second does.
    """
    count = len(layers)
    if count < 2:
        body = run_on_meta(meta, rows, length)
        return body, max(0, body.saved_bytes)
    if _are_alike(layers):
        fewer, count = 1, count - 1
        more = run_on_meta(meta, rows, length, layers=2)
    else:
        fewer, count = count - 1, 1
        more = run_on_meta(meta, rows, length)
    less = run_on_meta(meta, rows, length, layers=fewer)
    layer = more.plus(less, -1)
    return less.plus(layer, count), max(0, layer.saved_bytes)


def _are_alike(layers: nn.ModuleList) -> bool:
    """True where the layers differ in nothing that counts here: classes and shapes."""
    kinds = {(tuple((name, type(module)) for name, module in layer.named_modules()),
              tuple((name, parameter.shape, parameter.requires_grad)
                   for name, parameter in layer.named_parameters()))
             for layer in layers}
    return len(kinds) == 1


def run_on_meta(meta: Any, rows: int, length: int, layers: int | None = None) -> BodyCosts:
    """The costs of a body on the meta device, or its first `layers`, for [rows, length] tokens.

    Raises the model's own error where its shapes depend on numbers.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    attention = _CountingAttention()
    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_, **__: None)
    saved = _SavedBytes(meta)
    body: Any = body_of(meta)
    stack = next((name for name, module in body.named_children()
                  if isinstance(module, nn.ModuleList)), None)
    all_layers: Any = getattr(body, stack) if stack else None
    before = meta.config._attn_implementation
    meta.config._attn_implementation = ATTENTION_NAME
    if stack and layers is not None:
        setattr(body, stack, all_layers[:layers])
    try:
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counter, \
                torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            states = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        forward = float(counter.get_total_flops()) + attention.flops
        if all(parameter.requires_grad for parameter in body.parameters()):
            # Two products for each one of forward.
            return BodyCosts(saved.total(), forward, 2 * forward)
        return BodyCosts(saved.total(), forward,
                         _backward_flops(body, states.last_hidden_state, attention))
    finally:
        meta.config._attn_implementation = before
        if stack:
            setattr(body, stack, all_layers)


def _backward_flops(body: nn.Module, states: Tensor, attention: _CountingAttention) -> float:
    """FLOPs of the backward pass of a body of which a part is frozen, from its hidden states."""
    if not states.requires_grad:
        return 0.0
    attention.flops = 0.0
    with FlopCounterMode(display=False) as counter:
        states.sum().backward()
    for parameter in body.parameters():
        parameter.grad = None
    return float(counter.get_total_flops()) + attention.flops


class _SavedBytes:
    """Bytes of the storages that autograd keeps, each counted once; weights are not counted."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.sizes: dict[int, int] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.sizes[storage._cdata] = storage.nbytes()
        return tensor

    def total(self) -> int:
        return sum(self.sizes.values())


class _CountingAttention:
    """An attention for transformers that computes nothing, and counts the FLOPs of a causal one."""

    def __init__(self) -> None:
        self.flops = 0.0

    def __call__(self, _: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any,
                 **___: Any) -> tuple[Tensor, None]:
        # Two products of 2 FLOPs an element pair, half of each masked. query, key: [rows, heads,
        # length, head width].
        flops = 2 * query.numel() * key.shape[2]
        self.flops += flops

        def count_backward() -> None:
            self.flops += 2 * flops

        return _FusedAttention.apply(query, key, value, count_backward), None


class _FusedAttention(torch.autograd.Function):
    """Keeps for backward the tensors of a fused attention: its three inputs and its output.

    count_backward: called once backward has come so far.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor,
                count_backward: Callable[[], None]) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        ctx.count_backward = count_backward
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        ctx.count_backward()
        return (*map(torch.empty_like, ctx.saved_tensors[:3]), None)
