"""A recipe's data prepared once, in a folder: by several processes, by several jobs, again where one was killed.

`plan.json` says what the shards are made from; shards are made in any order by whoever is there; `manifest.json` is
written last, so a folder that has one is complete, and the same input gives the same bytes whoever worked on it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from amid_ds.config import recipe
from amid_ds.config.prompt_templates import TEMPLATES
from amid_ds.data.chat import require_chat_template
from amid_ds.data.encode import SHOWN
from amid_ds.data.shard import (
    Chunk,
    Maker,
    chunks_of,
    read_json,
    require_intact,
    require_size,
    write_json,
)
from amid_ds.data.sources import files_of, identity, open_stream
from amid_ds.data.tokenizer import end_of_text, fingerprint
from amid_ds.errors import InputError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
MANIFEST, PLAN, SHARDS = "manifest.json", "plan.json", "shards"
_maker: Maker | None = None          # a worker process's own
PARALLEL_BYTES = 16 << 20            # less than that is done sooner by one process than others can start


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
    padding: float                  # the share of rows × seq_length that holds nothing

    def __str__(self) -> str:
        lost = [f"{count:,} {what}" for count, what in (
            (self.truncated, "rows cut to seq_length"), (self.dropped, "rows left out, their response having vanished"),
            (self.skipped, "bad rows left out, the first of them:")) if count]
        return "\n    ".join([f"{self.path}: {self.documents:,} documents, {self.rows:,} rows, {self.tokens:,} tokens "
                              f"to predict, {self.padding:.1%} padding", *lost, *self.shown])


@dataclass(frozen=True)
class PreparedInfo:
    folder: Path
    rows: int
    tokens: int
    sources: tuple[SourceInfo, ...]
    reused: bool                    # the folder was complete already


def prepare_all(data: recipe.Data, seq_length: int, tokenizer: PreTrainedTokenizerBase, folder: Path,
                verify: bool = False) -> None:
    """`prepare` for the sources to train on, in `folder`, and for each evaluation set and the auxiliary corpus, in
    eval/NAME and auxiliary under it.

    With `verify` every shard that was there already is read whole and compared with its checksum.
    """
    for place, part in data.parts().items():
        if part.streams:
            for source in part.train:
                open_stream(source)              # or say why not
            continue
        info = prepare(part, seq_length, tokenizer, folder / place)
        if verify and info.reused:
            shards = (read_json(info.folder / MANIFEST) or {})["shards"]
            for shard in tqdm(shards, desc="verify", unit="shard", disable=None):
                require_intact(info.folder / SHARDS / f"{shard['name']}.arrow", shard["sha256"])


def prepare(data: recipe.Data, seq_length: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreparedInfo:
    """Tokenise and pack what is missing in `folder`; a complete one is reused at once.

    A folder prepared from other data, with another tokenizer or seq_length is made anew where the run owns it, and
    an InputError where the recipe names it (`data.prepared`), since other runs may be reading it.
    """
    end_of_text(tokenizer)
    files = [files_of(source) for source in data.train]
    plan = _plan(data, seq_length, tokenizer, files)
    chunks = list(chunks_of(files))
    manifest = read_json(folder / MANIFEST)
    reused = manifest is not None and manifest["plan"] == plan
    if not reused:
        _start(folder, plan, named=data.prepared is not None)
        largest = max(tokenizer.get_vocab().values())
        maker = Maker(data.train, [data.isolates(source) for source in data.train], seq_length, data.on_bad_row,
                      tokenizer, "uint16" if largest < 1 << 16 else "uint32", folder / SHARDS)
        _make_all(maker, chunks, data.workers)
        manifest = _manifest(folder, plan, chunks, data)
        write_json(folder / MANIFEST, manifest)
        for leftover in (folder / SHARDS).iterdir():      # locks, and what killed jobs had begun
            if leftover.suffix not in (".arrow", ".json"):
                leftover.unlink(missing_ok=True)
    assert manifest is not None
    for shard in manifest["shards"]:
        require_size(folder / SHARDS / f"{shard['name']}.arrow", shard["bytes"])
    info = _info(folder, manifest, reused)
    for source in info.sources:
        if source.skipped and data.on_bad_row == "error":
            raise InputError(f"{folder} was prepared without {source.skipped} bad rows, such as {source.shown[0]}",
                             "no bad row left out, under data.on_bad_row=error",
                             "set data.on_bad_row=skip, or mend the rows and name another folder in data.prepared")
        if not reused:
            print(f"prepared {source}", file=sys.stderr)
    return info


def _make_all(maker: Maker, chunks: Sequence[Chunk], workers: int) -> None:
    """Make what is missing, then wait for what other jobs are making, or make it if they die."""
    missing = [chunk for chunk in chunks if not (maker.folder / f"{chunk.name}.json").exists()]
    size = sum(chunk.size for chunk in missing)
    processes = min(workers, len(missing), len(os.sched_getaffinity(0))) if size >= PARALLEL_BYTES else 1
    bar = tqdm(total=sum(chunk.size for chunk in chunks), initial=sum(chunk.size for chunk in chunks) - size,
               desc="prepare", unit="B", unit_scale=True, disable=None)
    tokens, begin = 0, time.monotonic()
    with bar, _workers(maker, processes) as make:
        for wait in (False, True):
            left = []
            for chunk, made in zip(missing, make(missing, [wait] * len(missing)), strict=True):
                if made is None:
                    left.append(chunk)
                    continue
                tokens += made
                bar.update(chunk.size)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - begin):,.0f} tokens/s", refresh=False)
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
    pool = ProcessPoolExecutor(processes, context, _become_worker, (replace(maker, stop=stop),))
    try:
        yield lambda chunks, waits: pool.map(_work, chunks, waits)
    except BrokenProcessPool:
        raise TrainingError("a process that prepares data was killed, as happens for want of memory; what is finished "
                            "stays. Start again, with fewer data.workers if need be") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _become_worker(maker: Maker) -> None:
    """Set up a worker process: signals are the parent's affair, and a worker dies with its parent."""
    global _maker
    _maker = maker
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


