"""Rows of token ids as one padded micro-batch of tensors.

Rows of one length need no padding, but prompts and conversations differ in length. A micro-batch
is padded on the right, to its longest row only: a causal model attends to nothing after a token,
so no attention mask is needed, and short rows cost less than seq_length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from amid_ds.data.pack import PackedRow
from amid_ds.distributed.transfer import to_device
from amid_ds.errors import InputError
from amid_ds.losses import IGNORE_INDEX, SparseTargets


class Documents(NamedTuple):
    """The documents of B rows, on the host: attention keeps them apart by their boundaries.

    starts: for each row the columns at which its documents begin, 0 first, and last the column at
        which its padding does, or the row's length.
    """

    starts: tuple[tuple[int, ...], ...]

    def boundaries(self, length: int) -> list[int]:
        """Where each document begins in the rows laid end to end, padded to `length`; then the end.

        A row's padding counts as a document.
        """
        return [*(row * length + start for row, starts in enumerate(self.starts)
                  for start in starts if start < length), len(self.starts) * length]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows, padded on the right to its longest row.

    input_ids: [B, L] int64.
    labels: [B, L] int64, the next token of each position, IGNORE_INDEX without a loss.
    positions: [B, L] int64, each token's index in its document, by which a model also tells
        isolated documents apart; None if each row is one document.
    padding: the number of the B × L inputs that are padding.
    rows: the rows' numbers in the prepared data.
    sources: the location of each row's first token, "corpus.jsonl line 17" or
        "corpus.parquet row 16".
    documents: where the rows' documents begin; None: not known, `positions` have to tell.
    row_sources: of each row, the index of its source in data.train; None: not known.
    for_teacher: the same text as a teacher reads it that knows fewer tokens (grown.py); None: it
        reads these rows. It has as many `valid`, in the same order.
    teacher_targets: what a cache holds of the teacher at the positions `valid`, in their order;
        None: no cache.
    valid: [n] int64, which of the B · L positions have a label, in their order. It is made on the
        host, because a GPU would have to be waited for to know n.
    sequences: [n] int64, the sequence of each of these: of the documents with a label, in order and
        from 0, the one that it is in. Documents that are not kept apart are one, their row.
    sequence_count: the number of these sequences.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None
    padding: int
    rows: list[int]
    sources: list[str]
    documents: Documents | None = None
    row_sources: list[int] | None = None
    for_teacher: Batch | None = None
    teacher_targets: SparseTargets | None = None
    valid: torch.Tensor = field(init=False)
    sequences: torch.Tensor = field(init=False)
    sequence_count: int = field(init=False)

    def __post_init__(self) -> None:
        valid = np.flatnonzero(self.labels.numpy() != IGNORE_INDEX)
        document = np.searchsorted(self._boundaries(), valid, "right")
        # Numbers without gaps: documents without a label have none.
        begins = np.diff(document, prepend=-1) != 0
        for name, value in (("valid", torch.from_numpy(valid)),
                            ("sequences", torch.from_numpy(np.cumsum(begins) - 1)),
                            ("sequence_count", int(begins.sum()))):
            object.__setattr__(self, name, value)

    def _boundaries(self) -> NDArray[np.int64]:
        """Where documents begin in the rows laid end to end, and where a row's padding does."""
        rows, length = self.labels.shape
        if self.documents is not None:
            return np.array(self.documents.boundaries(length), np.int64)
        if self.positions is not None:
            return np.flatnonzero(self.positions.numpy() == 0)
        return np.arange(0, rows * length, length)

    def to(self, device: torch.device | str) -> Batch:
        """A copy on `device`, which nothing waits for."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                object.__setattr__(moved, name, to_device(value, device))
            elif isinstance(value, SparseTargets):
                object.__setattr__(moved, name, value.map(partial(to_device, device=device)))
        if self.for_teacher is not None:
            object.__setattr__(moved, "for_teacher", self.for_teacher.to(device))
        return moved

    @property
    def as_teacher_reads(self) -> Batch:
        """`for_teacher`, or these rows."""
        return self if self.for_teacher is None else self.for_teacher

    @property
    def targets(self) -> torch.Tensor:
        """[n] int64, the labels of the positions `valid`."""
        return self.labels.flatten().index_select(0, self.valid)

    @property
    def source_numbers(self) -> torch.Tensor:
        """[n] int64 on the host, the index in data.train of each one's source. Of a batch there."""
        assert self.row_sources is not None
        rows = self.valid.numpy() // self.labels.shape[1]
        return torch.from_numpy(np.array(self.row_sources, np.int64)[rows])

    def sequence_weights(self, sequences: float) -> torch.Tensor:
        """[n] fp32 on the host: 1 / (sequences · tokens with a label in the token's sequence).

        `sequences` of the global batch: the sum with these weights is then the mean over its
        sequences of the mean over each one's tokens. Of a batch on the host.
        """
        numbers = self.sequences.numpy()
        return torch.from_numpy(1 / (sequences * np.bincount(numbers)[numbers])).float()


