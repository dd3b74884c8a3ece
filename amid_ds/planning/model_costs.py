"""Sizes and FLOPs of one model on one rank, counted on torch's meta device (shapes, no numbers).

The body runs once, forward only: autograd's saved tensors give the activation memory, torch's
counter the FLOPs. Attention is replaced by one that keeps the tensors a fused kernel would.
No weights are read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from amid_ds.config.recipe import Recipe, Student, Teacher
from amid_ds.engine.optimizer import parameter_groups
from amid_ds.errors import InputError
from amid_ds.models import loading
from amid_ds.models.fit import require_positions
from amid_ds.models.heads import body_of, head_of
from amid_ds.models.sizes import intermediate_size, teacher_bytes_per_token
from amid_ds.models.tensor_parallel import shrink_to_tp_rank, split_parameters

# The name under which the counting attention is registered with transformers.
ATTENTION_NAME = "planned"


class WeightCounts(NamedTuple):
    """Elements of a model's weights: of the model, and on one rank."""

    total: int
    # A tensor-parallel rank's part, before ZeRO.
    tp_rank: int
    # Of `tp_rank`, those that every rank of the tensor-parallel group has: ZeRO-3 partitions them
    # over all ranks.
    tp_shared: int
    # A rank's part under ZeRO-3.
    zero3_rank: int


class BodyCosts(NamedTuple):
    """Of one micro-batch through a body: bytes kept for backward, FLOPs of the forward pass."""

    saved_bytes: int
    flops: float


@dataclass(frozen=True)
class ModelCosts:
    """One model on one rank, for one micro-batch. Counts are of elements unless named otherwise."""

    weights: WeightCounts
    # Of a student's, those that Muon steps; it needs ZeRO-3 and no tensor parallelism.
    muon: WeightCounts
    # Bytes of an element.
    element_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    # The most that ZeRO-3 gathers at once: a layer or the head.
    largest_gather: int
    embedding: int
    # This rank's rows of the head.
    head: int
    # The head's weight is the embedding's.
    head_is_tied: bool
    # This rank's part of the body; of its saved bytes, one layer's.
    body: BodyCosts
    layer_saved_bytes: int
    # Elements per token that AutoTP sums over its group in forward, and in backward.
    tp_forward_width: int
    tp_backward_width: int
    # By models/sizes.py; 0 for a student.
    bytes_per_teacher_token: int

    def checkpointed_bytes(self, tokens: int) -> int:
        """Bytes kept for backward when layers are recomputed: their inputs, and all outside."""
        outside = self.body.saved_bytes - self.layers * self.layer_saved_bytes
        return outside + self.layers * tokens * self.hidden_size * self.element_size


def count_model(model: Student | Teacher, dtype: torch.dtype, recipe: Recipe,
                data_parallel: int) -> ModelCosts:
    """The costs of `model` in `dtype` on one of data_parallel x recipe.tensor_parallel ranks.

    Raises InputError for a model that does not run on the meta device.
    """
    meta: Any = loading.supported_model(model.model, **model.hub_kwargs).to(dtype)
    require_positions(meta, f"the model {model.model}", recipe.train.seq_length)
    tp = recipe.tensor_parallel
    replicated = isinstance(model, Teacher) and model.placement == "replicated"
    weights = count_weights(meta, tp, data_parallel, replicated)
    muons = ([name for name, group in parameter_groups(meta, recipe.train).items()
              if group == "muon"] if isinstance(model, Student) else [])
    muon = count_weights(meta, tp, data_parallel, replicated, muons)
    head, embedding = head_of(meta).weight, meta.get_input_embeddings().weight
    # From here on `meta` has the shapes of one tensor-parallel rank.
    forward_width, backward_width = (0, 0) if replicated else shrink_to_tp_rank(meta, tp)
    layers = _layers_of(meta)
    largest_layer = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)
    hidden_size, seq_length = head.shape[1], recipe.train.seq_length
    try:
        body, layer_saved_bytes = _count_body(meta, recipe.train.micro_batch_size, seq_length,
                                              len(layers))
    # NotImplementedError is a RuntimeError.
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{model.model} does not run on torch's meta device, so there is no plan: {reason}",
            "a model whose shapes do not depend on numbers", "train it without a plan") from None
    element_size = dtype.itemsize
    return ModelCosts(
        weights=weights,
        muon=muon,
        element_size=element_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size(meta.config, hidden_size),
        layers=len(layers),
        largest_gather=max(largest_layer, head.numel() // tp),
        embedding=embedding.numel(),
        head=head.numel() // tp,
        head_is_tied=head is embedding,
        body=body,
        layer_saved_bytes=layer_saved_bytes,
        tp_forward_width=forward_width,
        tp_backward_width=backward_width,
        bytes_per_teacher_token=(teacher_bytes_per_token(meta.config, element_size, seq_length)
                                 if isinstance(model, Teacher) else 0))


def count_weights(meta: nn.Module, tensor_parallel: int, data_parallel: int,
                  replicated: bool, names: Collection[str] | None = None) -> WeightCounts:
    """The weights of `meta`, not yet shrunk; `replicated`: tensor parallelism splits none.

    names: of the parameters that count; None: all.
    """
    split = set() if replicated else split_parameters(meta, tensor_parallel)
    total = tp_rank = tp_shared = zero3_rank = 0
    for name, parameter in meta.named_parameters():
        if names is not None and name not in names:
            continue
        size = parameter.numel()
        part = -(-size // tensor_parallel) if name in split else size
        total += size
        tp_rank += part
        # Shared weights are partitioned over all ranks, the others over the data-parallel ones.
        if part == size and tensor_parallel > 1:
            tp_shared += size
            zero3_rank += -(-size // (data_parallel * tensor_parallel))
        else:
            zero3_rank += -(-part // data_parallel)
    return WeightCounts(total, tp_rank, tp_shared, zero3_rank)


def _layers_of(model: nn.Module) -> nn.ModuleList:
    """The body's stack of layers; an empty list where it has none."""
    stacks = (module for module in body_of(model).modules() if isinstance(module, nn.ModuleList))
    return next(stacks, nn.ModuleList())


def _count_body(meta: Any, rows: int, length: int, layers: int) -> tuple[BodyCosts, int]:
    """The body's costs, and one layer's kept bytes: the difference that one layer less makes."""
    body = run_on_meta(meta, rows, length)
    if layers < 2:
        return body, max(0, body.saved_bytes)
    one_less = run_on_meta(meta, rows, length, layers=layers - 1)
    return body, max(0, body.saved_bytes - one_less.saved_bytes)


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
        del states
        return BodyCosts(saved.total(), float(counter.get_total_flops()) + attention.flops)
    finally:
        meta.config._attn_implementation = before
        if stack:
            setattr(body, stack, all_layers)


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
        self.flops += 2 * query.numel() * key.shape[2]
        return _FusedAttention.apply(query, key, value), None


class _FusedAttention(torch.autograd.Function):
    """Keeps for backward the tensors of a fused attention: its three inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError
