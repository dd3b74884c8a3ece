"""One source's rows of text into packed rows of token ids.

A tokenizer is fast on many texts at once and needs memory in proportion to the longest, while rows
come one by one and may be whole books. So documents are gathered into batches of a fixed number of
characters, and long texts are cut into pieces.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amid_ds.config.recipe import Data, Rows
from amid_ds.data.batch import TokenRow
from amid_ds.data.chat import RenderedChat, Stretch, chat_columns, render_chat
from amid_ds.data.joints import (
    CONTEXT,
    encode_chats,
    encode_continuations,
    encode_up_to_a_cut,
)
from amid_ds.data.locate import source_files
from amid_ds.data.pack import (
    PackedRow,
    PackingCounts,
    Segment,
    SourceDocument,
    one_row_per_document,
    pack_best_fit,
    pack_text,
)
from amid_ds.data.readers import PIECE_BYTES, RawRow, batched_by_size, split_file
from amid_ds.data.sources import (
    WHOLE_FILE,
    bad_row_error,
    read_checked_rows,
    span_row_location,
)
from amid_ds.data.tokenizer import document_prefix_ids, encode_texts, end_of_text_id
from amid_ds.errors import InputError

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from transformers import PreTrainedTokenizerBase

MAX_SHOWN_ROWS = 10
ENCODE_CHARACTERS = 1 << 18
# Tokens at the end of a turn among which is the one that ends it: a line end may follow.
END_OF_TURN_TOKENS = 4


@dataclass(frozen=True)
class Draft:
    """A document, or a piece of one, whose text is not encoded yet, or just encoded.

    prompt: the text that `text` continues; chat: a conversation instead of these; ids: the text's,
    if they are known; starts, ends: False where the document continues before or after it.
    """

    line: int
    text: str = ""
    prompt: str = ""
    chat: RenderedChat | None = None
    ids: list[int] | None = None
    starts: bool = True
    ends: bool = True

    def __len__(self) -> int:
        return len(self.prompt) + len(self.text if self.chat is None else self.chat.text)


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

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read: the source's, then those that a row may have for its template."""
        if self.source.messages is None:
            return self.source.fields
        return tuple(dict.fromkeys((*self.source.fields,
                                    *chat_columns(self.tokenizer, self.source.tools))))

    def pack(self, documents: Iterator[SourceDocument],
             counts: PackingCounts) -> Iterator[PackedRow]:
        """Pack the documents into rows."""
        if self.source.is_text:
            return pack_text(documents, self.seq_length, self.isolate)
        rows = one_row_per_document(documents, self.seq_length, self.source.truncate, counts)
        return pack_best_fit(rows, self.seq_length) if self.isolate else rows

    def documents(self, rows: Iterable[RawRow], file: int, location_of: Callable[[int], str],
                  counts: PackingCounts, before: str = "") -> Iterator[SourceDocument]:
        """The usable rows, of `columns`, as documents of ids, framed by the tokenizer's own tokens.

        location_of: the name of a row by its number; before: the end of the text that the first
        row goes on with. An unusable row is counted, or, with on_bad_row "error", raises
        InputError with its name.
        """
        drafts = self._drafts(rows, location_of, counts)
        if self.source.is_text:
            drafts = self._cut_long_texts(drafts, before)
        for batch in batched_by_size(drafts, Draft.__len__, ENCODE_CHARACTERS):
            if self.stop is not None and self.stop.is_set():
                raise KeyboardInterrupt
            for draft, segments in zip(batch, self._encode(batch, counts), strict=True):
                yield SourceDocument(segments, file, draft.line, draft.starts)

    def _drafts(self, rows: Iterable[RawRow], location_of: Callable[[int], str],
                counts: PackingCounts) -> Iterator[Draft]:
        for row in rows:
            problem = row.problem
            if problem is None:
                try:
                    draft = self._draft(row)
                except ValueError as error:
                    problem = str(error)
            if problem is None:
                counts.documents += row.ends_document
                yield draft
                continue
            # A location costs reading the file up to it: only for rows that are shown.
            if self.on_bad_row == "error":
                raise bad_row_error(location_of(row.number), problem)
            if counts.skipped < MAX_SHOWN_ROWS:
                counts.shown.append(f"{location_of(row.number)}: {problem}")
            counts.skipped += 1

    def _draft(self, row: RawRow) -> Draft:
        if self.source.is_text:
            return Draft(row.number, row.values[0], starts=row.starts_document,
                         ends=row.ends_document)
        if self.source.messages is None:
            return Draft(row.number, row.values[1], row.values[0])
        columns = dict(zip(self.columns[1:], row.values[1:], strict=True))
        if self.source.tools is not None:
            columns["tools"] = columns.pop(self.source.tools)
        chat = render_chat(self.tokenizer, row.values[0], columns)
        if not self.tokenizer.is_fast:
            # Known to be possible while the row can still be named.
            encode_chats(self.tokenizer, [chat])
        return Draft(row.number, chat=chat)

    def _cut_long_texts(self, drafts: Iterator[Draft], before: str) -> Iterator[Draft]:
        """The drafts; a document that is long, or comes in pieces, in pieces with their ids."""
        for draft in drafts:
            if draft.starts and draft.ends and len(draft.text) <= 2 * PIECE_BYTES:
                yield draft
            else:
                yield from self._cut_document(draft, drafts, "" if draft.starts else before)

    def _cut_document(self, first: Draft, following: Iterator[Draft],
                      before: str) -> Iterator[Draft]:
        """The document that begins with `first` and may go on in `following`, in pieces.

        before: the last characters that are encoded already.
        """
        # Characters that are read and not encoded yet.
        held = ""
        line, starts = first.line, first.starts
        for draft in itertools.chain([first], following):
            text = held + draft.text
            place = len(held)
            while place > 0 or len(text) > 2 * PIECE_BYTES:
                cut, ids = encode_up_to_a_cut(self.tokenizer, before, text, place or PIECE_BYTES)
                yield Draft(line, ids=ids, starts=starts, ends=False)
                line, starts = draft.line - text.count("\n", cut, place), False
                before, text = (before + text[:cut])[-CONTEXT:], text[cut:]
                place = 0
            held, ends = text, draft.ends
            if ends:
                break
        [(_, ids)] = encode_continuations(self.tokenizer, [before], [held])
        yield Draft(line, ids=ids, starts=starts, ends=ends)

    def _encode(self, drafts: Sequence[Draft], counts: PackingCounts) -> Iterator[list[Segment]]:
        """The drafts' segments."""
        prefix = document_prefix_ids(self.tokenizer)
        suffix = [end_of_text_id(self.tokenizer)]
        if self.source.messages is not None:
            chats = [draft.chat for draft in drafts if draft.chat is not None]
            encoded = encode_chats(self.tokenizer, chats)
            for chat, (ids, learnt) in zip(chats, encoded, strict=True):
                counts.noted.update(chat.notes)
                self._note_tokens(prefix, ids, learnt, counts)
                yield _segments(ids, learnt)
        elif self.source.is_text:
            unknown = [draft.text for draft in drafts if draft.ids is None]
            encoded_texts = iter(encode_texts(self.tokenizer, unknown))
            for draft in drafts:
                ids = next(encoded_texts) if draft.ids is None else draft.ids
                if draft.starts:
                    counts.noted["framed_twice"] += _begins_with(ids, prefix)
                yield [(prefix if draft.starts else [], True), (ids, True),
                       (suffix if draft.ends else [], True)]
        else:
            pairs = encode_continuations(self.tokenizer, [draft.prompt for draft in drafts],
                                         [draft.text for draft in drafts])
            for prompt, response in pairs:
                counts.noted["framed_twice"] += _begins_with(prompt, prefix)
                yield [(prefix, False), (prompt, False), (response, True), (suffix, True)]

    def _note_tokens(self, prefix: list[int], ids: list[int], learnt: Sequence[Stretch],
                     counts: PackingCounts) -> None:
        """Count what is odd about a conversation's tokens."""
        counts.noted["framed_twice"] += _begins_with(ids, prefix * 2)
        ends = (ids[max(start, stop - END_OF_TURN_TOKENS):stop] for start, stop in learnt)
        counts.noted["endless"] += self._ids_that_end_a_turn.isdisjoint(itertools.chain(*ends))

    @functools.cached_property
    def _ids_that_end_a_turn(self) -> frozenset[int]:
        tokenizer = self.tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset({*special, *tokenizer.all_special_ids}
                         - {tokenizer.bos_token_id, tokenizer.unk_token_id}
                         | {tokenizer.eos_token_id})


