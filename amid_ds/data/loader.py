"""The prepared rows as micro-batches: what a step reads depends on (prepared data, seed, step) and on nothing else.

The rows are memory-mapped, so a step costs a few copies and no place is kept: resuming at step 10^6, or with another
number of ranks, is asking for that step. Reading ahead is done by threads and not by processes: there is nothing to
compute that would hold the interpreter's lock, and a forked copy of an engine's process is a hazard.
"""

from __future__ import annotations

import abc
import functools
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from amid_ds.config import recipe
from amid_ds.data.order import dealt, rows_of
from amid_ds.data.preparation import MANIFEST, SHARDS
from amid_ds.data.readers import place
from amid_ds.data.shard import checksum, damaged, read_json, require_size
from amid_ds.errors import InputError

IGNORED = -100                       # a label without a loss
OPEN_SHARDS = 4096                   # memory-mapped at once


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right to its longest row.

    input_ids [B, L] int64; labels [B, L] int64: the next token of each position, -100 where there is no loss;
    positions [B, L] int64: each token's place in its document, from which a model also tells isolated documents apart,
    or None where each row is one. A causal model needs no attention mask: nothing attends to the padding after it.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None
    padding: int                     # how many places of the B × L hold nothing
    rows: list[int]                  # which rows of the prepared data
    sources: list[str]               # where each row begins, "corpus.jsonl line 17" or "corpus.parquet row 16"

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, input_ids=self.input_ids.to(device, non_blocking=True),
                       labels=self.labels.to(device, non_blocking=True),
                       positions=None if self.positions is None else self.positions.to(device, non_blocking=True))


class Row(NamedTuple):
    """One row as it was prepared."""

    tokens: NDArray[Any]
    learn: NDArray[np.int32]         # [start, stop, ...] of the tokens that are predicted
    begins: NDArray[np.int32]        # where another document begins that is kept from the one before
    source: str                      # where the row begins


class Prepared:
    """The rows of a prepared folder, by number: source after source, shard after shard."""

    def __init__(self, folder: Path) -> None:
        try:
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"the folder {folder} holds no prepared data", f"a complete one, with {MANIFEST}",
                             "run `amid-ds prepare RECIPE`") from None
        self.folder = folder
        self.counts = [source["rows"] for source in manifest["sources"]]
        self._shards = manifest["shards"]
        self._files = [[file for file, *_ in source["files"]] for source in manifest["plan"]["sources"]]
        self._ends = np.cumsum([shard["rows"] for shard in self._shards])
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(_Shard)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, number: int) -> Row:
        which = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shards[which]
        in_shard = number - int(self._ends[which]) + shard["rows"]
        path = self.folder / SHARDS / f"{shard['name']}.arrow"
        try:
            tokens, learn, begins, file, line, crc = self._open(path, shard["bytes"]).row(in_shard)
            if checksum(tokens, learn, begins) != crc:
                raise ValueError(f"the checksum of its row {in_shard} is wrong")
            where = place(self._files[shard["source"]][file], shard["first_line"][str(file)] + line)
        except InputError:
            raise
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:      # what the damage has led to
            raise damaged(path, str(error)) from None
        return Row(tokens, learn, begins, where)

    def batch(self, numbers: Sequence[int]) -> Batch:
        return batch_of([self.row(number) for number in numbers], list(numbers))


def batch_of(rows: Sequence[Row], numbers: list[int]) -> Batch:
    """The rows, with their numbers, as one micro-batch."""
    length = max(len(row.tokens) for row in rows) - 1
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)    # what pads is never looked at
    positions = torch.arange(length).repeat(len(rows), 1)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.tokens.astype(np.int64))
        input_ids[i, :len(ids) - 1] = ids[:-1]
        for begin in row.begins:
            positions[i, begin:] = torch.arange(length - begin)
        for start, stop in zip(row.learn[::2], row.learn[1::2], strict=True):
            labels[i, start - 1:stop - 1] = ids[start:stop]
    padding = input_ids.numel() - sum(len(row.tokens) - 1 for row in rows)
    isolated = any(len(row.begins) for row in rows)
    return Batch(input_ids, labels, positions if isolated else None, padding, numbers, [row.source for row in rows])


