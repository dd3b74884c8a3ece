"""Layers with a state along the row, run on each document alone.

Gated delta nets, state-space layers, linear recurrences and short convolutions carry a state from
token to token, and through a row from document to document: no mask keeps it out. Some kernels take
the documents' boundaries, others do not, a CPU's never do, and a convolution that takes them is no
sign that its recurrence does. So here such a layer gets a row's documents as rows of a batch,
padded on the right: it is causal, so its outputs are those of each document by itself, on every
device and by every kernel. Documents of like length share a call, of which there are `CALLS` for
every row of every rank: ZeRO-3 gathers in the order of the calls, which is then the same everywhere
and in every step.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from amid_ds.distributed.transfer import to_device
from amid_ds.errors import InputError
from amid_ds.models.shape import layers_of

# Boundaries in transformers' names, which tell nothing of a batch in which each row is a document.
BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
# How often a layer's forward is called: each costs a kernel launch, and saves padding.
CALLS = 4


@dataclass(frozen=True)
class _Group:
    """Documents that share a call: [documents, longest], padded on the right.

    tokens [n]: the places of their tokens in the rows laid end to end; slots [n]: in the call.
    """

    documents: int
    longest: int
    tokens: Tensor
    slots: Tensor

    def gather(self, states: Tensor) -> Tensor:
        """[B · L, ...] -> [documents, longest, ...], padded with zeros."""
        padded = states.new_zeros(self.documents * self.longest, *states.shape[1:])
        return padded.index_copy(0, self.slots, states.index_select(0, self.tokens)).unflatten(
            0, (self.documents, self.longest))


@dataclass(frozen=True)
class _Documents:
    """The documents of rows [rows, length]; back [rows · length]: where each token lies in the
    groups' tokens laid end to end."""

    rows: int
    length: int
    groups: tuple[_Group, ...]
    back: Tensor

    @classmethod
    def from_boundaries(cls, boundaries: Sequence[int], rows: int, length: int,
                        device: torch.device) -> _Documents:
        """Of boundaries as `Documents.boundaries` gives them. Nothing waits for the device."""
        spans = sorted(itertools.pairwise(boundaries), key=lambda span: span[0] - span[1])
        shapes, tokens, slots = [], [], []
        for count in _shares([stop - start for start, stop in spans]):
            group, spans = spans[:count], spans[count:]
            longest = group[0][1] - group[0][0]
            shapes.append((count, longest))
            tokens.append(np.concatenate([np.arange(*span) for span in group]))
            slots.append(np.concatenate([number * longest + np.arange(stop - start)
                                         for number, (start, stop) in enumerate(group)]))
        # A call without documents has the first token again. Nobody reads what comes of it.
        for _ in range(CALLS - len(shapes)):
            shapes.append((1, 1))
            tokens.append(np.zeros(1, np.int64))
            slots.append(np.zeros(1, np.int64))
        everywhere = np.concatenate(tokens)
        # The first of equals, which stand at the end.
        back = np.unique(everywhere, return_index=True)[1]
        moved = to_device(torch.from_numpy(np.concatenate(
            [everywhere, np.concatenate(slots), back])), device)
        sizes = [len(each) for each in tokens]
        groups = (_Group(*shape, *places) for shape, *places in zip(
            shapes, *(part.split(sizes) for part in (
                moved[:len(everywhere)], moved[len(everywhere):2 * len(everywhere)])), strict=True))
        return cls(rows, length, tuple(groups), moved[2 * len(everywhere):])

    def of_group(self, value: Any, group: _Group) -> Any:
        """An argument of a layer's forward as the group's: tensors [rows or 1, length, ...]."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.of_group(each, group) for each in value)
        if (not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != self.length
                or value.shape[0] not in (1, self.rows)):
            return value
        return group.gather(value.expand(self.rows, *value.shape[1:]).flatten(0, 1))

    def rejoin(self, outputs: list[Any]) -> Any:
        """The groups' outputs, tensors or tuples of them, as the rows'."""
        first = outputs[0]
        if isinstance(first, (tuple, list)):
            return type(first)(self.rejoin(list(each)) for each in zip(*outputs, strict=True))
        if first is None:
            return None
        if any(states.shape[:2] != (group.documents, group.longest)
               for states, group in zip(outputs, self.groups, strict=True)):
            raise ValueError
        flat = [states.flatten(0, 1).index_select(0, group.slots)
                for states, group in zip(outputs, self.groups, strict=True)]
        return torch.cat(flat).index_select(0, self.back).unflatten(0, (self.rows, self.length))


# The documents of the rows that a body is running on; None: each row is one.
_RUNNING: ContextVar[_Documents | None] = ContextVar("documents", default=None)
# Of models on which `run_documents_alone` was called: they have such layers. Looking for them takes
# milliseconds of a large model's every forward.
_HAS_LAYERS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of the model's layers with a state along the row.

    They are known by a convolution of each channel over the tokens, which all of these families
    have before their recurrence, or instead of one. `check_isolation` finds what is missed.
    """
    return [module for module in layers_of(model).modules()
            if any(isinstance(child, nn.Conv1d) and child.groups == child.in_channels
                   for child in module.children())]


