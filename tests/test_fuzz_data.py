"""Damaged data files: each is read, has bad rows or is refused; none is a traceback or a crash.

Fixed seeds. Each damaged file is read in a process of its own, forked from one that has imported
everything, since what is to be noticed is the end of the process.
"""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data import write_jsonl

from amid_ds.config.recipe import Data, Source
from amid_ds.data import PreparedDataset, prepare
from amid_ds.data.locate import source_files
from amid_ds.data.readers import split_file
from amid_ds.data.sources import read_checked_rows
from amid_ds.errors import InputError

FEW, MANY = 24, 400
MEMORY = 16 << 30
COLUMNS = {"text": {"text": "text"}, "chat": {"messages": "chat"}}


def table():
    draw = random.Random(0)
    texts = ["".join(draw.choice("abc é☃ word ") for _ in range(draw.randint(1, 60)))
             for _ in range(200)]
    return pa.Table.from_pylist([
        {"id": i, "text": text, "chat": [{"role": "user", "content": text},
                                         {"role": "assistant", "content": text[::-1]}]}
        for i, text in enumerate(texts)])


def write_arrow(path, rows, new=pa.ipc.new_stream, **options):
    with new(str(path), rows.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(rows, max_chunksize=50)


def write_dictionary(path, rows):
    write_arrow(path, rows.set_column(1, "text", rows["text"].dictionary_encode()))


WRITERS = {
    "stream.arrow": write_arrow,
    "file.arrow": lambda path, rows: write_arrow(path, rows, pa.ipc.new_file),
    "compressed.arrow": lambda path, rows: write_arrow(path, rows, compression="zstd"),
    "dictionary.arrow": write_dictionary,
    "a.parquet": lambda path, rows: pq.write_table(rows, path, row_group_size=50),
    "a.jsonl": lambda path, rows: write_jsonl(path, rows.to_pylist()),
    "a.jsonl.gz": lambda path, rows: write_gzip(path, rows.to_pylist()),
}


def write_gzip(path, rows):
    with pa.CompressedOutputStream(str(path), "gzip") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def damage(content: bytes, draw: random.Random) -> bytes:
    """The content with some bits flipped, or a part cut out, doubled or zeroed.

    Half of the damage is near the ends, where these formats have their descriptions.
    """
    out = bytearray(content)
    ends = min(len(out), 1500)
    for _ in range(draw.choice([1, 1, 3, 10])):
        at = draw.choice([draw.randrange(len(out)), draw.randrange(len(out)),
                          draw.randrange(ends), len(out) - 1 - draw.randrange(ends)])
        out[at] ^= 1 << draw.randrange(8)
    start, size = draw.randrange(len(out)), draw.randrange(1, 200)
    kind = draw.randrange(12)
    if kind == 0:
        del out[start:start + size]
    elif kind == 1:
        out[start:start] = out[start:start + size]
    elif kind == 2:
        out[start:start + size] = bytes(len(out[start:start + size]))
    elif kind == 3:
        del out[max(start, 1):]
    return bytes(out)


def outcome(read: Callable[[], int]) -> str:
    """`read` in a process of its own: "read", "bad rows", "refused", or what went wrong."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(120)
        try:
            answer = "bad rows" if read() else "read"
        except InputError:
            answer = "refused"
        except BaseException:
            answer = traceback.format_exc()[-2000:]
        os.write(sending, answer.encode())
        os._exit(0)
    os.close(sending)
    answer = b""
    while block := os.read(receiving, 4096):
        answer += block
    os.close(receiving)
    status = os.waitpid(child, 0)[1]
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else answer.decode()


def count_bad_rows(source: Source) -> int:
    return sum(row.problem is not None
               for number, file in enumerate(source_files(source))
               for span in split_file(number, file, 1 << 13)
               for row in read_checked_rows(span, source))


def fuzz(path: Path, count: int, seed: int, read: Callable[[], int]) -> collections.Counter[str]:
    good, draw = path.read_bytes(), random.Random(seed)
    assert outcome(read) == "read"
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        path.write_bytes(damage(good, draw))
        outcomes[outcome(read)] += 1
    assert outcomes.keys() <= {"read", "bad rows", "refused"}, outcomes
    return outcomes


COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_source_is_read_or_named_and_never_ends_the_process(tmp_path, name, columns,
                                                                      count):
    WRITERS[name](tmp_path / name, table())
    source = Source(path=str(tmp_path / name), **COLUMNS[columns])
    outcomes = fuzz(tmp_path / name, count, seed=count, read=lambda: count_bad_rows(source))
    assert outcomes["refused"] + outcomes["bad rows"] > 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["shards/000000.arrow", "manifest.json"])
def test_damaged_prepared_data_are_read_or_named_and_never_end_the_process(tmp_path, tokenizer,
                                                                           name, count):
    write_jsonl(tmp_path / "a.jsonl", table().select(["text"]).to_pylist())
    prepare(Data(train=[{"path": str(tmp_path / "a.jsonl")}]), 16, tokenizer, tmp_path / "out")

    def read() -> int:
        prepared = PreparedDataset(tmp_path / "out")
        return sum(len(prepared.row(number).tokens) == 0 for number in range(len(prepared)))

    outcomes = fuzz(tmp_path / "out" / name, count, seed=count, read=read)
    assert outcomes["refused"] > 0
