"""Rows packed while training, from data sets too large for the disk, which `datasets` streams.

A streamed data set can only be read forwards, so its rows have no numbers to permute. Each source
is split into shards of its files, and row k of the source is row k // n of shard k % n. A shard
reads a block of documents at a time and packs it by itself, as `prepare` packs a chunk. So a
position in it is the beginning of a block and a number of rows, and can be saved.

Guaranteed: the same rows in the same steps on any number of ranks and over any resume from a
checkpoint, each once, while the files stay as they are. Not offered: an order other than the
files' (the shards interleave, nothing is shuffled), a start at a step without a checkpoint of it,
and shared work: a shard that several ranks need is read by each of them. There are as many shards
as divide the global batch, at most one per file; with one source and enough files no two ranks
read the same shard.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from amid_ds.config.recipe import Data
from amid_ds.data.batch import Batch, TokenRow, collate_rows
from amid_ds.data.encode import SourcePacker
from amid_ds.data.loader import StepLoader
from amid_ds.data.order import assign_source
from amid_ds.data.pack import ROW_ISSUES, ROW_NOTES, PackingCounts, note_lines
from amid_ds.data.readers import RawRow
from amid_ds.data.sources import check_row, open_streaming_dataset
from amid_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text in a block, about. A block costs one shorter row at its end.
BLOCK_CHARACTERS = 1 << 20


class StreamShardState(TypedDict):
    """The position of one shard, as JSON in a checkpoint.

    count: rows taken so far; epoch: passes over the files; block: the state of the `datasets`
    stream at the block's beginning, None at that of the files; document: documents of this pass
    before the block; row: rows taken of the block; truncated, dropped, skipped, noted: counts of
    finished blocks.
    """

    count: int
    epoch: int
    block: Mapping[str, object] | None
    document: int
    row: int
    truncated: int
    dropped: int
    skipped: int
    noted: dict[str, int]


class StreamState(TypedDict):
    """The positions in all streamed sources, as JSON in a checkpoint.

    lanes: number of shards of each source; places: by "SOURCE.SHARD".
    """

    lanes: list[int]
    places: dict[str, StreamShardState]


class StreamShard:
    """A shard of a source's files, row after row, without end.

    name: for the user; reopen: opens the files at their beginning, as an IterableDataset; state:
    the position to continue at, None for the beginning.
    """

    def __init__(self, name: str, reopen: Callable[[], Any], packer: SourcePacker,
                 state: StreamShardState | None) -> None:
        self.name, self.reopen, self.packer = name, reopen, packer
        self.state: StreamShardState = {"count": 0, "epoch": 0, "block": None, "document": 0,
                                        "row": 0, "truncated": 0, "dropped": 0, "skipped": 0,
                                        "noted": {}}
        if state is not None:
            self.state.update(state)
        self.stream = reopen()
        if self.state["block"] is not None:
            self.stream.load_state_dict(self.state["block"])
        self.examples: Iterator[Mapping[str, object]] = iter(self.stream)
        # An example that was read to see if there is one.
        self.pending: Mapping[str, object] | None = None
        # True if this pass over the files has given a row.
        self.has_rows = self.state["count"] > 0
        self._read_block()

    def next_row(self) -> TokenRow:
        """The next row. Raises InputError if the files give none, or cannot be read."""
        while self.state["row"] == len(self.rows):
            self._next_block()
        row = self.rows[self.state["row"]]
        self.state["row"] += 1
        self.state["count"] += 1
        return row

    def _next_block(self) -> None:
        """Go to the next block; at the end of the files, to the first one."""
        self.state["truncated"] += self.counts.truncated
        self.state["dropped"] += self.counts.dropped
        self.state["skipped"] += self.counts.skipped
        # Replaced, since copies of the state share it.
        self.state["noted"] = dict(Counter(self.state["noted"]) + self.counts.noted)
        self.state["block"] = self.stream.state_dict()
        self.state["document"] = self.documents_read
        self.state["row"] = 0
        self.pending = self._next_example()
        if self.pending is None:
            if not self.has_rows:
                raise InputError(f"{self.name} has no row left to train on",
                                 "at least one usable row of two tokens",
                                 "look at the rows, or at the files of this share")
            self.stream = self.reopen()
            self.examples, self.has_rows = iter(self.stream), False
            self.state["epoch"] += 1
            self.state["block"], self.state["document"] = None, 0
        self._read_block()

    def _next_example(self) -> Mapping[str, object] | None:
        example, self.pending = self.pending, None
        if example is not None:
            return example
        try:
            return next(self.examples, None)
        except Exception as error:
            # datasets and the hub raise whatever their many loaders raise.
            raise InputError(f"{self.name} cannot be read after row {self.documents_read}: {error}",
                             "files that can be read",
                             "fix the file; if the network failed, start again") from None

    def _read_block(self) -> None:
        """Read and pack the block that begins at the current position."""
        self.counts, self.documents_read = PackingCounts(), self.state["document"]
        fields = self.packer.columns

        def raw_rows() -> Iterator[RawRow]:
            size = 0
            while size < BLOCK_CHARACTERS and (example := self._next_example()) is not None:
                values = tuple(example.get(field) for field in fields)
                size += sum(len(str(value)) for value in values)
                self.documents_read += 1
                row = RawRow(self.documents_read - 1, values)
                yield check_row(row, fields, self.packer.source)

        def location_of(number: int) -> str:
            return f"{self.name} row {number}"

        documents = self.packer.documents(raw_rows(), 0, location_of, self.counts)
        self.rows = [TokenRow.from_packed(row, location_of(row.line))
                     for row in self.packer.pack(documents, self.counts)]
        self.has_rows = self.has_rows or bool(self.rows)


class StreamLoader(StepLoader):
    """Steps over streamed sources from a saved state on, each asked for once and in order.

    state: of all ranks, from merge_stream_states; None at the beginning of the run.
    """

    def __init__(self, data: Data, seq_length: int, tokenizer: PreTrainedTokenizerBase,
                 state: StreamState | None, *, workers: int, **layout: int) -> None:
        # One thread reads ahead, since a shard is read in order.
        super().__init__(weights=[source.weight for source in data.train],
                         workers=min(workers, 1), **layout)
        self.packers = [SourcePacker(source, data.isolates(source), seq_length, data.on_bad_row,
                                     tokenizer) for source in data.train]
        self.streams = [open_streaming_dataset(source) for source in data.train]
        self.shard_counts = [max(n for n in range(1, stream.num_shards + 1)
                                 if self.global_batch_size % n == 0) for stream in self.streams]
        self.start: StreamState = state or {"lanes": self.shard_counts, "places": {}}
        if self.start["lanes"] != self.shard_counts:
            raise InputError(f"the streamed sources are read in {self.shard_counts} shares, before "
                             f"in {self.start['lanes']}", "the files that the run began with",
                             "name a `revision` for each data set of the hub")
        self.open_shards: dict[tuple[int, int], StreamShard] = {}
        # By step: the positions of this rank's shards after it. Steps are read ahead.
        self.positions: dict[int, dict[str, StreamShardState]] = {}
        self.lock = threading.Lock()

    def window(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""
        rows, numbers, sources = [], [], []
        for source, number in assign_source(self.samples(step), self.weights):
            numbers.append(number)
            sources.append(source)
            row, shard_number = divmod(number, self.shard_counts[source])
            shard = self._shard(source, shard_number)
            while shard.state["count"] < row:
                # The rows between are other ranks'.
                shard.next_row()
            rows.append(shard.next_row())
        with self.lock:
            self.positions[step] = {f"{source}.{number}": shard.state.copy()
                                    for (source, number), shard in self.open_shards.items()}
        size = self.micro_batch_size
        return [collate_rows(rows[i:i + size], numbers[i:i + size], sources[i:i + size])
                for i in range(0, len(rows), size)]

    def state(self, step: int) -> StreamState:
        """The positions of this rank's shards after the first `step` steps.

        To be merged with the other ranks' by merge_stream_states; those that the run was resumed
        at are in dp_rank 0's alone. Earlier steps are forgotten.
        """
        with self.lock:
            self.positions = {read: positions for read, positions in self.positions.items()
                              if read >= step - 1}
            resumed_at = self.start["places"] if self.dp_rank == 0 else {}
            positions = {**resumed_at, **self.positions.get(step - 1, {})}
        return {"lanes": self.shard_counts, "places": positions}

    def _shard(self, source: int, number: int) -> StreamShard:
        if (source, number) not in self.open_shards:
            packer, count = self.packers[source], self.shard_counts[source]

            def reopen() -> Any:
                return self.streams[source].shard(num_shards=count, index=number)

            name = f"{packer.source.path} share {number} of {count}"
            state = self.start["places"].get(f"{source}.{number}")
            self.open_shards[source, number] = StreamShard(name, reopen, packer, state)
        return self.open_shards[source, number]


def merge_stream_states(states: Sequence[StreamState]) -> StreamState:
    """The states of all ranks as one: of each shard the furthest position that a rank has read to.

    None of these is ahead of the step. An earlier position would give the same rows, since a rank
    passes over the rows before those that it needs.
    """
    merged: dict[str, StreamShardState] = {}
    for state in states:
        for name, position in state["places"].items():
            if position["count"] >= merged.get(name, position)["count"]:
                merged[name] = position
    return {"lanes": states[0]["lanes"], "places": merged}


def stream_summary(data: Data, state: StreamState | None) -> str:
    """For the user: passes over each source, and the rows left out of its finished blocks."""
    positions = {} if state is None else state["places"]
    lines = []
    for number, source in enumerate(data.train):
        own = [position for name, position in positions.items() if name.startswith(f"{number}.")]
        counts = {"truncated": sum(position["truncated"] for position in own),
                  "dropped": sum(position["dropped"] for position in own),
                  "skipped": sum(position["skipped"] for position in own)}
        epochs = min((position["epoch"] for position in own), default=0)
        noted = {name: sum(position.get("noted", {}).get(name, 0) for position in own)
                 for name in ROW_NOTES}
        issues = [*(f"{count:,} {ROW_ISSUES[name]}" for name, count in counts.items() if count),
                  *note_lines(noted)]
        lines.append(", ".join([f"{source.path} {epochs}", *issues]))
    return "; ".join(lines)