def first_documents(data: Data, seq_length: int, tokenizer: PreTrainedTokenizerBase
                    ) -> Iterator[SourceDocument]:
    """The usable rows of the first source as they are trained on, in file order, read bit by bit.

    Raises InputError for a row that cannot be used, unless such rows are left out.
    """
    source, packer = data.train[0], _first_packer(data, seq_length, tokenizer)
    for number, file in enumerate(source_files(source)):
        for span in split_file(number, file, WHOLE_FILE):
            yield from packer.documents(read_checked_rows(span, source, packer.columns), number,
                                        functools.partial(span_row_location, span),
                                        PackingCounts())


def first_rows(data: Data, seq_length: int, tokenizer: PreTrainedTokenizerBase,
               count: int) -> list[TokenRow]:
    """The first `count` rows of the first source, or as many as it has; no more of it is read.

    Raises InputError where there is none, or a row before the last of them cannot be used.
    """
    source, packer = data.train[0], _first_packer(data, seq_length, tokenizer)
    documents = first_documents(data, seq_length, tokenizer)
    rows = [TokenRow.from_packed(row, source.path)
            for row in itertools.islice(packer.pack(documents, PackingCounts()), count)]
    if not rows:
        raise InputError(f"{source.path} has no usable row", "at least one of two tokens or more",
                         "look at the file, and at --seq-length")
    return rows


def _first_packer(data: Data, seq_length: int, tokenizer: PreTrainedTokenizerBase
                  ) -> SourcePacker:
    return SourcePacker(data.train[0], data.isolates(data.train[0]), seq_length, data.on_bad_row,
                        tokenizer)


def _begins_with(ids: list[int], prefix: list[int]) -> bool:
    return bool(prefix) and ids[:len(prefix)] == prefix


def _segments(ids: list[int], learnt: Sequence[Stretch]) -> list[Segment]:
    segments: list[Segment] = []
    done = 0
    for start, stop in learnt:
        start = max(start, done)
        segments += [(ids[done:start], False), (ids[start:stop], True)]
        done = max(start, stop)
    return [*segments, (ids[done:], False)]
