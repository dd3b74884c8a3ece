"""One source's rows of text into packed rows of token ids.

A tokenizer is fast on many texts at once and needs memory in proportion to the longest, while rows
come one by one and may be whole books. So documents are gathered into batches of a fixed number of
characters, and long texts are cut into pieces at white space. A tokenizer whose tokens span white
space can encode such a text differently at the cuts, one in 256 Ki characters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from amid_ds.config.recipe import Rows
from amid_ds.data.chat import Segment, conversation_segments
from amid_ds.data.pack import (
    PackedRow,
    PackingCounts,
    SourceDocument,
    one_row_per_document,
    pack_best_fit,
    pack_text,
)
from amid_ds.data.readers import PIECE_BYTES, RawRow, batched_by_size
from amid_ds.data.sources import bad_row_error
from amid_ds.data.tokenizer import document_prefix_ids, encode_texts, end_of_text_id

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from transformers import PreTrainedTokenizerBase

MAX_SHOWN_ROWS = 10
ENCODE_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class SourcePacker:
    """Turns the rows of one source into rows of token ids.

    isolate: documents that share a row do not attend to one another; stop: an event that, once
    set, ends the work between two batches of texts.
    """

    source: Rows
    isolate: bool
    seq_length: int
    on_bad_row: str
    tokenizer: PreTrainedTokenizerBase
    stop: Event | None = None

    def pack(self, documents: Iterator[SourceDocument],
             counts: PackingCounts) -> Iterator[PackedRow]:
        """Encode the documents and pack them into rows."""
        encoded = self._encode(documents)
        if self.source.is_text:
            return pack_text(encoded, self.seq_length, self.isolate)
        rows = one_row_per_document(encoded, self.seq_length, self.source.truncate, counts)
        return pack_best_fit(rows, self.seq_length) if self.isolate else rows

    def documents(self, rows: Iterable[RawRow], file: int, location_of: Callable[[int], str],
                  counts: PackingCounts) -> Iterator[SourceDocument]:
        """The usable rows as documents, framed by the tokenizer's own tokens.

        location_of: the name of a row by its number. An unusable row is counted, or, with
        on_bad_row "error", raises InputError with its name.
        """
        prefix = document_prefix_ids(self.tokenizer)
        suffix = [end_of_text_id(self.tokenizer)]
        for row in rows:
            problem, parts = row.problem, []
            if problem is None:
                try:
                    parts = self._parts(row, prefix, suffix)
                except ValueError as error:
                    problem = str(error)
            if problem is not None:
                # A location costs reading the file up to it: only for rows that are shown.
                if self.on_bad_row == "error":
                    raise bad_row_error(location_of(row.number), problem)
                if counts.skipped < MAX_SHOWN_ROWS:
                    counts.shown.append(f"{location_of(row.number)}: {problem}")
                counts.skipped += 1
                continue
            counts.documents += row.ends_document
            for index, part in enumerate(parts):
                is_start = row.starts_document and index == 0
                yield SourceDocument(part, file, row.number, is_start)

    def _parts(self, row: RawRow, prefix: list[int], suffix: list[int]) -> list[list[Segment]]:
        """The row's segments, as one document, or a list of pieces of a long text."""
        if self.source.messages is not None:
            return [conversation_segments(self.tokenizer, row.values[0])]
        if not self.source.is_text:
            prompt, response = row.values[:2]
            return [[(prefix, False), (prompt, False), (response, True), (suffix, True)]]
        parts: list[list[Segment]] = [[(piece, True)] for piece in _pieces(row.values[0])]
        parts[0].insert(0, (prefix if row.starts_document else [], True))
        parts[-1].append((suffix if row.ends_document else [], True))
        return parts

    def _encode(self, documents: Iterator[SourceDocument]) -> Iterator[SourceDocument]:
        """The documents with their texts as token ids."""
        for batch in batched_by_size(documents, SourceDocument.__len__, ENCODE_CHARACTERS):
            if self.stop is not None and self.stop.is_set():
                raise KeyboardInterrupt
            pieces = [_pieces(text) for document in batch for text, _ in document.segments
                      if isinstance(text, str)]
            ids = self._encode_pieces(itertools.chain.from_iterable(pieces))
            ids_of_text = (list(itertools.chain.from_iterable(itertools.islice(ids, len(cut))))
                           for cut in pieces)
            for document in batch:
                segments: list[Segment] = [
                    (next(ids_of_text) if isinstance(text, str) else text, predicted)
                    for text, predicted in document.segments]
                yield replace(document, segments=segments)

    def _encode_pieces(self, texts: Iterable[str]) -> Iterator[list[int]]:
        for batch in batched_by_size(texts, len, ENCODE_CHARACTERS):
            yield from encode_texts(self.tokenizer, batch)


def _pieces(text: str) -> list[str]:
    """The text in pieces of at most PIECE_BYTES characters that end at white space if possible."""
    pieces = []
    while len(text) > PIECE_BYTES:
        last_space = max(text.rfind("\n", 0, PIECE_BYTES), text.rfind(" ", 0, PIECE_BYTES))
        cut = last_space + 1 or PIECE_BYTES
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]
