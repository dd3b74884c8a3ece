"""A source's rows of text into rows of tokens: framed by the tokenizer's own tokens, encoded many at a time, packed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from amid_ds.config import recipe
from amid_ds.data.chat import Segment
from amid_ds.data.chat import segments as conversation
from amid_ds.data.pack import Counts, Document, Packed, pack_text, pack_together, pack_turns
from amid_ds.data.readers import PIECE_BYTES, Row, by_size
from amid_ds.data.sources import bad_row
from amid_ds.data.tokenizer import document_front, encode, end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 10                          # that many skipped rows are named
BATCH_CHARACTERS = 1 << 18          # handed to the tokenizer at once


@dataclass(frozen=True)
class Packer:
    """How the rows of one source become rows of tokens."""

    source: recipe.Rows
    isolate: bool                   # documents that share a row are kept from one another
    seq_length: int
    on_bad_row: str
    tokenizer: PreTrainedTokenizerBase
    stop: Any = None                # an event that, once set, ends the work between two batches of texts

    def pack(self, documents: Iterator[Document], counts: Counts) -> Iterator[Packed]:
        """Encode the documents and put them into rows."""
        encoded = self._encoded(documents)
        if self.source.is_text:
            return pack_text(encoded, self.seq_length, self.isolate)
        rows = pack_turns(encoded, self.seq_length, self.source.truncate, counts)
        return pack_together(rows, self.seq_length) if self.isolate else rows

    def documents(self, rows: Iterable[Row], file: int, name: Callable[[int], str],
                  counts: Counts) -> Iterator[Document]:
        """The rows that can be used, framed by the tokenizer's own tokens; the others counted, or an error with the
        `name` of the row's number."""
        front, end = document_front(self.tokenizer), [end_of_text(self.tokenizer)]
        for row in rows:
            problem, parts = row.problem, []
            if problem is None:
                try:
                    parts = self._parts(row, front, end)
                except ValueError as error:
                    problem = str(error)
            if problem is not None:
                if self.on_bad_row == "error":
                    raise bad_row(name(row.number), problem)
                if counts.skipped < SHOWN:
                    counts.shown.append(f"{name(row.number)}: {problem}")
                counts.skipped += 1
                continue
            counts.documents += row.ends
            yield from (Document(part, file, row.number, row.begins and index == 0)
                        for index, part in enumerate(parts))

    def _parts(self, row: Row, front: list[int], end: list[int]) -> list[list[Segment]]:
        """What the row is to be encoded as: one document, or the pieces of a long text, which are packed one by one."""
        if self.source.messages is not None:
            return [conversation(self.tokenizer, row.values[0])]
        if not self.source.is_text:
            return [[(front, False), (row.values[0], False), (row.values[1], True), (end, True)]]
        parts: list[list[Segment]] = [[(piece, True)] for piece in _pieces(row.values[0])]
        parts[0].insert(0, (front if row.begins else [], True))
        parts[-1].append((end if row.ends else [], True))
        return parts

    def _encoded(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents with their texts as ids, encoded many at a time."""
        for batch in by_size(documents, Document.__len__, BATCH_CHARACTERS):
            if self.stop is not None and self.stop.is_set():
                raise KeyboardInterrupt
            pieces = [_pieces(text) for document in batch for text, _ in document.segments if isinstance(text, str)]
            ids = self._ids(itertools.chain.from_iterable(pieces))
            of_text = (list(itertools.chain.from_iterable(itertools.islice(ids, len(cut)))) for cut in pieces)
            for document in batch:
                yield replace(document, segments=[(next(of_text) if isinstance(text, str) else text, learn)
                                                  for text, learn in document.segments])

    def _ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        for batch in by_size(texts, len, BATCH_CHARACTERS):
            yield from encode(self.tokenizer, batch)


def _pieces(text: str) -> list[str]:
    """The text, a very long one in pieces that end at white space: a tokenizer's memory grows with what it is given."""
    pieces = []
    while len(text) > PIECE_BYTES:
        cut = max(text.rfind("\n", 0, PIECE_BYTES), text.rfind(" ", 0, PIECE_BYTES)) + 1 or PIECE_BYTES
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]
