"""A recipe's data tokenised and packed once, into a folder of shards that training reads.

Tokenising while training would compete for the cores and be repeated by every run. Prepared data
cost disk space, up to four bytes a token, and a wait before the first run. Several processes and
several jobs may work on one folder, and continue the work of a killed one. plan.json describes the
shards' origin, shards are written in any order, and manifest.json comes last: a folder that has
one is complete. The same input gives the same bytes, whoever wrote them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from amid_ds.config.prompt_templates import TEMPLATES
from amid_ds.config.recipe import Data
from amid_ds.data.arrow_shard import require_shard_checksum, require_shard_size
from amid_ds.data.chat import require_chat_template
from amid_ds.data.encode import MAX_SHOWN_ROWS
from amid_ds.data.locate import file_identities, source_files
from amid_ds.data.manifest import (
    PREPARED_FORMAT,
    PREPARED_MANIFEST,
    SHARD_FOLDER,
    PreparedManifest,
    PreparedPlan,
    ShardCounts,
    ShardEntry,
    SourcePlan,
    SourceTotals,
    read_prepared_manifest,
    read_shard_counts,
    shard_path,
    write_json,
)
from amid_ds.data.pack import ROW_ISSUES, ROW_NOTES, note_lines
from amid_ds.data.prepared_folder import (
    LEFTOVER_SHARD_FILE,
    remove_own_files,
    require_plan,
    shared_folder,
)
from amid_ds.data.readers import DataFile
from amid_ds.data.shard import ShardWriter, SourceChunk, plan_chunks
from amid_ds.data.sources import open_streaming_dataset
from amid_ds.data.tokenizer import end_of_text_id, tokenizer_fingerprint
from amid_ds.errors import ExitStatus, InputError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Less input than that is done by one process before others have started.
PARALLEL_BYTES = 16 << 20

_MakeShards = Callable[[Sequence[SourceChunk], Sequence[bool]], Iterable["int | None"]]
# Set in worker processes only.
_worker_writer: ShardWriter | None = None


@dataclass(frozen=True)
class SourceInfo:
    """The result of preparing one source.

    tokens: those that are predicted; truncated: documents longer than a row; dropped: documents
    without a token to predict; skipped: bad rows left out, under data.on_bad_row=skip; shown: the
    first ten of these; noted: of ROW_NOTES, the documents that each applies to; padding: the
    unused share of rows × seq_length.
    """

    path: str
    rows: int
    tokens: int
    documents: int
    truncated: int
    dropped: int
    skipped: int
    shown: tuple[str, ...]
    noted: Mapping[str, int]
    padding: float

    def __str__(self) -> str:
        summary = (f"{self.path}: {self.documents:,} documents, {self.rows:,} rows, "
                   f"{self.tokens:,} tokens to predict, {self.padding:.1%} padding")
        issues = _issue_lines(self.truncated, self.dropped, self.skipped)
        return "\n    ".join([summary, *note_lines(self.noted), *issues, *self.shown])


@dataclass(frozen=True)
class PreparedInfo:
    """The result of preparing a folder. reused: it was complete already."""

    folder: Path
    rows: int
    tokens: int
    sources: tuple[SourceInfo, ...]
    reused: bool


def prepare_all(data: Data, seq_length: int, tokenizer: PreTrainedTokenizerBase, folder: Path,
                verify: bool = False, run_lease: Path | None = None) -> None:
    """Prepare the training sources in `folder`, each evaluation set in eval/NAME under it, and the
    auxiliary corpus in auxiliary.

    Of streamed sources only the access is checked. With `verify` the shards of a folder that was
    complete already are read and compared with their checksums. run_lease: the lease that is taken
    before shards of another plan are removed, which its run may be reading; None: the caller has
    it. Raises InputError.
    """
    for subfolder, part in data.parts().items():
        if part.streams:
            for source in part.train:
                open_streaming_dataset(source)
            continue
        info = prepare(part, seq_length, tokenizer, folder / subfolder, run_lease)
        if verify and info.reused:
            manifest = read_prepared_manifest(info.folder)
            assert manifest is not None
            for shard in tqdm(manifest["shards"], desc="verify", unit="shard", disable=None):
                require_shard_checksum(shard_path(info.folder, shard["name"]), shard["sha256"])


def prepare(data: Data, seq_length: int, tokenizer: PreTrainedTokenizerBase, folder: Path,
            run_lease: Path | None = None) -> PreparedInfo:
    """Tokenise and pack the missing shards of `folder`; a complete folder is reused at once.

    A folder prepared from other data, or with another tokenizer or seq_length, is prepared anew if
    the run owns it. It is an InputError if the recipe names it (`data.prepared`), since other runs
    may be reading it.
    """
    end_of_text_id(tokenizer)
    files = [source_files(source) for source in data.train]
    plan = _make_plan(data, seq_length, tokenizer, files)
    manifest = read_prepared_manifest(folder)
    reused = manifest is not None and manifest["plan"] == plan
    if manifest is None or not reused:
        with shared_folder(folder, plan, data.prepared is not None, run_lease):
            manifest = _write_folder(data, plan, tokenizer, folder, files)
    for shard in manifest["shards"]:
        require_shard_size(shard_path(folder, shard["name"]), shard["bytes"])
    info = _prepared_info(folder, manifest, reused)
    for source in info.sources:
        if source.skipped and data.on_bad_row == "error":
            raise InputError(f"{folder} was prepared without {source.skipped} bad rows, such as "
                             f"{source.shown[0]}",
                             "no bad row left out, under data.on_bad_row=error",
                             "set data.on_bad_row=skip, or fix the rows and name another folder in "
                             "data.prepared")
        if not reused:
            print(f"prepared {source}", file=sys.stderr)
    return info


def _write_folder(data: Data, plan: PreparedPlan, tokenizer: PreTrainedTokenizerBase, folder: Path,
                  files: Sequence[Sequence[DataFile]]) -> PreparedManifest:
    """Write the missing shards and the manifest, and remove temporary files."""
    chunks = list(plan_chunks(files))
    largest_id = max(tokenizer.get_vocab().values())
    writer = ShardWriter(data.train, [data.isolates(source) for source in data.train],
                         plan["seq_length"], data.on_bad_row, tokenizer,
                         "uint16" if largest_id < 1 << 16 else "uint32", folder / SHARD_FOLDER)
    _write_shards(writer, chunks, data.workers)
    manifest = _make_manifest(folder, plan, chunks, data)
    require_plan(folder, plan)
    write_json(folder / PREPARED_MANIFEST, manifest)
    remove_own_files(folder / SHARD_FOLDER, LEFTOVER_SHARD_FILE)
    return manifest


def _write_shards(writer: ShardWriter, chunks: Sequence[SourceChunk], workers: int) -> None:
    """Write the missing shards; then wait for those of other jobs, or write them if these die."""
    missing = [chunk for chunk in chunks if not (writer.folder / f"{chunk.name}.json").exists()]
    total, size = (sum(chunk.size for chunk in some) for some in (chunks, missing))
    processes = 1
    if size >= PARALLEL_BYTES:
        processes = min(workers, len(missing), len(os.sched_getaffinity(0)))
    bar = tqdm(total=total, initial=total - size, desc="prepare", unit="B", unit_scale=True,
               disable=None)
    tokens, begin = 0, time.monotonic()
    with bar, _workers(writer, processes) as make:
        for wait in (False, True):
            left = []
            for chunk, made in zip(missing, make(missing, [wait] * len(missing)), strict=True):
                if made is None:
                    left.append(chunk)
                    continue
                tokens += made
                bar.update(chunk.size)
                speed = tokens / (time.monotonic() - begin)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            missing = left


@contextlib.contextmanager
def _workers(writer: ShardWriter, processes: int) -> Iterator[_MakeShards]:
    """A `map` of writer.write over this process or several.

    Leaving the context early ends the workers within one batch of texts.
    """
    if processes <= 1:
        yield lambda chunks, waits: map(writer.write, chunks, waits)
        return
    # A fork of a process with a GPU engine in it is a hazard.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.tokenization_utils_base"])
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, _start_worker, (replace(writer, stop=stop),))
    try:
        yield lambda chunks, waits: pool.map(_write_in_worker, chunks, waits)
    except BrokenProcessPool:
        raise TrainingError("a process that prepares data was killed, as happens when memory runs "
                            "out; the finished shards stay. Start again, with fewer data.workers "
                            "if need be") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _start_worker(writer: ShardWriter) -> None:
    """Set up a worker process, which leaves signals to its parent and ends with it."""
    global _worker_writer
    _worker_writer = writer
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # One core for each worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(ExitStatus.FAILED)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _write_in_worker(chunk: SourceChunk, wait: bool) -> int | None:
    assert _worker_writer is not None
    return _worker_writer.write(chunk, wait)


def _make_plan(data: Data, seq_length: int, tokenizer: PreTrainedTokenizerBase,
               files: Sequence[Sequence[DataFile]]) -> PreparedPlan:
    """All that the shards' bytes depend on.

    Without the sources' weights, which apply when rows are read, and without `on_bad_row`: shards
    written before a bad row was met are valid under either value, and skipped rows are counted.
    """
    sources: list[SourcePlan] = []
    for source, paths in zip(data.train, files, strict=True):
        template: list[str] | str | dict[str, str] | None = None
        if source.messages is not None:
            template = require_chat_template(tokenizer)
        elif source.template is not None:
            template = list(TEMPLATES[source.template])
        sources.append({"path": source.path, "fields": list(source.fields), "template": template,
                        "truncate": source.truncate, "isolate": data.isolates(source),
                        "files": file_identities(source, paths)})
    return {"format": PREPARED_FORMAT, "seq_length": seq_length,
            "tokenizer": tokenizer_fingerprint(tokenizer), "sources": sources}


def _make_manifest(folder: Path, plan: PreparedPlan, chunks: Sequence[SourceChunk],
                   data: Data) -> PreparedManifest:
    """The manifest of a folder whose shards are finished. InputError for a source without rows."""
    shards = [read_shard_counts(shard_path(folder, chunk.name).with_suffix(".json"))
              for chunk in chunks]
    entries: list[ShardEntry] = []
    # Lines of (source, file) in earlier shards.
    lines_before: dict[tuple[int, int], int] = {}
    for chunk, shard in zip(chunks, shards, strict=True):
        first_line = {}
        for file, lines in shard["lines"]:
            first_line[str(file)] = lines_before.get((chunk.source, file), 0)
            lines_before[chunk.source, file] = first_line[str(file)] + lines
        entries.append({"name": chunk.name, "source": chunk.source, "rows": shard["rows"],
                        "first_line": first_line, "bytes": shard["bytes"],
                        "sha256": shard["sha256"]})
    sources = [_source_totals(source.path, [shard for shard in shards if shard["source"] == number])
               for number, source in enumerate(data.train)]
    for total in sources:
        if total["rows"] == 0:
            issues = _issue_lines(total["truncated"], total["dropped"], total["skipped"])
            raise InputError("\n    ".join([f"the data source {total['path']!r} has no row left to "
                                            "train on", *issues, *total["shown"]]),
                             "at least one usable row of two tokens or more",
                             "look at the rows named above")
    return {"plan": plan, "sources": sources, "shards": entries}


def _source_totals(path: str, shards: Sequence[ShardCounts]) -> SourceTotals:
    shown = [row for shard in shards for row in shard["shown"]]
    return {"path": path,
            "rows": sum(shard["rows"] for shard in shards),
            "places": sum(shard["places"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "documents": sum(shard["documents"] for shard in shards),
            "truncated": sum(shard["truncated"] for shard in shards),
            "dropped": sum(shard["dropped"] for shard in shards),
            "skipped": sum(shard["skipped"] for shard in shards),
            "shown": shown[:MAX_SHOWN_ROWS],
            "noted": {name: sum(shard["noted"].get(name, 0) for shard in shards)
                      for name in ROW_NOTES}}


def _issue_lines(truncated: int, dropped: int, skipped: int) -> list[str]:
    """A line for each count above 0; the lines that name the skipped rows are to follow."""
    counts = {"truncated": truncated, "dropped": dropped, "skipped": skipped}
    lines = [f"{count:,} {ROW_ISSUES[name]}" for name, count in counts.items() if count]
    if skipped:
        lines[-1] += ", the first of them:"
    return lines


def _prepared_info(folder: Path, manifest: PreparedManifest, reused: bool) -> PreparedInfo:
    seq_length = manifest["plan"]["seq_length"]
    sources = tuple(
        SourceInfo(path=source["path"], rows=source["rows"], tokens=source["tokens"],
                   documents=source["documents"], truncated=source["truncated"],
                   dropped=source["dropped"], skipped=source["skipped"],
                   shown=tuple(source["shown"]), noted=source["noted"],
                   padding=1 - source["places"] / (source["rows"] * seq_length))
        for source in manifest["sources"])
    return PreparedInfo(folder, sum(source.rows for source in sources),
                        sum(source.tokens for source in sources), sources, reused)
