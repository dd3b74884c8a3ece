"""What a model's body costs, counted in one run on torch's meta device (shapes, no numbers).

Autograd's saved tensors give the activation memory, torch's counter the FLOPs of forward and
backward; attention, experts and scans are replaced (stand_ins.py). Of the layers of a kind two are
run, and each other one is taken to cost what the second does.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from amid_ds.models.experts import expert_layers
from amid_ds.models.shape import body_of, layers_of
from amid_ds.planning.stand_ins import Ledger, Replaced, attends_eagerly, has_scans, stand_ins

# Layers of a kind that are run; the first may keep what all share.
RUN_OF_A_KIND = 2


class Costs(NamedTuple):
    """Bytes kept for backward; FLOPs of the forward and of the backward pass; and FLOPs of forward
    for experts that were not chosen."""

    saved_bytes: int = 0
    flops: float = 0.0
    backward_flops: float = 0.0
    idle_flops: float = 0.0

    def plus(self, other: Costs, count: int = 1) -> Costs:
        """These costs and `count` times the other ones."""
        return Costs(self.saved_bytes + count * other.saved_bytes,
                     self.flops + count * other.flops,
                     self.backward_flops + count * other.backward_flops,
                     self.idle_flops + count * other.idle_flops)


class BodyCosts(NamedTuple):
    """Of one micro-batch through a body.

    Bytes kept for backward, in all, by all layers, and by the layer that keeps most. FLOPs of the
    forward pass, those of the backward pass, and what forward takes beside them for experts that
    were not chosen.
    """

    saved_bytes: int
    layers_bytes: int
    largest_layer_bytes: int
    flops: float
    backward_flops: float
    idle_flops: float


def count_body(meta: Any, rows: int, length: int, fused: bool = True, backward: bool = True,
               every_layer: bool = False) -> BodyCosts:
    """The costs of a body on the meta device for [rows, length] tokens.

    fused: scans keep what kernels keep, not what transformers' own code does. Attention keeps what
    a kernel does, unless the model's is eager. backward: count it. every_layer: run them all.
    Raises the model's own error where its shapes depend on numbers.
    """
    whole, layers = _run(meta, rows, length, Replaced(), backward, every_layer)
    kernels = Replaced(attention=not attends_eagerly(meta), scans=fused or not has_scans(meta))
    if not all(kernels):
        own, layers = _run(meta, rows, length, kernels, False, every_layer)
        whole = whole._replace(saved_bytes=own.saved_bytes)
    kept = [each.saved_bytes for each in layers]
    flops = whole.flops - whole.idle_flops
    # Of a grouped convolution torch counts the backward pass as if all channels were mixed: forward
    # has a product for at most two of backward's.
    backward_flops = min(whole.backward_flops, 2 * whole.flops) * flops / max(1, whole.flops)
    return BodyCosts(whole.saved_bytes, sum(kept), max([0, *kept]), flops, backward_flops,
                     whole.idle_flops)


def _run(meta: Any, rows: int, length: int, replaced: Replaced, backward: bool,
         every_layer: bool) -> tuple[Costs, list[Costs]]:
    """The costs of the body, and of each layer."""
    body: Any = body_of(meta)
    ledger = Ledger()
    meter = _Meter(meta, ledger, every_layer)
    with (stand_ins(meta, ledger, replaced), meter.metered(rows * length), meter.counter,
            torch.autograd.graph.saved_tensors_hooks(meter.keep, _unpacked)):
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        states = body(input_ids=ids, use_cache=False).last_hidden_state
        forward = meter.now()
        if backward and states.requires_grad:
            # Not a sum, which would count the FLOPs of none.
            states.backward(torch.empty_like(states))
        after = meter.now()
    for parameter in body.parameters():
        parameter.grad = None
    return meter.total(forward._replace(backward_flops=after.flops - forward.flops), after.flops)


class _Kept:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, meter: _Meter, tensor: Tensor) -> None:
        self.meter, self.tensor, storage = meter, tensor, tensor.untyped_storage()
        self.address, self.bytes = storage._cdata, storage.nbytes()
        meter.kept[self.address] += 1
        meter.saved_bytes += self.bytes if meter.kept[self.address] == 1 else 0

    def __del__(self) -> None:
        self.meter.kept[self.address] -= 1
        self.meter.saved_bytes -= self.bytes if not self.meter.kept[self.address] else 0


def _unpacked(kept: _Kept | Tensor) -> Tensor:
    return kept.tensor if isinstance(kept, _Kept) else kept


class _Event:
    """A layer's run: its costs, with FLOPs counted where its backward begins and ends."""

    def __init__(self) -> None:
        self.costs = Costs()
        self.began: float | None = None
        self.ended: float | None = None


