"""Layers with a state along the row, run on each document alone.

Gated delta nets, state-space layers, linear recurrences and short convolutions carry a state from
token to token, and through a row from document to document: no mask keeps it out. Some kernels take
the documents' boundaries, others do not, a CPU's never do, and a convolution that takes them is no
sign that its recurrence does. So here such a layer gets a row's documents as rows of a batch,
padded on the right: it is causal, so its outputs are those of each document by itself, on every
device and by every kernel. Documents of like length share a call, so less than half of what a call
computes is padding. The layer's own forward is called for each group of them, inside one call of
the module: hooks on the module fire once, whatever the documents.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amid_ds.distributed.transfer import to_device
from amid_ds.errors import InputError
from amid_ds.models.shape import layers_of

# Boundaries in transformers' names, which tell nothing of a batch in which each row is a document.
BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


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
        while spans:
            longest = spans[0][1] - spans[0][0]
            group = [span for span in spans if 2 * (span[1] - span[0]) > longest]
            del spans[:len(group)]
            shapes.append((len(group), longest))
            tokens.append(np.concatenate([np.arange(*span) for span in group]))
            slots.append(np.concatenate([number * longest + np.arange(stop - start)
                                         for number, (start, stop) in enumerate(group)]))
        everywhere = np.concatenate(tokens)
        moved = to_device(torch.from_numpy(np.stack(
            [everywhere, np.concatenate(slots), np.argsort(everywhere)])), device)
        sizes = [len(each) for each in tokens]
        groups = (_Group(*shape, *places) for shape, *places in zip(
            shapes, moved[0].split(sizes), moved[1].split(sizes), strict=True))
        return cls(rows, length, tuple(groups), moved[2])

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


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of the model's layers with a state along the row.

    They are known by a convolution of each channel over the tokens, which all of these families
    have before their recurrence, or instead of one. `check_isolation` finds what is missed.
    """
    return [module for module in layers_of(model).modules()
            if any(isinstance(child, nn.Conv1d) and child.groups == child.in_channels
                   for child in module.children())]


@contextmanager
def documents_alone(model: nn.Module, boundaries: Callable[[], Sequence[int]] | None,
                    input_ids: Tensor) -> Iterator[None]:
    """In this context the recurrent layers of `model` run on each document of input_ids [B, L].

    boundaries: asked where it is needed, for those of `Documents.boundaries`. None: rows are one.
    """
    layers = [] if boundaries is None else recurrent_layers(model)
    if not layers or boundaries is None:
        with _running(None):
            yield
        return
    for layer in layers:
        if getattr(layer.forward, "func", None) is not _by_document:
            layer.forward = functools.partial(_by_document, layer.forward)
    rows, length = input_ids.shape
    with _running(_Documents.from_boundaries(boundaries(), rows, length, input_ids.device)):
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
