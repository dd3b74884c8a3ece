"""Rows made while training, from data sets that do not fit on disk, which `datasets` streams in their files' order.

A source is read in lanes, each a share of its files: row k is row k // lanes of lane k % lanes. A lane takes a block of
documents at a time and packs it by itself, as `prepare` does with a shard, so that its place is where a block begins
and a number of rows in it.

What is promised: on any number of ranks, and over any resume from a checkpoint, the same rows in the same steps, none
twice and none left out, as long as the files behind the source stay what they are. What is not: an order other than
the files' (nothing is shuffled but by the lanes), a start at a step without a checkpoint of it, and a rank that makes
its own rows alone: a lane that several ranks need is made by each of them. There are as many lanes as divide the global
batch, at most one per file, so with one source and enough files no two ranks make the same rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from amid_ds.config import recipe
from amid_ds.data.encode import Packer
from amid_ds.data.loader import Batch, Row, Steps, batch_of
from amid_ds.data.order import deal
from amid_ds.data.pack import Counts
from amid_ds.data.readers import Row as TextRow
from amid_ds.data.sources import judged, open_stream
from amid_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_CHARACTERS = 1 << 20          # of text in a block, about; a block costs one shorter row at its end
LOST = {"truncated": "rows cut to seq_length", "dropped": "rows left out, their response having vanished",
        "skipped": "bad rows left out"}
Examples = Iterator[dict[str, Any]]
State = dict[str, Any]              # JSON


class Lane:
    """A share of a source's files, row after row, for ever; `state` is its place, and what it has left out so far."""

    def __init__(self, name: str, reopen: Callable[[], Any], packer: Packer, state: State | None) -> None:
        self.name, self.reopen, self.packer = name, reopen, packer
        self.state: State = {"count": 0, "epoch": 0, "block": None, "document": 0, "row": 0, "truncated": 0,
                             "dropped": 0, "skipped": 0, **(state or {})}
        self.stream = reopen()
        if self.state["block"] is not None:
            self.stream.load_state_dict(self.state["block"])
        self.examples: Examples = iter(self.stream)
        self.ahead: dict[str, Any] | None = None
        self.fruitful = self.state["count"] > 0          # whether this time through there has been a row
        self._read_block()

    def take(self) -> Row:
        """The next row."""
        while self.state["row"] == len(self.rows):
            self._go_on()
        row = self.rows[self.state["row"]]
        self.state.update(row=self.state["row"] + 1, count=self.state["count"] + 1)
        return row

    def _go_on(self) -> None:
        """To the next block; at the end of the files, to the first."""
        self.state.update({key: self.state[key] + getattr(self.counts, key) for key in LOST})
        self.state.update(block=self.stream.state_dict(), document=self.number, row=0)
        self.ahead = self._next()
        if self.ahead is None:
            if not self.fruitful:
                raise InputError(f"{self.name} has no row left to train on", "at least one usable row of two tokens",
                                 "look at the rows, or at the files of this share")
            self.stream = self.reopen()
            self.examples, self.fruitful = iter(self.stream), False
            self.state.update(epoch=self.state["epoch"] + 1, block=None, document=0)
        self._read_block()

    def _next(self) -> dict[str, Any] | None:
        example, self.ahead = self.ahead, None
        try:
            return next(self.examples, None) if example is None else example
        except Exception as error:     # datasets and the hub raise whatever their many loaders raise
            raise InputError(f"{self.name} cannot be read after row {self.number}: {error}", "files that can be read",
                             "mend the file; where the network was gone, start again") from None

    def _read_block(self) -> None:
        """Make the rows of the block that begins here."""
        self.counts, self.number = Counts(), self.state["document"]
        fields = self.packer.source.fields

        def texts() -> Iterator[TextRow]:
            size = 0
            while size < BLOCK_CHARACTERS and (example := self._next()) is not None:
                values = tuple(example.get(field) for field in fields)
                size += sum(len(str(value)) for value in values)
                self.number += 1
                yield judged(TextRow(self.number - 1, values), fields, self.packer.source)

        def name(number: int) -> str:
            return f"{self.name} row {number}"

        documents = self.packer.documents(texts(), 0, name, self.counts)
        self.rows = [Row(np.array(row.tokens), np.array(row.learn, np.int32), np.array(row.begins, np.int32),
                         name(row.line)) for row in self.packer.pack(documents, self.counts)]
        self.fruitful = self.fruitful or bool(self.rows)