class _Meter:
    """Counts a run of `meta`, and lets two layers of a kind run."""

    def __init__(self, meta: nn.Module, ledger: Ledger, every_layer: bool) -> None:
        self.meta, self.ledger, self.every_layer = meta, ledger, every_layer
        self.counter = FlopCounterMode(display=False)
        self.weights = {each.untyped_storage()._cdata for each in meta.parameters()}
        self.kept: Counter[int] = Counter()
        self.saved_bytes, self.idle_flops = 0, 0.0
        self.runs: dict[object, list[_Event]] = {}
        self.outputs: dict[object, Any] = {}
        self.count: Counter[object] = Counter()

    def keep(self, tensor: Tensor) -> _Kept | Tensor:
        """Note a tensor that autograd keeps; each storage once, and no weights."""
        return tensor if tensor.untyped_storage()._cdata in self.weights else _Kept(self, tensor)

    def flops(self) -> float:
        return float(self.counter.get_total_flops()) + self.ledger.flops

    def now(self) -> Costs:
        """What has been counted so far."""
        return Costs(self.saved_bytes, self.flops(), 0.0, self.idle_flops)

    def total(self, ran: Costs, end: float) -> tuple[Costs, list[Costs]]:
        """The costs of the run and of the layers that were left out; and each layer's.

        end: the FLOPs at the end of backward.
        """
        layers: list[Costs] = []
        for kind, events in self.runs.items():
            of_kind = [self._costs(event, end) for event in events]
            others = self.count[kind] - len(of_kind)
            ran = ran.plus(of_kind[-1], others)
            layers += [*of_kind, *([of_kind[-1]] * others)]
        return ran, layers

    @staticmethod
    def _costs(event: _Event, end: float) -> Costs:
        if event.began is None:
            return event.costs
        # Below a layer whose inputs need no gradient, backward does nothing.
        ended = end if event.ended is None else event.ended
        return event.costs._replace(backward_flops=ended - event.began)

    @contextlib.contextmanager
    def metered(self, tokens: int) -> Iterator[None]:
        """A context in which the layers are metered, and experts that run without being chosen."""
        layers = list(layers_of(self.meta))
        own = [layer.__dict__.get("forward") for layer in layers]
        for layer in layers:
            layer.forward = self._layer(layer)
        hooks = [hook for layer in expert_layers(self.meta)
                 for hook in self._watch_experts(layer.name, layer.chosen / layer.experts, tokens)]
        try:
            yield
        finally:
            for layer, before in zip(layers, own, strict=True):
                del layer.forward
                if before is not None:
                    layer.forward = before
            for hook in hooks:
                hook.remove()

    def _layer(self, layer: nn.Module) -> Callable[..., Any]:
        """The layer's forward, or what stands for it where enough of its kind have run."""
        forward, own = layer.forward, _described(layer)

        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten((args, kwargs))
            kind = (own, form, tuple(_described_input(leaf) for leaf in leaves))
            self.count[kind] += 1
            events = self.runs.setdefault(kind, [])
            if len(events) < RUN_OF_A_KIND or self.every_layer:
                events.append(event := _Event())
                args, kwargs = tree_unflatten(
                    [_marked(leaf, lambda: setattr(event, "ended", self.flops()))
                     for leaf in leaves], form)
                before = self.now()
                out = forward(*args, **kwargs)
                event.costs = self.now().plus(before, -1)
                parts, out_form = tree_flatten(out)
                self.outputs[kind] = parts, out_form
                return tree_unflatten(
                    [_marked(part, lambda: _begin(event, self.flops())) for part in parts],
                    out_form)
            parts, out_form = self.outputs[kind]
            needed = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
            return tree_unflatten([_Skipped.apply(part, *needed) if isinstance(part, Tensor)
                                   else part for part in parts], out_form)

        return run

    def _watch_experts(self, name: str, share: float, tokens: int) -> Iterator[Any]:
        """Hooks on the experts of a layer that count what they do beyond a token's own."""
        module = self.meta.get_submodule(name)
        active = sum(each.numel() * (share if each.ndim == 3 else 1)
                     for each in module.parameters() if each.ndim > 1)
        before = 0.0

        def start(*_: Any) -> None:
            nonlocal before
            before = self.flops()

        def end(*_: Any) -> None:
            idle = self.flops() - before - 2 * tokens * active
            # The rest of a block's own arithmetic is no expert's.
            if idle > 0.1 * tokens * active:
                self.idle_flops += idle

        yield module.register_forward_pre_hook(start)
        yield module.register_forward_hook(end)


def _begin(event: _Event, flops: float) -> None:
    if event.began is None:
        event.began = flops


def _described(layer: nn.Module) -> object:
    """What of a layer makes its costs: classes, shapes and settings, but not its number."""
    return (tuple((name, type(module), tuple(
                sorted((key, value) for key, value in vars(module).items()
                       if isinstance(value, (bool, int, float, str)) and "layer_i" not in key)))
                  for name, module in layer.named_modules()),
            tuple((name, parameter.shape, parameter.requires_grad)
                  for name, parameter in layer.named_parameters()))


def _described_input(leaf: Any) -> object:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.requires_grad, getattr(leaf, "pairs", None)
    return type(leaf)


def _marked(leaf: Any, reached: Callable[[], None]) -> Any:
    """A tensor that calls `reached` when its gradient is there; anything else as it is."""
    if not isinstance(leaf, Tensor) or not leaf.requires_grad:
        return leaf
    return _Mark.apply(leaf, reached)


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reached: Callable[[], None]) -> Tensor:
        ctx.reached = reached
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.reached()
        return gradients[0], None


class _Skipped(torch.autograd.Function):
    """An output like one that a layer of the kind has made, of inputs that need gradients."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *inputs: Tensor) -> Tensor:
        ctx.inputs = inputs
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *(torch.empty_like(each) for each in ctx.inputs)
