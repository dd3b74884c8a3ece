"""The micro-batches of each step and rank, a function of (prepared data, seed, step) alone.

A loader that keeps a position must save it exactly, on every rank, and redistribute it when the
number of ranks changes. This one keeps none: a resumed run, on other ranks too, asks for its step.
Threads read ahead, not processes: nothing in reading holds the interpreter's lock for long, and a
forked copy of a process with a GPU engine in it is a hazard.
"""

from __future__ import annotations

import abc
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from amid_ds.data.batch import Batch
from amid_ds.data.order import rows_for_samples, samples_per_source
from amid_ds.data.prepared import PreparedDataset
from amid_ds.data.targets import TargetFolder, stack_targets
from amid_ds.errors import InputError
from amid_ds.losses import IGNORE_INDEX
from amid_ds.losses.sparse import Rest


class StepLoader(abc.ABC):
    """The micro-batches of each optimizer step, of one data-parallel rank: the step's window.

    Sample j of step s is sample s * global_batch_size + j of the run, in any layout; micro-batch a
    of rank r has the samples from (a * dp_size + r) * micro_batch_size on.

    workers: threads that read ahead; 0: read when asked. weights: the sources' shares of the rows.
    waited: seconds that readers of `windows` have waited for data so far.
    """

    def __init__(self, *, global_batch_size: int, micro_batch_size: int, dp_rank: int,
                 dp_size: int, workers: int, weights: Sequence[float]) -> None:
        if global_batch_size % (dp_size * micro_batch_size):
            raise InputError(f"global_batch_size {global_batch_size} with {dp_size} data-parallel "
                             f"rank(s) of micro_batch_size {micro_batch_size}",
                             "a multiple of ranks × micro_batch_size", "change one of the three")
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.workers, self.weights = workers, list(weights)
        self.waited = 0.0

    @abc.abstractmethod
    def window(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step."""

    def samples(self, step: int) -> list[int]:
        """The sample numbers of this rank in one step, micro-batch after micro-batch."""
        stride = self.dp_size * self.micro_batch_size
        first = step * self.global_batch_size + self.dp_rank * self.micro_batch_size
        starts = range(first, first + self.global_batch_size, stride)
        return [start + i for start in starts for i in range(self.micro_batch_size)]

    def windows(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """window(start), ..., window(stop - 1), read ahead by `workers` threads.

        `waited` grows by the time that each takes to come.
        """
        ahead = self._read_ahead(start, stop)
        while True:
            begin = time.perf_counter()
            window = next(ahead, None)
            self.waited += time.perf_counter() - begin
            if window is None:
                return
            yield window

    def _read_ahead(self, start: int, stop: int) -> Iterator[list[Batch]]:
        if self.workers == 0:
            yield from map(self.window, range(start, stop))
            return
        pending: deque[Future[list[Batch]]] = deque()
        steps = iter(range(start, stop))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="data")
        try:
            for step in itertools.islice(steps, 2 * self.workers):
                pending.append(pool.submit(self.window, step))
            while pending:
                window = pending.popleft().result()
                for step in itertools.islice(steps, 1):
                    pending.append(pool.submit(self.window, step))
                yield window
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class PreparedLoader(StepLoader):
    """Steps over a prepared folder, in any order. weights: None for equal ones.

    targets: the teacher's cache of these rows, read with them, and what it is outside of what that
    keeps (None: as the cache's method has it); None: no cache.
    """

    def __init__(self, folder: Path, *, seed: int, weights: Sequence[float] | None = None,
                 targets: tuple[TargetFolder, Rest | None] | None = None, **layout: int) -> None:
        self.prepared, self.seed, self.targets = PreparedDataset(folder), seed, targets
        counts = self.prepared.counts
        super().__init__(weights=[1.0] * len(counts) if weights is None else weights, **layout)
        assert len(self.weights) == len(counts)

    def window(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step."""
        rows = rows_for_samples(self.samples(step), self.prepared.counts, self.weights,
                                self.seed).tolist()
        size = self.micro_batch_size
        return [self._batch(rows[i:i + size]) for i in range(0, len(rows), size)]

    def _batch(self, rows: list[int]) -> Batch:
        batch = self.prepared.batch(rows)
        return batch if self.targets is None else with_targets(batch, *self.targets)

    def epochs(self, step: int) -> list[float]:
        """Passes over each source before this step; above 1 its rows come again."""
        samples = samples_per_source(step * self.global_batch_size, self.weights)
        return [count / rows for count, rows in zip(samples, self.prepared.counts, strict=True)]


def with_targets(batch: Batch, cache: TargetFolder, rest: Rest | None = None) -> Batch:
    """The batch with what `cache` holds of the teacher at its rows. Raises InputError.

    The cache is of the same prepared rows: its row i has a target for each label of row i. rest: as
    SparseTargets has it; None: by the cache's method.
    """
    rows = [cache.row(number) for number in batch.rows]
    labels = (batch.labels != IGNORE_INDEX).sum(1).tolist()
    for number, row, count in zip(batch.rows, rows, labels, strict=True):
        if len(row.ids) != count:
            raise InputError(f"row {number} has {count} tokens to learn, and {len(row.ids)} in the "
                             f"cache {cache.path}", "a cache of these rows",
                             "write it again with `amid-ds cache`")
    return replace(batch, teacher_targets=stack_targets(rows, rest))
