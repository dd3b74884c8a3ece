"""What a causal LM does to its head's product, found by asking the model itself.

Families differ: Cohere multiplies its logits by `logit_scale`, Granite divides them by
`logits_scaling`, HyperCLOVAX multiplies them by it, Gemma 2 and RecurrentGemma cap them under two
names. So no config is read here. The model's own forward runs once, its body replaced by one that
returns known hidden states and its head by one that hands them on: what comes out is the function
itself. No weight is touched, so a model on the meta device or in shards answers too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from amid_ds.errors import InputError
from amid_ds.models.shape import body_of, head_module

# Products that are powers of two: a scale is read from the smallest, a cap from the largest.
SMALLEST, LARGEST = 2.0**-30, 2.0**24
PROBES = torch.tensor([SMALLEST, LARGEST, *(sign * 2.0**power for power in range(-4, 8)
                                            for sign in (-1, 1))], dtype=torch.float64)


class HeadForm(NamedTuple):
    """logits = scale · (h Wᵀ + b), then softcap · tanh(logits / softcap) if there is a cap."""

    scale: float
    softcap: float | None

    def apply(self, product: Tensor) -> Tensor:
        """The logits of h Wᵀ + b."""
        logits = self.scale * product
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


_known: WeakKeyDictionary[nn.Module, HeadForm] = WeakKeyDictionary()


def head_form(model: nn.Module) -> HeadForm:
    """The form of a causal LM's head. Raises InputError if it is another than HeadForm's."""
    if model not in _known:
        _known[model] = _measure(model)
    return _known[model]


def _measure(model: nn.Module) -> HeadForm:
    try:
        logits = _logits_of_probes(model)
        # Without the last digits, which are the rounding of a cap's division.
        scale = float(f"{float(logits[0]) / SMALLEST:.12g}")
        # A cap is reached at the largest probe; without one that would be scale · LARGEST.
        top = float(logits[1])
        form = HeadForm(scale, None if abs(top) > scale * LARGEST / 2 else top)
        understood = (scale > 0 and (form.softcap is None or form.softcap > 0)
                      and torch.allclose(form.apply(PROBES), logits, rtol=1e-4, atol=1e-6))
        problem = "its logits are another function of the head's product"
    # A forward that does more than call its body and its head fails in as many ways.
    except Exception as error:
        understood, form = False, HeadForm(1.0, None)
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not understood:
        raise InputError(f"the head of {type(model).__name__} is not understood: {problem}",
                         "logits = scale · (h Wᵀ + b), with or without a soft cap",
                         "this architecture changes its logits in a way that the loss does not "
                         "know; choose another model")
    return form


@torch.no_grad()
def _logits_of_probes(model: Any) -> Tensor:
    """The model's logits [n] in float64 where its head's product is PROBES [n]."""
    hidden = PROBES[None, None]
    body = body_of(model)
    with (_replaced(model, body, _Stub(body, lambda: _BodyOutput(hidden))),
          _replaced(model, head_module(model), _HandsOn())):
        output = model.forward(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    logits: Tensor = output.logits
    if logits.shape != hidden.shape:
        raise ValueError(f"{hidden.shape[-1]} products made logits of shape {list(logits.shape)}")
    return logits[0, 0].double()


@contextlib.contextmanager
def _replaced(model: nn.Module, module: nn.Module, other: Any) -> Iterator[None]:
    """A context in which `other` stands wherever `module` is a submodule of `model`."""
    places = [(parent, name) for parent in model.modules()
              for name, child in parent._modules.items() if child is module]
    for parent, name in places:
        parent._modules[name] = other
    try:
        yield
    finally:
        for parent, name in places:
            parent._modules[name] = module


class _BodyOutput:
    """What a body returns, of which only the hidden states are there."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None

    def get(self, name: str, default: Any = None) -> Any:
        return default


class _Stub:
    """Stands for a body: a call returns known hidden states, all else is the body's own."""

    def __init__(self, module: nn.Module, result: Any) -> None:
        self._module, self._result = module, result

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._result()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        # OPT calls its body's decoder.
        return _Stub(value, self._result) if isinstance(value, nn.Module) else value


class _HandsOn(nn.Module):
    """Stands for a head: its input is its output."""

    def __init__(self) -> None:
        super().__init__()
        # Some models cast to the head's dtype.
        self.weight = torch.empty(0, dtype=torch.float64)
        self.bias = None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden
