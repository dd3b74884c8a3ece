"""Ranges of weights out of safetensors files, by positioned reads: no weight is ever whole.

A weight is a set of boxes of the files' tensors (`ParameterSource`), as the model's class stacks,
concatenates, splits or transposes them. Files are not mapped: one that is cut while it is read must
be an error, and a mapped file would kill the process.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from types import TracebackType

import torch
from torch import Tensor

from amid_ds.errors import InputError
from amid_ds.models.weight_files import WeightTable, open_for_ranges, read_header

READ_THREADS = 4
# Read at once by a thread: with READ_THREADS, 64 MiB are in flight.
READ_CHUNK_BYTES = 16 << 20
# Compared at once of two tied weights.
TWIN_ELEMENTS = 8 << 20
# Gaps below a page are read with what surrounds them: skipping them saves no page of the disk.
PAGE_BYTES = 4096


@dataclass(frozen=True)
class FileBox:
    """A box of a weight whose elements lie in one file's tensor, a stride apart in each dimension.

    file: its number in the table. offset: of the first element, in bytes. strides: in elements.
    starts, sizes: the box in the weight.
    """

    file: int
    dtype: torch.dtype
    offset: int
    strides: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def cut(self, starts: Sequence[int], sizes: Sequence[int]) -> FileBox | None:
        """What of it lies in that box of the weight; None: nothing."""
        lows = tuple(map(max, self.starts, starts))
        highs = [min(a + n, b + m) for a, n, b, m in zip(self.starts, self.sizes, starts, sizes,
                                                         strict=True)]
        if any(high <= low for low, high in zip(lows, highs, strict=True)):
            return None
        skipped = sum((low - start) * stride
                      for low, start, stride in zip(lows, self.starts, self.strides, strict=True))
        return replace(self, offset=self.offset + skipped * self.dtype.itemsize, starts=lows,
                       sizes=tuple(high - low for low, high in zip(lows, highs, strict=True)))

    def moved(self, dim: int, by: int) -> FileBox:
        """The same elements, `by` places further in the weight."""
        starts = list(self.starts)
        starts[dim] += by
        return replace(self, starts=tuple(starts))

    def on_dims(self, places: Callable[[tuple[int, ...]], Iterable[int]]) -> FileBox:
        """Its dimensions reordered by `places`; -1 stands for a new one."""
        return replace(self, strides=tuple(places((*self.strides, 0))),
                       starts=tuple(places((*self.starts, 0))),
                       sizes=tuple(places((*self.sizes, 1))))


@dataclass(frozen=True)
class ParameterSource:
    """Where the elements of one parameter, or of a box of it, lie: boxes that fill its shape."""

    shape: tuple[int, ...]
    boxes: tuple[FileBox, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the files (of the first, where they differ)."""
        return self.boxes[0].dtype

    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    def part(self, dim: int, start: int, stop: int) -> ParameterSource:
        """Its rows (dim 0), columns (dim 1), ... from `start` up to `stop`."""
        starts = [0] * len(self.shape)
        sizes = list(self.shape)
        starts[dim], sizes[dim] = start, stop - start
        kept = [box.cut(starts, sizes) for box in self.boxes]
        return ParameterSource(tuple(sizes), tuple(box.moved(dim, -start)
                                                   for box in kept if box is not None))

    def parts(self, dim: int, ranges: Iterable[tuple[int, int]]) -> ParameterSource:
        """Several stretches of one dimension, joined."""
        cuts = [self.part(dim, start, stop) for start, stop in ranges]
        ends = [0, *accumulate(cut.shape[dim] for cut in cuts)]
        shape = (*self.shape[:dim], ends[-1], *self.shape[dim + 1:])
        return ParameterSource(shape, tuple(box.moved(dim, end)
                                            for cut, end in zip(cuts, ends, strict=False)
                                            for box in cut.boxes))

    def range(self, start: int, stop: int) -> Iterator[FileBox]:
        """The boxes of its elements from `start` up to `stop`, counted in row-major order."""
        for starts, sizes in range_boxes(self.shape, start, min(stop, self.numel())):
            for box in self.boxes:
                found = box.cut(starts, sizes)
                if found is not None:
                    yield found

    def flat(self) -> ParameterSource:
        """Itself in one dimension if its elements lie in a row in the file; else as it is."""
        if len(self.boxes) != 1 or self.boxes[0].strides != row_major(self.shape):
            return self
        count = self.numel()
        return ParameterSource((count,), (replace(self.boxes[0], strides=(1,), starts=(0,),
                                                  sizes=(count,)),))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[dim + 1:]) for dim in range(len(shape)))