class TokenRow(NamedTuple):
    """One row of n token ids, as arrays.

    tokens: [n] integers.
    loss_spans: [start, stop, ...] of the tokens that are predicted.
    doc_starts: positions at which further documents begin, isolated from the ones before.
    source: the location of the row's first token.
    """

    tokens: NDArray[Any]
    loss_spans: NDArray[np.int32]
    doc_starts: NDArray[np.int32]
    source: str

    @classmethod
    def from_packed(cls, row: PackedRow, source: str) -> TokenRow:
        """A packed row as arrays, with the location of its first token."""
        return cls(np.array(row.tokens), np.array(row.loss_spans, np.int32),
                   np.array(row.doc_starts, np.int32), source)


def require_ids_below(vocab_size: int, batches: Iterable[Batch]) -> None:
    """Raise InputError, naming the row, for a label that is no id below `vocab_size`.

    On the host, before the losses take it for granted: a device would have to be waited for.
    """
    for batch in batches:
        targets = batch.targets.numpy()
        wrong = np.flatnonzero((targets < 0) | (targets >= vocab_size))
        if len(wrong):
            row = int(batch.valid[wrong[0]]) // batch.labels.shape[1]
            raise InputError(f"{batch.sources[row]}: a token of id {targets[wrong[0]]}",
                             f"ids below {vocab_size}, those of the tokenizer",
                             "prepare the data with the tokenizer of the models")


def collate_rows(rows: Sequence[TokenRow], numbers: list[int],
                 row_sources: list[int] | None = None) -> Batch:
    """The rows as one micro-batch. numbers: theirs in the prepared data; row_sources: see Batch."""
    length = max(len(row.tokens) for row in rows) - 1
    # The model reads padding as token 0; nothing depends on it.
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.arange(length).repeat(len(rows), 1)
    labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.tokens.astype(np.int64))
        input_ids[i, :len(ids) - 1] = ids[:-1]
        for start in row.doc_starts:
            positions[i, start:] = torch.arange(length - start)
        for start, stop in zip(row.loss_spans[::2], row.loss_spans[1::2], strict=True):
            labels[i, start - 1:stop - 1] = ids[start:stop]
    padding = input_ids.numel() - sum(len(row.tokens) - 1 for row in rows)
    isolated = any(len(row.doc_starts) for row in rows)
    return Batch(input_ids, labels, positions if isolated else None, padding, numbers,
                 [row.source for row in rows], Documents(tuple(map(_document_starts, rows))),
                 row_sources)


def _document_starts(row: TokenRow) -> tuple[int, ...]:
    """The row's part of `Documents.starts`."""
    length = len(row.tokens) - 1
    return (0, *(start for start in row.doc_starts.tolist() if start < length), length)
