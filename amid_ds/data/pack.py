"""Documents of token ids into rows of at most seq_length + 1 tokens.

Full rows waste no compute, but a cut document loses its context. So text is concatenated and cut
at the row's length ("wrapped" packing), while a prompt or conversation gets a row of its own, or
shares one, isolated, with others that fit ("best fit" packing).

A row of n tokens is n - 1 inputs and n - 1 labels. `loss_spans` has the positions [start, stop,
start, stop, ...] of the tokens that are predicted. Text rows overlap by one token, so every token
but the very first is predicted exactly once. In isolated rows `doc_starts` has the positions at
which further documents begin: nothing before them is attended to, position ids start again from 0,
and their first token is not predicted.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

# (token ids, True if they are predicted)
Segment = tuple[list[int], bool]
# That many rows wait for a document that fits; beyond it the fullest is closed.
OPEN_ROWS = 64

# By the name in PackingCounts, for the user.
ROW_ISSUES: Mapping[str, str] = {
    "truncated": "rows cut to seq_length",
    "dropped": "rows left out, their response having vanished",
    "skipped": "bad rows left out",
}
# Of rows that are made, what the user may not have meant, by its name in PackingCounts.noted.
ROW_NOTES: Mapping[str, str] = {
    "framed_twice": "begin with the token that the tokenizer puts before every text, and so have "
    "it twice: remove it from the text",
    "endless": "teach no end of a turn, so the model will not learn to stop: have the chat "
    "template end what the assistant says with a special token, inside its {% generation %} if it "
    "has one",
    "reasoning": "hold reasoning that the chat template leaves out: use a template that writes it, "
    "or train on what is left",
    "unused": "have tools, documents or other fields that the chat template does not take: use a "
    "template that does, or remove them",
    "nulls": "have nulls in tools or tool calls, as a table puts them where other rows have a key: "
    "keep arguments and tools as JSON text, or the rows as JSON lines",
}


@dataclass
class PackingCounts:
    """Counts of the rows and documents that were packed. tokens: those that are predicted.

    truncated: documents that were too long for a row; dropped: documents without a token to
    predict, as when a prompt fills the row; skipped: unusable rows; shown: the first of these, with
    their problems; noted: of ROW_NOTES, the documents that each applies to; lines: (file, number of
    its lines), in the order of reading.
    """

    rows: int = 0
    inputs: int = 0
    tokens: int = 0
    documents: int = 0
    truncated: int = 0
    dropped: int = 0
    skipped: int = 0
    shown: list[str] = field(default_factory=list)
    noted: Counter[str] = field(default_factory=Counter)
    lines: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class SourceDocument:
    """The tokens of one row of a source, in order, and the file and line that it was read from.

    is_start: False for a piece that continues the document before it.
    """

    segments: list[Segment]
    file: int
    line: int
    is_start: bool = True

    def ids(self) -> list[int]:
        """All its token ids."""
        return list(itertools.chain.from_iterable(ids for ids, _ in self.segments))


@dataclass(frozen=True)
class PackedRow:
    """A row of token ids as it is stored. file, line: where its first token was read."""

    tokens: list[int]
    loss_spans: list[int]
    file: int
    line: int
    doc_starts: list[int] = field(default_factory=list)


def note_lines(noted: Mapping[str, int]) -> list[str]:
    """For the user: a line for each of ROW_NOTES that applies to any row."""
    return [f"warning: {noted[name]:,} rows {note}" for name, note in ROW_NOTES.items()
            if noted.get(name)]


def pack_text(documents: Iterable[SourceDocument], seq_length: int,
              isolate: bool = False) -> Iterator[PackedRow]:
    """Join the documents and cut rows of seq_length + 1 tokens that overlap by one.

    The last row may be shorter. With `isolate` the documents in a row do not attend to one another.
    """
    buffer: list[int] = []
    # Tokens that are no longer in the buffer.
    consumed = 0
    # (position in the whole text, document) of the documents in the buffer.
    starts: deque[tuple[int, SourceDocument]] = deque()

    def row(tokens: list[int], position: int) -> PackedRow:
        while len(starts) > 1 and starts[1][0] <= position:
            starts.popleft()
        doc_starts = [start - position for start, document in starts
                      if isolate and document.is_start
                      and position < start < position + len(tokens)]
        loss_spans: list[int] = []
        for start, stop in itertools.pairwise([0, *doc_starts, len(tokens)]):
            if stop > start + 1:
                loss_spans += [start + 1, stop]
        first = starts[0][1]
        return PackedRow(tokens, loss_spans, first.file, first.line, doc_starts)

    for document in documents:
        starts.append((consumed + len(buffer), document))
        buffer += document.ids()
        start = 0
        while len(buffer) - start > seq_length:
            yield row(buffer[start:start + seq_length + 1], consumed + start)
            start += seq_length
        del buffer[:start]
        consumed += start
    # A single token left over is the last token of the row before.
    if len(buffer) > 1:
        yield row(buffer, consumed)


def one_row_per_document(documents: Iterable[SourceDocument], seq_length: int, side: str,
                         counts: PackingCounts) -> Iterator[PackedRow]:
    """One row per document, with the loss on its predicted segments alone.

    A document that is too long loses tokens on its right; before that, with side="left", those on
    its left that it can spare: all but one token before the last predicted segment. A document
    that so loses all its predicted tokens is dropped. Both are counted in `counts`.
    """
    for document in documents:
        tokens, loss_spans = document.ids(), _loss_spans(document)
        if len(tokens) > seq_length + 1:
            counts.truncated += 1
            spare = max(loss_spans[-2] - 1, 0) if side == "left" and loss_spans else 0
            first = min(len(tokens) - seq_length - 1, spare)
            last = first + seq_length + 1
            tokens = tokens[first:last]
            loss_spans = _cut_spans(loss_spans, first, last)
        if loss_spans:
            yield PackedRow(tokens, loss_spans, document.file, document.line)
        else:
            counts.dropped += 1


def pack_best_fit(rows: Iterable[PackedRow], seq_length: int) -> Iterator[PackedRow]:
    """Join rows of one document each, isolated, into rows of at most seq_length + 1 tokens.

    Each goes where it leaves the least space. At most OPEN_ROWS rows wait for more, so the memory
    is bounded and the order is nearly that of `rows`.
    """
    waiting: list[list[PackedRow]] = []
    # Tokens that still fit into each of `waiting`.
    space: list[int] = []
    for row in rows:
        size = len(row.tokens)
        fitting = [index for index, left in enumerate(space) if left >= size]
        if fitting:
            tightest = min(fitting, key=space.__getitem__)
            waiting[tightest].append(row)
            space[tightest] -= size
            continue
        if len(waiting) == OPEN_ROWS:
            fullest = space.index(min(space))
            space.pop(fullest)
            yield _join_rows(waiting.pop(fullest))
        waiting.append([row])
        space.append(seq_length + 1 - size)
    yield from map(_join_rows, waiting)


def _join_rows(rows: list[PackedRow]) -> PackedRow:
    tokens: list[int] = []
    loss_spans: list[int] = []
    doc_starts: list[int] = []
    for row in rows:
        doc_starts.append(len(tokens))
        loss_spans += [len(tokens) + position for position in row.loss_spans]
        tokens += row.tokens
    return PackedRow(tokens, loss_spans, rows[0].file, rows[0].line, doc_starts[1:])


def _loss_spans(document: SourceDocument) -> list[int]:
    """[start, stop, ...] of the tokens that are predicted; a row's first token never is."""
    spans: list[int] = []
    stop = 0
    for ids, predicted in document.segments:
        start, stop = stop, stop + len(ids)
        if not predicted or stop <= max(start, 1):
            continue
        if spans and spans[-1] == start:
            # It continues the span before.
            spans[-1] = stop
        else:
            spans += [max(start, 1), stop]
    return spans


def _cut_spans(spans: list[int], first: int, last: int) -> list[int]:
    """The spans within tokens [first, last), counted from `first`, whose token is not predicted."""
    out: list[int] = []
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        if start < last and stop > first + 1:
            out += [max(start, first + 1) - first, min(stop, last) - first]
    return out