def _plan(data: recipe.Data, seq_length: int, tokenizer: PreTrainedTokenizerBase,
          files: Sequence[Sequence[str]]) -> dict[str, Any]:
    """All that the shards' bytes depend on. A source's weight is not among it: mixing is done when reading. Nor is
    `on_bad_row`: shards made before a bad row was found are good under either, and what was left out is counted."""
    sources = []
    for source, paths in zip(data.train, files, strict=True):
        template: Any = None if source.template is None else list(TEMPLATES[source.template])
        if source.messages is not None:
            template = require_chat_template(tokenizer)
        sources.append({"path": source.path, "fields": list(source.fields), "template": template,
                        "truncate": source.truncate, "isolate": data.isolates(source),
                        "files": identity(source, paths)})
    return {"format": FORMAT, "seq_length": seq_length, "tokenizer": fingerprint(tokenizer),
            "sources": sources}


def _start(folder: Path, plan: dict[str, Any], named: bool) -> None:
    """Make the folder ready for shards of this plan; those of an unfinished one of the same plan stay."""
    manifest = read_json(folder / MANIFEST)
    found = manifest["plan"] if manifest is not None else read_json(folder / PLAN)
    if found is not None and found != plan:
        if named:
            raise InputError(f"{folder} was prepared differently: {_first_difference(found, plan)}",
                             "a folder prepared from this recipe's data, tokenizer and seq_length",
                             "name another folder in data.prepared, or remove this one")
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder / SHARDS, ignore_errors=True)
    try:
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, plan)
    except OSError as error:
        raise InputError(f"the folder {folder} for the prepared data cannot be written: {error}",
                         "a folder that can be written", "name another in data.prepared or output_dir") from None


def _first_difference(found: Any, wanted: Any, name: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        key = next(key for key in wanted if found[key] != wanted[key])
        return _first_difference(found[key], wanted[key], f"{name}.{key}".lstrip("."))
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        place = next(place for place in range(len(wanted)) if found[place] != wanted[place])
        return _first_difference(found[place], wanted[place], f"{name}[{place}]")
    return f"`{name}` is {found!r} there and {wanted!r} in this recipe"


def _manifest(folder: Path, plan: dict[str, Any], chunks: Sequence[Chunk], data: recipe.Data) -> dict[str, Any]:
    shards = [read_json(folder / SHARDS / f"{chunk.name}.json") for chunk in chunks]
    seen: dict[tuple[int, int], int] = {}                 # lines of (source, file) in earlier shards
    sources = [{"path": source.path, "rows": 0, "places": 0, "tokens": 0, "documents": 0, "truncated": 0, "dropped": 0,
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
    whole = manifest["plan"]["seq_length"]
    sources = tuple(
        SourceInfo(padding=1 - source["places"] / (source["rows"] * whole), shown=tuple(source["shown"]),
                   **{key: value for key, value in source.items() if key not in ("places", "shown")})
        for source in manifest["sources"])
    return PreparedInfo(folder, sum(source.rows for source in sources), sum(source.tokens for source in sources),
                        sources, reused)
