"""Sizes and FLOPs of one model on one rank, counted on torch's meta device; no weights are read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from amid_ds.config.recipe import Recipe, Student, Teacher
from amid_ds.engine.optimizer import parameter_groups
from amid_ds.errors import InputError
from amid_ds.models import loading
from amid_ds.models.adapters import is_adapted, is_adapter
from amid_ds.models.experts import ExpertLayer, expert_layers
from amid_ds.models.fit import require_positions
from amid_ds.models.router_loss import kept_bytes_per_token, router_weights
from amid_ds.models.shape import body_of, embedding_of, head_module, layers_of
from amid_ds.models.sizes import (
    active_intermediate_size,
    score_elements,
    teacher_bytes_per_token,
)
from amid_ds.models.tensor_parallel import (
    WholePart,
    shrink_to_tp_rank,
    split_parameters,
    whole_parts,
)
from amid_ds.models.tp_plan import blocks_of
from amid_ds.models.trained import choose_trained
from amid_ds.planning.body_costs import BodyCosts, count_body
from amid_ds.planning.stand_ins import has_scans

# Summed logits are in fp32 (losses/summed_head.py).
FP32_LOGIT_BYTES = 4


@dataclass(frozen=True)
class WeightCounts:
    """Elements of a model's weights: of the model, and on one rank before ZeRO."""

    total: int
    # The part of each weight that a rank of a tensor- or expert-parallel group has, in the model's
    # order.
    sizes: tuple[int, ...]
    # Which of them every rank of the group has: ZeRO-3 partitions them over all ranks.
    is_shared: tuple[bool, ...]

    @cached_property
    def tp_rank(self) -> int:
        """Elements of a rank of the group."""
        return sum(self.sizes)

    @cached_property
    def tp_shared(self) -> int:
        """Of `tp_rank`, those that every rank of the group has."""
        return sum(itertools.compress(self.sizes, self.is_shared))

    def partition(self, copies: int, group: int) -> int:
        """A rank's part where ZeRO-3 shards over so many groups of so many ranks."""
        return sum(-(-size // (copies * (group if shared else 1)))
                   for size, shared in zip(self.sizes, self.is_shared, strict=True))

    def buckets(self, elements: int, larger_than: int = 0) -> int:
        """The number of buckets of at least `elements`, filled in the model's order.

        larger_than: weights of no more elements are in none.
        """
        count = filled = 0
        for size in self.sizes:
            filled += size if size > larger_than else 0
            if filled >= max(1, elements):
                count, filled = count + 1, 0
        return count + (filled > 0)


@dataclass(frozen=True)
class ModelCosts:
    """One model on one rank, for one micro-batch. Counts are of elements unless named otherwise."""

    weights: WeightCounts
    # Those of a student's that are trained: they alone have gradients and moments, are reduced and
    # saved. None of a teacher's are.
    trained: WeightCounts
    # Of a student's, those that Muon steps; it needs ZeRO-3 and no tensor parallelism.
    muon: WeightCounts
    # Bytes of an element, on a rank and in the files (of several models in the mean), and of a
    # logit as the loss makes it.
    element_size: int
    stored_size: float
    logit_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    # The most that ZeRO-3 gathers at once: a layer or the head.
    largest_gather: int
    # And where the head's weight is its own 0.
    embedding: int
    tied_embedding: int
    # This rank's rows of the head; 0 or the same where its weight is the embedding's or not.
    head: int
    untied_head: int
    # A gradient of the head's size is made, whatever of it is trained.
    head_is_trained: bool
    # Its weight and its adapter's are put side by side.
    head_is_copied: bool
    # A weight of the body is trained, so a gradient comes back through the head.
    body_is_trained: bool
    # The weights that the files hold, but for adapters, which are new.
    stored: WeightCounts
    # This rank's part of the body.
    body: BodyCosts
    # Of the model's weights, those that a token passes; and of this rank's, the most that the
    # experts of one layer have, which ZeRO-3 gathers together.
    active: int
    expert_gather: int
    # Bytes per token that the losses of a student's routers keep for backward. Where there are
    # some, the body runs over several micro-batches once more, before.
    router_bytes: int
    # Of each token, rows of the hidden size that expert parallelism brings to this rank, through
    # all layers of experts one way.
    exchanged_rows: float
    # Scans of its body keep what fused kernels would.
    has_fused_scans: bool
    # Elements per token that a tensor-parallel group sums in forward, and in backward.
    tp_forward_width: int
    tp_backward_width: int
    # What of the layers each of its ranks holds, and computes, whole.
    whole_parts: tuple[WholePart, ...]
    # By models/sizes.py; 0 for a student. And of them the scores of eager attention.
    bytes_per_teacher_token: int
    score_bytes_per_teacher_token: int

    def kept_bytes(self, tokens: int) -> int:
        """Bytes kept for backward of the body and of its routers' losses."""
        return self.body.saved_bytes + tokens * self.router_bytes

    def checkpointed_bytes(self, tokens: int) -> int:
        """The same when layers are recomputed: their inputs, and all outside."""
        outside = self.kept_bytes(tokens) - self.body.layers_bytes
        return outside + self.layers * tokens * self.hidden_size * self.element_size


def summed_costs(models: Mapping[str, ModelCosts]) -> ModelCosts | None:
    """The costs of models that run one after another and whose logits are summed; None of none."""
    costs = list(models.values())
    if len(costs) < 2:
        return next(iter(costs), None)
    weights = WeightCounts(sum(each.weights.total for each in costs),
                           sum((each.weights.sizes for each in costs), ()),
                           sum((each.weights.is_shared for each in costs), ()))
    stored = sum(each.weights.total * each.stored_size for each in costs)
    added = ("hidden_size", "layers", "embedding", "tied_embedding", "head", "untied_head",
             "active", "exchanged_rows", "tp_forward_width", "tp_backward_width")
    largest = ("element_size", "intermediate_size", "largest_gather", "expert_gather",
               "bytes_per_teacher_token", "score_bytes_per_teacher_token")
    return replace(
        costs[0], weights=weights, stored=weights, stored_size=stored / weights.total,
        logit_size=FP32_LOGIT_BYTES,
        body=BodyCosts(*(sum(of_models) for of_models in zip(*(each.body for each in costs),
                                                             strict=True))),
        **{name: sum(getattr(each, name) for each in costs) for name in added},
        **{name: max(getattr(each, name) for each in costs) for name in largest})


_COUNTED: dict[tuple[object, ...], ModelCosts] = {}


def count_model(model: Student | Teacher, dtype: torch.dtype, recipe: Recipe,
                whole: bool = False, fused: bool = True) -> ModelCosts:
    """The costs of `model` in `dtype` on one rank of a group of recipe.tensor_parallel.

    whole: the ranks of the group do not split it. fused: by body_costs.count_body. Counted once by
    this process; the same on any number of ranks. Raises InputError for one that does not run on
    the meta device.
    """
    train = recipe.train
    config = loading.model_config(model.model, **model.hub_kwargs).to_json_string(use_diff=False)
    key = (model.model, model.revision, type(model), config, dtype, whole, fused,
           recipe.tensor_parallel, train.micro_batch_size, train.seq_length, train.optimizer,
           recipe.expert_parallel, _trained_part(model))
    if key not in _COUNTED:
        _COUNTED[key] = _count_model(model, dtype, recipe, whole, fused)
    return _COUNTED[key]


def _trained_part(model: Student | Teacher) -> str:
    """What of a student trains, and by which routers' loss, in words that differ where that does.
    """
    return (f"{model.lora} {model.freeze} {model.router_aux_loss}" if isinstance(model, Student)
            else "")


def _count_model(model: Student | Teacher, dtype: torch.dtype, recipe: Recipe,
                 whole: bool, fused: bool) -> ModelCosts:
    meta: Any = loading.supported_model(model.model, **model.hub_kwargs)
    if isinstance(model, Student):
        choose_trained(meta, model)
    # Some make parameters by functions that know no default device (DiffLlama).
    meta.to("meta", dtype)
    require_positions(meta, f"the model {model.model}", recipe.train.seq_length)
    tp = recipe.tensor_parallel
    counts = _counts_by_use(meta, isinstance(model, Student), recipe, whole)
    active = counts["weights"].total - idle_weights(meta)
    output = head_module(meta)
    head, embedding = output.weight, embedding_of(meta).weight
    of_head = {id(parameter) for parameter in output.parameters()}
    body_is_trained = any(parameter.requires_grad and id(parameter) not in of_head
                          for parameter in meta.parameters())
    left_whole = () if whole or tp == 1 else tuple(whole_parts(meta, blocks_of(meta, tp)))
    # From here on `meta` has the shapes of one tensor-parallel rank.
    forward_width, backward_width = (0, 0) if whole else shrink_to_tp_rank(meta, tp)
    if backward_width and counts["trained"].total < counts["weights"].total:
        backward_width -= _width_without_gradient(meta)
    of_experts = expert_layers(meta)
    # Ranks that divide the experts of each layer.
    ep = 1 if whole else recipe.expert_parallel
    body = _counted_body(meta, model, recipe, fused)
    element_size = dtype.itemsize
    return ModelCosts(
        **counts,
        element_size=element_size,
        logit_size=element_size,
        stored_size=loading.checkpoint_dtype(model.model, **model.hub_kwargs).itemsize,
        hidden_size=head.shape[1],
        intermediate_size=active_intermediate_size(meta),
        layers=len(layers_of(meta)),
        largest_gather=max(_largest_layer(meta, of_experts, ep), head.numel() // tp),
        embedding=embedding.numel(),
        tied_embedding=embedding.numel() if head is embedding else 0,
        head=head.numel() // tp,
        untied_head=0 if head is embedding else head.numel() // tp,
        head_is_trained=head.requires_grad or is_adapted(output),
        head_is_copied=is_adapted(output),
        body_is_trained=(body_is_trained or is_adapted(output)
                         or (head is embedding and head.requires_grad)),
        body=body,
        active=active,
        expert_gather=max((sum(p.numel() for p in meta.get_submodule(layer.name).parameters())
                           for layer in of_experts), default=0) // ep,
        router_bytes=(kept_bytes_per_token(of_experts, router_weights(
                          meta, of_experts, model.router_aux_loss))
                      if isinstance(model, Student) else 0),
        exchanged_rows=sum(_remote_ranks(layer, ep) for layer in of_experts),
        has_fused_scans=fused and has_scans(meta),
        tp_forward_width=forward_width,
        tp_backward_width=backward_width,
        whole_parts=left_whole,
        bytes_per_teacher_token=0 if isinstance(model, Student) else teacher_bytes_per_token(
            [meta], element_size, recipe.train.seq_length),
        score_bytes_per_teacher_token=0 if isinstance(model, Student) else (
            score_elements(meta, recipe.train.seq_length) * element_size))


def _counted_body(meta: nn.Module, model: Student | Teacher, recipe: Recipe, fused: bool
                  ) -> BodyCosts:
    """`count_body` of a micro-batch. Raises InputError where the model does not run so."""
    train = recipe.train
    try:
        return count_body(meta, train.micro_batch_size, train.seq_length, fused,
                          backward=isinstance(model, Student))
    # Whatever its own code raises where tensors have no numbers.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{model.model} does not run on torch's meta device, so there is no plan: {reason}",
            "a model whose shapes do not depend on numbers", "train it without a plan") from None


def _largest_layer(meta: nn.Module, of_experts: Sequence[ExpertLayer], parts: int) -> int:
    """Elements of the largest layer of a rank that has one of `parts` of its experts."""
    experts = {id(p) for layer in of_experts for p in meta.get_submodule(layer.name).parameters()}
    return max((sum(p.numel() // (parts if id(p) in experts else 1) for p in layer.parameters())
                for layer in layers_of(meta)), default=0)


def _remote_ranks(layer: ExpertLayer, expert_parallel: int) -> float:
    """Other ranks of a group that a token's experts are on in the mean, if all are as likely.

    A rank is spared where none of the choices falls on its part.
    """
    own = layer.experts // expert_parallel
    spared = math.comb(layer.experts - own, layer.chosen) / math.comb(layer.experts, layer.chosen)
    return (expert_parallel - 1) * (1 - spared)


def idle_weights(meta: nn.Module) -> int:
    """Weights of the experts that a token does not pass."""
    return sum(parameter.numel() * (layer.experts - layer.chosen) // layer.experts
               for layer in expert_layers(meta)
               for name, parameter in meta.get_submodule(layer.name).named_parameters()
               if parameter.ndim > 1 and parameter.shape[0] % layer.experts == 0)


def _counts_by_use(meta: nn.Module, trains: bool, recipe: Recipe,
                   whole: bool) -> dict[str, WeightCounts]:
    """The weights of `meta`, not yet shrunk, by the fields of ModelCosts that count them."""
    split = set() if whole else split_parameters(meta, recipe.tensor_parallel)
    parts = recipe.tensor_parallel
    if recipe.expert_parallel > 1 and not whole:
        # The two exclude each other, and ZeRO-3 shards a part of the experts as it does a part of
        # the columns.
        parts = recipe.expert_parallel
        split = {f"{layer.name}.{name}" for layer in expert_layers(meta)
                 for name, _ in meta.get_submodule(layer.name).named_parameters()}
    named = dict(meta.named_parameters())
    groups = parameter_groups(meta, recipe.train) if trains else {}
    uses = {"weights": named.keys(), "stored": {name for name in named if not is_adapter(name)},
            "trained": {name for name, each in named.items() if trains and each.requires_grad},
            "muon": {name for name, group in groups.items() if group == "muon"}}
    return {use: _count_weights(meta, parts, split, names)
            for use, names in uses.items()}


def _count_weights(meta: nn.Module, parts: int, split: Collection[str], names: Collection[str]
                   ) -> WeightCounts:
    """The weights of these names, of which those in `split` are divided into `parts`."""
    total, sizes, is_shared = 0, [], []
    for name, parameter in meta.named_parameters():
        if name not in names:
            continue
        size = parameter.numel()
        total += size
        sizes.append(-(-size // parts) if name in split else size)
        is_shared.append(parts > 1 and name not in split)
    return WeightCounts(total, tuple(sizes), tuple(is_shared))


def _width_without_gradient(meta: Any) -> int:
    """Elements per token of the inputs of column-wise layers below which nothing is trained: a
    tensor-parallel group has no gradient of them to sum."""
    body, width = body_of(meta), 0

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal width
        if not inputs[0].requires_grad:
            width += inputs[0].shape[-1]

    hooks = [module.register_forward_pre_hook(count) for module in body.modules()
             if getattr(module, "sums_input_gradient", False)]
    count_body(meta, 1, 2, backward=False, every_layer=True)
    for hook in hooks:
        hook.remove()
    return width
