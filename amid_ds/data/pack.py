"""From rows of text to rows of tokens on disk, once: tokenise, pack to seq_length, write memory-mapped Arrow shards.

A source is cut into chunks, and each chunk becomes one shard by itself: documents are joined, each with its
end-of-text, and cut into rows. So any worker can make any shard, a killed job goes on with the shards that are
missing, and the bytes do not depend on who made them or in what order. The price is one shorter row at the end of
each shard (under 0.1 % of a large corpus). A shard in the making is locked, so several jobs may work on one folder.
`manifest.json` is written last: a folder that has one is complete.

A row holds `tokens`, and in `learn` the positions [start, stop, start, stop, ...] of those that are predicted; `file`
and `line` say where it begins, and `crc` is checked whenever the row is read. Text rows have seq_length + 1 tokens and
overlap by one, so that every token but a shard's first is predicted exactly once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from amid_ds import config
from amid_ds.data.chat import Segment, require_chat_template
from amid_ds.data.chat import segments as conversation
from amid_ds.data.readers import PIECE_BYTES, Row, Span
from amid_ds.data.sources import bad_row, files_of, identity, name_of, read_span, shards_of
from amid_ds.data.tokenizer import document_front, encode, end_of_text, fingerprint
from amid_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
FORMAT = 1
MANIFEST, PLAN, SHARDS = "manifest.json", "plan.json", "shards"
SHOWN = 10                          # that many skipped rows are named
MIN_CHUNK, MAX_CHUNK, CHUNKS = 1 << 20, 64 << 20, 64      # bytes of input per shard; a source has about 64 and more
PARALLEL_BYTES = 16 << 20            # less than that is done sooner by one process than others can start
BATCH_CHARACTERS = 1 << 18          # handed to the tokenizer at once
BATCH_TOKENS = 1 << 20              # written at once


@dataclass(frozen=True)
class SourceInfo:
    """What became of one source. `tokens` are those that are predicted."""

    path: str
    rows: int
    tokens: int
    documents: int
    truncated: int                  # rows that were longer than seq_length allows
    dropped: int                    # rows whose response vanished by truncation
    skipped: int                    # bad rows left out, under data.on_bad_row=skip
    shown: tuple[str, ...]          # the first ten of them

    def __str__(self) -> str:
        lost = [f"{count:,} {what}" for count, what in (
            (self.truncated, "rows cut to seq_length"), (self.dropped, "rows left out, their response having vanished"),
            (self.skipped, "bad rows left out, the first of them:")) if count]
        return "\n    ".join([f"{self.path}: {self.documents:,} documents, {self.rows:,} rows, {self.tokens:,} tokens",
                              *lost, *self.shown])


@dataclass(frozen=True)
class PreparedInfo:
    folder: Path
    rows: int
    tokens: int
    sources: tuple[SourceInfo, ...]
    reused: bool                    # the folder was complete already


@dataclass(frozen=True)
class Chunk:
    """What becomes one shard."""

    number: int
    source: int
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        return f"{self.number:06d}"

    @property
    def size(self) -> int:
        return sum(span.size for span in self.spans)


@dataclass(frozen=True)
class Maker:
    """All that a process needs to turn chunks into shards."""

    sources: Sequence[config.Source]
    seq_length: int
    on_bad_row: str
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    def make(self, chunk: Chunk, wait: bool) -> int | None:
        """Make one shard unless it is there: its tokens, or None where another job is at it and `wait` is False."""
        counted = self.folder / SHARDS / f"{chunk.name}.json"
        with _locked(counted.with_suffix(".lock"), wait) as mine:
            if not mine:
                return None
            if not counted.exists():                      # a shard is done when its counts are there
                _write_json(counted, self._write(chunk, counted.with_suffix(".arrow")))
        done = _read_json(counted)
        assert done is not None
        return int(done["tokens"])

    def _write(self, chunk: Chunk, path: Path) -> dict[str, Any]:
        """Write the chunk's rows to `path`, whole or not at all; what the shard is made of."""
        counts = Counts()
        source = self.sources[chunk.source]
        documents = self._encoded(self._documents(chunk, source, counts))
        if source.is_text:
            rows = pack_text(documents, self.seq_length)
        else:
            rows = pack_turns(documents, self.seq_length, source.truncate, counts)
        temporary = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
        _write_rows(temporary, rows, np.uint16 if len(self.tokenizer) <= 1 << 16 else np.uint32, counts)
        size, digest = temporary.stat().st_size, _sha256(temporary)
        os.replace(temporary, path)
        return {"source": chunk.source, **vars(counts), "bytes": size, "sha256": digest}

    def _encoded(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents with their texts as ids, encoded many at a time."""
        for batch in _by_size(documents, Document.__len__, BATCH_CHARACTERS):
            if _stop is not None and _stop.is_set():
                raise KeyboardInterrupt
            pieces = [_pieces(text) for document in batch for text, _ in document.segments if isinstance(text, str)]
            ids = self._ids(itertools.chain.from_iterable(pieces))
            of_text = (list(itertools.chain.from_iterable(itertools.islice(ids, len(cut)))) for cut in pieces)
            for document in batch:
                yield replace(document, segments=[(next(of_text) if isinstance(text, str) else text, learn)
                                                  for text, learn in document.segments])

    def _ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        for batch in _by_size(texts, len, BATCH_CHARACTERS):
            yield from encode(self.tokenizer, batch)

    def _documents(self, chunk: Chunk, source: config.Source, counts: Counts) -> Iterator[Document]:
        """The rows that can be used, framed by the tokenizer's own tokens; the others counted, or an error."""
        front, end = document_front(self.tokenizer), [end_of_text(self.tokenizer)]
        for span in chunk.spans:
            lines = 0
            for row in read_span(span, source):
                lines += row.count
                problem, parts = row.problem, []
                if problem is None:
                    try:
                        parts = self._parts(row, source, front, end)
                    except ValueError as error:
                        problem = str(error)
                if problem is not None:
                    self._bad_row(span, row, problem, counts)
                    continue
                counts.documents += row.ends
                yield from (Document(part, span.file, row.number) for part in parts)
            counts.lines.append((span.file, lines))

    def _parts(self, row: Row, source: config.Source, front: list[int], end: list[int]) -> list[list[Segment]]:
        """What the row is to be encoded as: one document, or the pieces of a long text, which are packed one by one."""
        if source.messages is not None:
            return [conversation(self.tokenizer, row.values[0])]
        if source.prompt is not None:
            return [[(front, False), (row.values[0], False), (row.values[1], True), (end, True)]]
        parts: list[list[Segment]] = [[(piece, True)] for piece in _pieces(row.values[0])]
        parts[0].insert(0, (front if row.begins else [], True))
        parts[-1].append((end if row.ends else [], True))
        return parts

    def _bad_row(self, span: Span, row: Row, problem: str, counts: Counts) -> None:
        if self.on_bad_row == "error":
            raise bad_row(span, row.number, problem)
        if counts.skipped < SHOWN:
            counts.shown.append(f"{name_of(span, row.number)}: {problem}")
        counts.skipped += 1


@dataclass
class Counts:
    """What a shard is made of; `lines` says how many lines of each file it covers, in order."""

    rows: int = 0
    tokens: int = 0
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

    def __len__(self) -> int:
        return sum(len(text) for text, _ in self.segments)

    def ids(self) -> list[int]:
        """All its ids, once encoded."""
        return list(itertools.chain.from_iterable(ids for ids, _ in self.segments))   # type: ignore[misc]


@dataclass(frozen=True)
class Packed:
    """A row of tokens as it is stored."""

    tokens: list[int]
    learn: list[int]
    file: int
    line: int


def prepare(data: config.Data, seq_length: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreparedInfo:
    """Tokenise and pack what is missing in `folder`; a complete one is reused at once.

    A folder prepared from other data, with another tokenizer or seq_length is made anew where the run owns it, and
    an InputError where the recipe names it (`data.prepared`), since other runs may be reading it.
    """
    end_of_text(tokenizer)
    files = [files_of(source) for source in data.train]
    plan = _plan(data, seq_length, tokenizer, files)
    chunks = list(_chunks(files))
    manifest = _read_json(folder / MANIFEST)
    if manifest is not None and manifest["plan"] == plan:
        return _info(folder, manifest, reused=True)
    _start(folder, plan, named=data.prepared is not None)
    maker = Maker(data.train, seq_length, data.on_bad_row, tokenizer, folder)
    _make_all(maker, chunks, data.workers)
    manifest = _manifest(folder, plan, chunks, data)
    _write_json(folder / MANIFEST, manifest)
    for leftover in (folder / SHARDS).iterdir():          # locks, and what killed jobs had begun
        if leftover.suffix not in (".arrow", ".json"):
            leftover.unlink(missing_ok=True)
    info = _info(folder, manifest, reused=False)
    for source in info.sources:
        print(f"prepared {source}", file=sys.stderr)
    return info


def _make_all(maker: Maker, chunks: Sequence[Chunk], workers: int) -> None:
    """Make what is missing, then wait for what other jobs are making, or make it if they die."""
    missing = [chunk for chunk in chunks if not (maker.folder / SHARDS / f"{chunk.name}.json").exists()]
    size = sum(chunk.size for chunk in missing)
    processes = min(workers, len(missing), len(os.sched_getaffinity(0))) if size >= PARALLEL_BYTES else 1
    bar = tqdm(total=sum(chunk.size for chunk in chunks), initial=sum(chunk.size for chunk in chunks) - size,
               desc="prepare", unit="B", unit_scale=True, disable=None)
    tokens = 0
    with bar, _workers(maker, processes) as make:
        for wait in (False, True):
            left = []
            for chunk, made in zip(missing, make(missing, [wait] * len(missing)), strict=True):
                if made is None:
                    left.append(chunk)
                    continue
                tokens += made
                bar.update(chunk.size)
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
            missing = left


@contextlib.contextmanager
def _workers(maker: Maker, processes: int) -> Iterator[Any]:
    """`map` of maker.make over this process or several. Leaving early stops those within one batch of texts."""
    if processes <= 1:
        yield lambda chunks, waits: map(maker.make, chunks, waits)
        return
    context = multiprocessing.get_context("forkserver")   # a fork of a process with an engine in it is a hazard
    context.set_forkserver_preload([__name__, "transformers.tokenization_utils_base"])
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, _become_worker, (maker, stop))
    try:
        yield lambda chunks, waits: pool.map(_work, chunks, waits)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_maker: Maker | None = None
_stop: Any = None


def _become_worker(maker: Maker, stop: Any) -> None:
    """Set up a worker process: signals are the parent's affair, and a worker dies with its parent."""
    global _maker, _stop
    _maker, _stop = maker, stop
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"        # one core each
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def _work(chunk: Chunk, wait: bool) -> int | None:
    assert _maker is not None
    return _maker.make(chunk, wait)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of `path`: False where another process has it. The lock goes when its holder dies, however."""
    with open(path, "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def pack_text(documents: Iterable[Document], seq_length: int) -> Iterator[Packed]:
    """Join the documents and cut rows of seq_length + 1 tokens that overlap by one; the last may be shorter."""
    buffer: list[int] = []
    cut = 0                                               # tokens that are no longer in the buffer
    begun: deque[tuple[int, int, int]] = deque()          # where the documents in the buffer begin: (token, file, line)
    for document in documents:
        begun.append((cut + len(buffer), document.file, document.line))
        buffer += document.ids()
        start = 0
        while len(buffer) - start > seq_length:
            yield _text_row(buffer[start:start + seq_length + 1], cut + start, begun)
            start += seq_length
        del buffer[:start]
        cut += start
    if len(buffer) > 1:                                   # a single token left over was the last row's last
        yield _text_row(buffer, cut, begun)


def _text_row(tokens: list[int], position: int, begun: deque[tuple[int, int, int]]) -> Packed:
    while len(begun) > 1 and begun[1][0] <= position:
        begun.popleft()
    return Packed(tokens, [1, len(tokens)], *begun[0][1:])


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


def _pieces(text: str) -> list[str]:
    """The text, a very long one in pieces that end at white space: a tokenizer's memory grows with what it is given."""
    pieces = []
    while len(text) > PIECE_BYTES:
        cut = max(text.rfind("\n", 0, PIECE_BYTES), text.rfind(" ", 0, PIECE_BYTES)) + 1 or PIECE_BYTES
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def _chunks(files: Sequence[Sequence[str]]) -> Iterator[Chunk]:
    number = itertools.count()
    for source, paths in enumerate(files):
        target = min(max(sum(map(os.path.getsize, paths)) // CHUNKS, MIN_CHUNK), MAX_CHUNK)
        for spans in shards_of(paths, target):
            yield Chunk(next(number), source, tuple(spans))


def _write_rows(path: Path, rows: Iterable[Packed], dtype: Any, counts: Counts) -> None:
    token_type = pa.list_(pa.from_numpy_dtype(dtype))
    schema = pa.schema([("tokens", token_type), ("learn", pa.list_(pa.int32())), ("file", pa.int32()),
                        ("line", pa.int64()), ("crc", pa.uint32())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _by_size(rows, lambda row: len(row.tokens), BATCH_TOKENS):
            counts.rows += len(batch)
            tokens = [np.array(row.tokens, dtype) for row in batch]
            learn = [np.array(row.learn, np.int32) for row in batch]
            counts.tokens += sum(int(np.sum(spans[1::2] - spans[::2])) for spans in learn)
            writer.write_batch(pa.record_batch([
                _list_array(tokens), _list_array(learn),
                pa.array([row.file for row in batch], pa.int32()), pa.array([row.line for row in batch], pa.int64()),
                pa.array(map(checksum, tokens, learn), pa.uint32())], schema=schema))


def checksum(tokens: NDArray[Any], learn: NDArray[np.int32]) -> int:
    return zlib.crc32(learn.tobytes(), zlib.crc32(tokens.tobytes()))


def _list_array(rows: Sequence[NDArray[Any]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))


def _by_size(items: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Lists of items, each of at least `limit` in all, but for the last."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _plan(data: config.Data, seq_length: int, tokenizer: PreTrainedTokenizerBase,
          files: Sequence[Sequence[str]]) -> dict[str, Any]:
    """All that the shards' bytes depend on. A source's weight is not among it: mixing is done when reading."""
    sources = []
    for source, paths in zip(data.train, files, strict=True):
        template = None if source.messages is None else require_chat_template(tokenizer)
        sources.append({"path": source.path, "fields": list(source.fields), "template": template,
                        "truncate": source.truncate, "files": identity(source, paths)})
    return {"format": FORMAT, "seq_length": seq_length, "tokenizer": fingerprint(tokenizer),
            "on_bad_row": data.on_bad_row, "sources": sources}


def _start(folder: Path, plan: dict[str, Any], named: bool) -> None:
    """Make the folder ready for shards of this plan; those of an unfinished one of the same plan stay."""
    manifest = _read_json(folder / MANIFEST)
    found = manifest["plan"] if manifest is not None else _read_json(folder / PLAN)
    if found is not None and found != plan:
        if named:
            raise InputError(f"{folder} was prepared differently: {_first_difference(found, plan)}",
                             "a folder prepared from this recipe's data, tokenizer and seq_length",
                             "name another folder in data.prepared, or remove this one")
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder / SHARDS, ignore_errors=True)
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    _write_json(folder / PLAN, plan)


def _first_difference(found: Any, wanted: Any, name: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        key = next(key for key in wanted if found[key] != wanted[key])
        return _first_difference(found[key], wanted[key], f"{name}.{key}".lstrip("."))
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        place = next(place for place in range(len(wanted)) if found[place] != wanted[place])
        return _first_difference(found[place], wanted[place], f"{name}[{place}]")
    return f"`{name}` is {found!r} there and {wanted!r} in this recipe"


def _manifest(folder: Path, plan: dict[str, Any], chunks: Sequence[Chunk], data: config.Data) -> dict[str, Any]:
    shards = [_read_json(folder / SHARDS / f"{chunk.name}.json") for chunk in chunks]
    seen: dict[tuple[int, int], int] = {}                 # lines of (source, file) in earlier shards
    sources = [{"path": source.path, "rows": 0, "tokens": 0, "documents": 0, "truncated": 0, "dropped": 0,
                "skipped": 0, "shown": []} for source in data.train]
    entries = []
    for chunk, shard in zip(chunks, shards, strict=True):
        assert shard is not None
        first_line = {}
        for file, lines in shard["lines"]:
            first_line[str(file)] = seen.get((chunk.source, file), 0)
            seen[chunk.source, file] = first_line[str(file)] + lines
        total: dict[str, Any] = sources[chunk.source]
        for key in total.keys() - {"path", "shown"}:
            total[key] += shard[key]
        total["shown"] = [*total["shown"], *shard["shown"]][:SHOWN]
        entries.append({"name": chunk.name, "source": chunk.source, "rows": shard["rows"], "first_line": first_line,
                        "bytes": shard["bytes"], "sha256": shard["sha256"]})
    for total in sources:
        if total["rows"] == 0:
            raise InputError(f"the data source {total['path']!r} has no row left to train on: {total}",
                             "at least one usable row of two tokens or more", "look at the rows named above")
    return {"plan": plan, "sources": sources, "shards": entries}


def _info(folder: Path, manifest: dict[str, Any], reused: bool) -> PreparedInfo:
    sources = tuple(SourceInfo(**{**source, "shown": tuple(source["shown"])}) for source in manifest["sources"])
    return PreparedInfo(folder, sum(source.rows for source in sources), sum(source.tokens for source in sources),
                        sources, reused)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return loaded


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