class Steps(abc.ABC):
    """The micro-batches of each step of one data-parallel rank.

    Sample j of step s is sample s * global_batch_size + j of the run, whatever the layout; micro-batch a of rank r
    takes the samples from (a * dp_size + r) * micro_batch_size on. `weights` are the sources' shares of the rows.
    """

    def __init__(self, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int, workers: int,
                 weights: Sequence[float]) -> None:
        if global_batch_size % (dp_size * micro_batch_size):
            raise InputError(f"global_batch_size {global_batch_size} with {dp_size} data-parallel rank(s) of "
                             f"micro_batch_size {micro_batch_size}", "a multiple of ranks × micro_batch_size",
                             "change one of the three")
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size, self.workers, self.weights = dp_rank, dp_size, workers, list(weights)
        self.waited = 0.0            # seconds that those who asked `windows` have waited for data, so far

    @abc.abstractmethod
    def window(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step."""

    def samples(self, step: int) -> list[int]:
        """The samples of this rank in one step, in order, a micro-batch after another."""
        stride = self.dp_size * self.micro_batch_size
        first = step * self.global_batch_size + self.dp_rank * self.micro_batch_size
        starts = range(first, first + self.global_batch_size, stride)
        return [start + i for start in starts for i in range(self.micro_batch_size)]

    def windows(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """window(start), ..., window(stop - 1), read ahead by `workers` threads. `waited` grows by what each took."""
        ahead = self._ahead(start, stop)
        while True:
            begin = time.perf_counter()
            window = next(ahead, None)
            self.waited += time.perf_counter() - begin
            if window is None:
                return
            yield window

    def _ahead(self, start: int, stop: int) -> Iterator[list[Batch]]:
        if self.workers == 0:
            yield from map(self.window, range(start, stop))
            return
        pending: deque[Future[list[Batch]]] = deque()
        steps = iter(range(start, stop))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="data")
        try:
            pending.extend(pool.submit(self.window, step) for step in itertools.islice(steps, 2 * self.workers))
            while pending:
                window = pending.popleft().result()
                pending.extend(pool.submit(self.window, step) for step in itertools.islice(steps, 1))
                yield window
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class StepData(Steps):
    """Steps over a prepared folder, any step at once. Equal weights where none are given."""

    def __init__(self, folder: Path, *, seed: int, weights: Sequence[float] | None = None, **layout: int) -> None:
        self.prepared, self.seed = Prepared(folder), seed
        counts = self.prepared.counts
        super().__init__(weights=[1.0] * len(counts) if weights is None else weights, **layout)
        assert len(self.weights) == len(counts)

    def window(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step."""
        rows = rows_of(self.samples(step), self.prepared.counts, self.weights, self.seed).tolist()
        return [self.prepared.batch(rows[i:i + self.micro_batch_size])
                for i in range(0, len(rows), self.micro_batch_size)]

    def epochs(self, step: int) -> list[float]:
        """How often each source has been read through before this step; over 1, its rows come again."""
        samples = dealt(step * self.global_batch_size, self.weights)
        return [count / rows for count, rows in zip(samples, self.prepared.counts, strict=True)]


def epochs_ahead(data: recipe.Data, seq_length: int, folder: Path, samples: int) -> list[float] | None:
    """How often each source will have been read through after `samples` rows of the run. None where `folder` does not
    tell: it holds nothing that is prepared of these sources, in rows of `seq_length`, or they are streamed."""
    try:
        manifest = None if data.streams else read_json(folder / MANIFEST)
    except ValueError as error:
        raise damaged(folder / MANIFEST, str(error)) from None
    if manifest is None or manifest["plan"]["seq_length"] != seq_length or \
            [source["path"] for source in manifest["plan"]["sources"]] != [source.path for source in data.train]:
        return None
    counts = dealt(samples, [source.weight for source in data.train])
    return [count / source["rows"] for count, source in zip(counts, manifest["sources"], strict=True)]


def read_rows(folder: Path, batch_size: int, dp_rank: int = 0, dp_size: int = 1) -> Iterator[Batch]:
    """Every row of a prepared folder once, for evaluation: each rank gets the same number of batches.

    Where the rows do not fill the last batches, a rank gets row 0 with no label, and `rows` names only what counts.
    """
    prepared = Prepared(folder)
    stride = batch_size * dp_size
    for start in range(0, len(prepared), stride):
        first = start + dp_rank * batch_size
        numbers = list(range(first, min(first + batch_size, len(prepared))))
        if numbers:
            yield prepared.batch(numbers)
        else:
            filler = prepared.batch([0])
            yield replace(filler, labels=torch.full_like(filler.labels, IGNORED), rows=[], sources=[])


class _Shard:
    """One memory-mapped shard: numpy views of its columns, batch by batch."""

    def __init__(self, path: Path, size: int) -> None:
        require_size(path, size)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            batches = list(reader)
        self._ends = np.cumsum([batch.num_rows for batch in batches])
        self._batches = [([_list_views(batch[name]) for name in ("tokens", "learn", "begins")],
                          [batch[name].to_numpy() for name in ("file", "line", "crc")]) for batch in batches]

    def row(self, number: int) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int32], int, int, int]:
        place = int(np.searchsorted(self._ends, number, side="right"))
        lists, columns = self._batches[place]
        number -= int(self._ends[place]) - len(columns[0])
        tokens, learn, begins = (values[offsets[number]:offsets[number + 1]] for values, offsets in lists)
        file, line, crc = (int(column[number]) for column in columns)
        return tokens, learn, begins, file, line, crc


def _list_views(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[np.int32]]:
    return column.values.to_numpy(), column.offsets.to_numpy()