class StreamData(Steps):
    """Steps over streamed sources, from the one after `state` on, each asked for once and in order."""

    def __init__(self, data: recipe.Data, seq_length: int, tokenizer: PreTrainedTokenizerBase, state: State | None,
                 *, workers: int, **layout: int) -> None:
        # One thread reads ahead: a lane is read in order.
        super().__init__(weights=[source.weight for source in data.train], workers=min(workers, 1), **layout)
        self.packers = [Packer(source, data.isolates(source), seq_length, data.on_bad_row, tokenizer)
                        for source in data.train]
        self.streams = [open_stream(source) for source in data.train]
        self.lanes = [max(n for n in range(1, stream.num_shards + 1) if self.global_batch_size % n == 0)
                      for stream in self.streams]
        self.before: State = state or {"lanes": self.lanes, "places": {}}
        if self.before["lanes"] != self.lanes:
            raise InputError(f"the streamed sources are read in {self.lanes} lanes, before in {self.before['lanes']}",
                             "the files of the life before", "name a `revision` for each data set of the hub")
        self.open: dict[tuple[int, int], Lane] = {}
        self.places: dict[int, State] = {}          # of the lanes open here, after each step that was read ahead
        self.lock = threading.Lock()

    def window(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""
        rows, numbers = [], []
        for source, k in deal(self.samples(step), self.weights):
            numbers.append(k)
            lane = self._lane(source, k % self.lanes[source])
            while lane.state["count"] < k // self.lanes[source]:
                lane.take()                         # another rank's
            rows.append(lane.take())
        with self.lock:
            self.places[step] = {f"{source}.{number}": dict(lane.state) for (source, number), lane in self.open.items()}
        size = self.micro_batch_size
        return [batch_of(rows[i:i + size], numbers[i:i + size]) for i in range(0, len(rows), size)]

    def state(self, step: int) -> State:
        """The places of this rank's lanes after the first `step` steps, to be merged with the other ranks'."""
        with self.lock:
            self.places = {read: places for read, places in self.places.items() if read >= step - 1}
            return {"lanes": self.lanes, "places": {**self.before["places"], **self.places.get(step - 1, {})}}

    def _lane(self, source: int, number: int) -> Lane:
        if (source, number) not in self.open:
            packer, lanes = self.packers[source], self.lanes[source]

            def reopen() -> Any:
                return self.streams[source].shard(num_shards=lanes, index=number)

            title = f"{packer.source.path} share {number} of {lanes}"
            place = self.before["places"].get(f"{source}.{number}")
            self.open[source, number] = Lane(title, reopen, packer, place)
        return self.open[source, number]


def merged_places(states: Sequence[State]) -> State:
    """The states of all ranks as one: of a lane the furthest place that a rank has read to, which is none ahead of the
    step. An earlier one would do: rows before the wanted one are passed over."""
    places: dict[str, State] = {}
    for state in states:
        for lane, place in state["places"].items():
            if place["count"] >= places.get(lane, place)["count"]:
                places[lane] = place
    return {"lanes": states[0]["lanes"], "places": places}


def stream_summary(data: recipe.Data, state: State | None) -> str:
    """How often each source has been read through, and what was left out of the blocks that are finished."""
    lines = []
    for number, source in enumerate(data.train):
        places = [place for lane, place in (state or {"places": {}})["places"].items() if lane.startswith(f"{number}.")]
        lost = {what: sum(place[key] for place in places) for key, what in LOST.items()}
        lines.append(f"{source.path} {min((place['epoch'] for place in places), default=0)}"
                     + "".join(f", {count:,} {what}" for what, count in lost.items() if count))
    return "; ".join(lines)