def run_documents_alone(model: nn.Module) -> None:
    """Let the recurrent layers of `model` run on each document alone, in every `running_on`."""
    layers = recurrent_layers(model)
    for layer in layers:
        if not _runs_alone(layer):
            alone = functools.partial(_by_document, layer.forward)
            layer.forward = functools.update_wrapper(alone, layer.forward)
    _HAS_LAYERS[model] = bool(layers)


@contextmanager
def running_on(model: nn.Module, boundaries: Callable[[], Sequence[int]] | None,
               input_ids: Tensor) -> Iterator[None]:
    """In this context the body of `model` runs on the documents of input_ids [B, L].

    boundaries: asked where they are needed, for those of `Documents.boundaries`. None: each row is
    a document.
    """
    if boundaries is not None and model not in _HAS_LAYERS:
        run_documents_alone(model)
    documents = None
    if _HAS_LAYERS.get(model):
        rows, length = input_ids.shape
        starts = (boundaries() if boundaries is not None
                  else range(0, input_ids.numel() + 1, length))
        documents = _Documents.from_boundaries(starts, rows, length, input_ids.device)
    with _running(documents):
        yield


def recomputed_alike() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts in which a checkpointed layer runs, and runs again in backward."""
    documents = _RUNNING.get()
    return _running(documents), _running(documents)


@contextmanager
def _running(documents: _Documents | None) -> Iterator[None]:
    token = _RUNNING.set(documents)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def _runs_alone(layer: nn.Module) -> bool:
    return getattr(layer.forward, "func", None) is _by_document


def _shares(lengths: Sequence[int]) -> list[int]:
    """How many documents, of these lengths and the longest first, share each call.

    At most CALLS numbers, with which the least padding is computed.
    """
    sizes, firsts = np.unique(-np.array(lengths), return_index=True)
    # Documents are parted where their length changes. cost [i, j]: a call of those from cut i to j.
    cuts = np.append(firsts, len(lengths))
    cost = (cuts - cuts[:, None]) * -np.append(sizes, 0)[:, None].astype(float)
    cost[np.tril_indices(len(cuts), -1)] = np.inf
    best, before = np.where(cuts == 0, 0.0, np.inf), []
    for _ in range(CALLS):
        totals = best[:, None] + cost
        before.append(totals.argmin(0))
        best = totals.min(0)
    ends = [len(sizes)]
    for own in reversed(before):
        ends.append(int(own[ends[-1]]))
    return [int(cuts[stop] - cuts[start]) for stop, start in itertools.pairwise(ends)
            if stop > start][::-1]


def _by_document(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `forward`, of a module, gives for each document alone; outside the context its own."""
    documents = _RUNNING.get()
    if documents is None:
        return forward(*args, **options)
    options = {name: value for name, value in options.items() if name not in BOUNDARIES}
    outputs = []
    for group in documents.groups:
        own = documents.of_group((args, tuple(options.values())), group)
        outputs.append(forward(*own[0], **dict(zip(options, own[1], strict=True))))
    try:
        return documents.rejoin(outputs)
    except ValueError:
        raise InputError(
            f"a layer with a state along the row ({forward.__qualname__}) whose output is not one "
            "of each token", "layers that can be run on a row's documents one by one",
            "set data.isolate_documents=false, or choose another model") from None
