"""Documents of tokens into rows of seq_length: joined and cut where they are text, whole where they are turns.

A row holds its tokens, and in `learn` the positions [start, stop, start, stop, ...] of those that are predicted. Text
rows have seq_length + 1 tokens and overlap by one, so every token but the very first is predicted exactly once. Where
documents are isolated, `begins` has the places in the row at which another document begins: nothing before them is
attended to, positions start again, and their first token is not predicted.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from amid_ds.data.chat import Segment

OPEN_ROWS = 64                # that many rows wait for a document that fits; beyond, the fullest is closed


@dataclass
class Counts:
    """What a shard is made of; `lines` says how many lines of each file it covers, in order."""

    rows: int = 0
    places: int = 0                          # inputs of all rows together
    tokens: int = 0                          # that are predicted
    documents: int = 0
    truncated: int = 0
    dropped: int = 0
    skipped: int = 0
    shown: list[str] = field(default_factory=list)
    lines: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """A row's segments in order: texts or ids, and whether they are predicted."""

    segments: list[Segment]
    file: int
    line: int
    begins: bool = True                      # False: it goes on with the document before it

    def __len__(self) -> int:
        return sum(len(text) for text, _ in self.segments)

    def ids(self) -> list[int]:
        """All its ids, once encoded."""
        return list(itertools.chain.from_iterable(ids for ids, _ in self.segments))    # type: ignore[misc]


@dataclass(frozen=True)
class Packed:
    """A row of tokens as it is stored."""

    tokens: list[int]
    learn: list[int]
    file: int
    line: int
    begins: list[int] = field(default_factory=list)


def pack_text(documents: Iterable[Document], seq_length: int, isolate: bool = False) -> Iterator[Packed]:
    """Join the documents and cut rows of seq_length + 1 tokens that overlap by one; the last may be shorter."""
    buffer: list[int] = []
    cut = 0                                               # tokens that are no longer in the buffer
    begun: deque[tuple[int, Document]] = deque()          # where the documents in the buffer begin

    def row(tokens: list[int], position: int) -> Packed:
        while len(begun) > 1 and begun[1][0] <= position:
            begun.popleft()
        inside = [place - position for place, document in begun if document.begins and isolate
                  and position < place < position + len(tokens)]
        learn = [place for start, stop in itertools.pairwise([0, *inside, len(tokens)]) if stop > start + 1
                 for place in (start + 1, stop)]
        return Packed(tokens, learn, begun[0][1].file, begun[0][1].line, inside)

    for document in documents:
        begun.append((cut + len(buffer), document))
        buffer += document.ids()
        start = 0
        while len(buffer) - start > seq_length:
            yield row(buffer[start:start + seq_length + 1], cut + start)
            start += seq_length
        del buffer[:start]
        cut += start
    if len(buffer) > 1:                                   # a single token left over was the last row's last
        yield row(buffer, cut)


def pack_turns(documents: Iterable[Document], seq_length: int, side: str, counts: Counts) -> Iterator[Packed]:
    """One row per document, the loss on its learnt segments alone.

    A document too long for a row loses its right; before that, with `side` left, what it can spare on the left: all
    but one token before the last learnt segment. One whose learnt segments vanish so is dropped, and counted.
    """
    for document in documents:
        tokens, learn = document.ids(), _learnt(document)
        if len(tokens) > seq_length + 1:
            counts.truncated += 1
            spare = max(learn[-2] - 1, 0) if side == "left" and learn else 0
            first = min(len(tokens) - seq_length - 1, spare)
            last = first + seq_length + 1
            tokens = tokens[first:last]
            learn = [min(place, last) - first for start, stop in _pairs(learn)
                     if start < last and stop > first + 1 for place in (max(start, first + 1), stop)]
        if learn:
            yield Packed(tokens, learn, document.file, document.line)
        else:
            counts.dropped += 1


def pack_together(rows: Iterable[Packed], seq_length: int) -> Iterator[Packed]:
    """Several rows of a document each in one, isolated: a row goes where it leaves the least room (best fit)."""
    waiting: list[list[Packed]] = []
    room: list[int] = []                     # tokens that still fit into each
    for row in rows:
        size = len(row.tokens)
        fitting = [place for place, left in enumerate(room) if left >= size]
        if fitting:
            place = min(fitting, key=room.__getitem__)
            waiting[place].append(row)
            room[place] -= size
            continue
        if len(waiting) == OPEN_ROWS:
            fullest = room.index(min(room))
            room.pop(fullest)
            yield _joined(waiting.pop(fullest))
        waiting.append([row])
        room.append(seq_length + 1 - size)
    yield from map(_joined, waiting)


def _joined(rows: list[Packed]) -> Packed:
    tokens: list[int] = []
    learn: list[int] = []
    begins: list[int] = []
    for row in rows:
        begins.append(len(tokens))
        learn += [len(tokens) + place for place in row.learn]
        tokens += row.tokens
    return Packed(tokens, learn, rows[0].file, rows[0].line, begins[1:])


def _learnt(document: Document) -> list[int]:
    """[start, stop, ...] of the tokens that are predicted; a row's first token never is."""
    learn: list[int] = []
    place = 0
    for ids, learnt in document.segments:
        start, place = place, place + len(ids)
        if learnt and place > max(start, 1):
            if learn and learn[-1] == start:
                learn[-1] = place             # it goes on
            else:
                learn += [max(start, 1), place]
    return learn


def _pairs(flat: list[int]) -> Iterator[tuple[int, int]]:
    return zip(flat[::2], flat[1::2], strict=True)