def range_boxes(shape: Sequence[int], start: int, stop: int
                ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(starts, sizes) of the boxes that the elements from `start` up to `stop`, row-major, fill."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    # Whole rows are one box; those that are begun or ended within are boxes of one row.
    whole = range(first + (start % row > 0), stop // row)
    for index in (first, *([last] if last > first else [])):
        if index in whole:
            continue
        for starts, sizes in range_boxes(shape[1:], max(start - index * row, 0),
                                         min(stop - index * row, row)):
            yield (index, *starts), (1, *sizes)
    if whole:
        yield (whole.start, *(0 for _ in shape[1:])), (len(whole), *shape[1:])


@dataclass(frozen=True)
class _Read:
    """How a box is read into memory: stretches of `span` elements of its file, one after the other.

    counts, steps: the stretches' number and distance, in elements of the file, in each dimension,
    outermost first. strides: of the box's elements in memory.
    """

    counts: tuple[int, ...]
    steps: tuple[int, ...]
    span: int
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.counts) * self.span

    @classmethod
    def of(cls, box: FileBox) -> _Read:
        """The fewest stretches that skip every gap of a page or more."""
        order = [dim for dim in sorted(range(len(box.sizes)), key=lambda dim: -box.strides[dim])
                 if box.sizes[dim] > 1]
        span, strides = 1, [1] * len(box.sizes)
        while order:
            dim = order[-1]
            if (box.strides[dim] - span) * box.dtype.itemsize >= PAGE_BYTES:
                break
            strides[dim] = box.strides[dim]
            span += (box.sizes[dim] - 1) * box.strides[dim]
            order.pop()
        step = span
        for dim in reversed(order):
            strides[dim] = step
            step *= box.sizes[dim]
        return cls(tuple(box.sizes[dim] for dim in order), tuple(box.strides[dim] for dim in order),
                   span, tuple(strides))

    def offsets(self) -> Iterator[int]:
        """The distances in the file, in elements, of the stretches from the first element."""
        def walk(level: int, base: int) -> Iterator[int]:
            if level == len(self.counts):
                yield base
                return
            for index in range(self.counts[level]):
                yield from walk(level + 1, base + index * self.steps[level])
        return walk(0, 0)


def chunks(box: FileBox) -> Iterator[tuple[FileBox, _Read]]:
    """The box in pieces whose reads take no more memory than READ_CHUNK_BYTES."""
    read = _Read.of(box)
    size = read.elements * box.dtype.itemsize
    if size <= READ_CHUNK_BYTES:
        yield box, read
        return
    # Where the file's elements are furthest apart: its pieces then lie one after the other.
    dim = max((dim for dim in range(len(box.sizes)) if box.sizes[dim] > 1),
              key=lambda dim: box.strides[dim])
    step = max(1, box.sizes[dim] * READ_CHUNK_BYTES // size)
    for start in range(0, box.sizes[dim], step):
        starts, sizes = list(box.starts), list(box.sizes)
        starts[dim], sizes[dim] = starts[dim] + start, min(step, sizes[dim] - start)
        piece = box.cut(starts, sizes)
        assert piece is not None
        yield from chunks(piece)


@dataclass(frozen=True)
class _Job:
    """A chunk to be read into `out`, a view of the size of the box."""

    box: FileBox
    read: _Read
    out: Tensor

    @property
    def is_straight(self) -> bool:
        """True if the bytes can be read to where they belong."""
        same = (ours == theirs for ours, theirs, size in
                zip(self.read.strides, self.out.stride(), self.box.sizes, strict=True) if size > 1)
        return (self.out.device.type == "cpu" and self.out.dtype == self.box.dtype
                and self.out.is_contiguous() and all(same))


class WeightReader:
    """Reads ranges of a model's weights; a context manager that holds open files.

    sources: by the parameter's (or persistent buffer's) name; a tied one's under each of its names.
    twins: by a tied one's second name, where the files hold it a second time. on_bytes: called with
    the bytes of each read, by one thread at a time.
    """

    def __init__(self, table: WeightTable, sources: Mapping[str, ParameterSource],
                 on_bytes: Callable[[int], None] | None = None,
                 twins: Mapping[str, ParameterSource] | None = None) -> None:
        self.sources = sources
        self.twins = twins or {}
        self.on_bytes = on_bytes
        self.bytes_read = 0
        self.table = table
        self._paths = table.paths()
        self._opened: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for descriptor, _ in self._opened.values():
            os.close(descriptor)
        self._opened.clear()

    def fill(self, reads: Iterable[tuple[ParameterSource, int, Tensor]]) -> None:
        """Fill each `out` [n] with the elements [start, start + n) of a source, row-major.

        reads: (source, start, out), taken one by one, so they may be made while others are read;
        threads share the work of all, so one call for many is faster than many. Elements are
        converted to the dtype of `out`, which may be on any device; what lies beyond the source's
        end becomes 0. Raises InputError for a file that is short, absent, or not the table's.
        """
        jobs = self._jobs(reads)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            workers = [pool.submit(self._work, jobs) for _ in range(READ_THREADS)]
        for worker in workers:
            worker.result()
        self._require_unchanged()

    def unequal_twins(self, share: int, shares: int) -> list[str]:
        """The names of `twins` that differ, in that one of so many shares, from what they are tied
        to: a model has but one of the two."""
        unequal = []
        for name, twin in self.twins.items():
            source = self.sources[name]
            count = source.numel()
            stop = count * (share + 1) // shares
            for start in range(count * share // shares, stop, TWIN_ELEMENTS):
                pair = torch.empty(2, min(TWIN_ELEMENTS, stop - start),
                                   dtype=torch.promote_types(source.dtype, twin.dtype))
                self.fill([(source, start, pair[0]), (twin, start, pair[1])])
                # Bytes: a NaN is equal to itself.
                first, second = pair.view(torch.uint8)
                if not torch.equal(first, second):
                    unequal.append(name)
                    break
        return unequal

    def _jobs(self, reads: Iterable[tuple[ParameterSource, int, Tensor]]
              ) -> Generator[_Job, None, None]:
        for source, start, out in reads:
            out = out.detach()
            assert out.dim() == 1 and out.is_contiguous()
            end = start + len(out)
            out[max(0, source.numel() - start):].zero_()
            source = source.flat()
            places = row_major(source.shape)
            for whole in source.range(start, end):
                for box, read in chunks(whole):
                    first = sum(map(int.__mul__, box.starts, places)) - start
                    yield _Job(box, read, out.as_strided(box.sizes, places,
                                                         out.storage_offset() + first))

    def _work(self, jobs: Generator[_Job, None, None]) -> None:
        """Take one job after the other, until none is left or one has failed."""
        scratch = torch.empty(READ_CHUNK_BYTES, dtype=torch.uint8)
        while True:
            with self._lock:
                job = next(jobs, None)
            if job is None:
                return
            try:
                if job.is_straight:
                    self._read(job, job.out.view(-1))
                else:
                    chunk = scratch[:job.read.elements * job.box.dtype.itemsize]
                    self._read(job, chunk)
                    job.out.copy_(chunk.view(job.box.dtype).as_strided(job.box.sizes,
                                                                       job.read.strides))
            except BaseException:
                with self._lock:
                    jobs.close()
                raise

    def _read(self, job: _Job, into: Tensor) -> None:
        """Read the stretches of a job one after the other into a flat CPU tensor."""
        memory = memoryview(into.view(torch.uint8).numpy().data)
        item = job.box.dtype.itemsize
        span = job.read.span * item
        for index, offset in enumerate(job.read.offsets()):
            self._read_span(job.box.file, job.box.offset + offset * item,
                            memory[index * span:(index + 1) * span])
        with self._lock:
            self.bytes_read += len(memory)
            if self.on_bytes is not None:
                self.on_bytes(len(memory))

    def _read_span(self, file: int, offset: int, into: memoryview) -> None:
        descriptor = self._descriptor(file)
        while into:
            try:
                count = os.preadv(descriptor, [into], offset)
            except OSError as error:
                raise self._changed(file, f"fails at byte {offset}: {error.strerror}") from None
            if count == 0:
                raise self._changed(file, f"ends before byte {offset}")
            into, offset = into[count:], offset + count

    def _descriptor(self, file: int) -> int:
        with self._lock:
            if file not in self._opened:
                self._opened[file] = self._open(file)
            return self._opened[file][0]

    def _open(self, file: int) -> tuple[int, int]:
        """(descriptor, time of the last change) of a file that is the table's."""
        expected = self.table.files[file]
        try:
            descriptor = open_for_ranges(self._paths[file])
        except OSError as error:
            raise self._changed(file, f"cannot be opened: {error.strerror}") from None
        found = os.fstat(descriptor)
        try:
            if found.st_size != expected.size:
                raise self._changed(file, f"has {found.st_size} bytes, not {expected.size}")
            header = read_header(descriptor, found.st_size)
            if hashlib.sha256(header).hexdigest() != expected.digest:
                raise self._changed(file, "has another header")
            if (self.table.host == socket.gethostname()
                    and found.st_mtime_ns != expected.changed_ns):
                raise self._changed(file, "was written to after its header was read")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, found.st_mtime_ns

    def _require_unchanged(self) -> None:
        for file, (descriptor, changed_ns) in self._opened.items():
            found = os.fstat(descriptor)
            if (found.st_size, found.st_mtime_ns) != (self.table.files[file].size, changed_ns):
                raise self._changed(file, "was written to while it was read")

    def _changed(self, file: int, what: str) -> InputError:
        return InputError(f"the weights of {self.table.model} cannot be read on "
                          f"{socket.gethostname()}: {self._paths[file]} {what}",
                          "the files that the check of the model read, unchanged, on every node",
                          "wait until the model is copied or downloaded whole, on every node, and "
                          "start again")
