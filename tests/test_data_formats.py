"""Every format gives the rows that the plain jsonl gives, and a damaged file is named."""

import gzip
import json
import random
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amid_ds.config import recipe
from amid_ds.data import check_sources, load_tokenizer, prepare, read_batches, shard
from amid_ds.errors import InputError

SEQ = 16


@pytest.fixture(scope="module")
def rows():
    rng = random.Random(0)
    texts = [" ".join(f"word{rng.randrange(999)}" for _ in range(rng.randint(1, 60)))
             for _ in range(120)]
    return [{"id": i, "text": text + "\n\u2028é"} for i, text in enumerate(texts)]


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def compress(path, kind, content):
    with pa.CompressedOutputStream(str(path), kind) as file:
        file.write(content)


def write_stream(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def write_file(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


WRITERS = {
    "a.jsonl": lambda path, rows: path.write_bytes(lines_of(rows)),
    "a.ndjson": lambda path, rows: path.write_bytes(lines_of(rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines_of(rows))),
    "a.json.zst": lambda path, rows: compress(path, "zstd", lines_of(rows)),
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path,
                                                   row_group_size=17),
    "stream.arrow": write_stream,
    "file.arrow": write_file,
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=3),
}


def prepared_pairs(path, tokenizer, out):
    """(documents, all pairs of an input token and its label)."""
    info = prepare(recipe.Data(train=[{"path": str(path)}]), SEQ, tokenizer, out)
    pairs = [pair for batch in read_batches(out, 1) for pair in
             zip(batch.input_ids[0].tolist(), batch.labels[0].tolist(), strict=True)]
    return info.sources[0].documents, pairs


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_tokens(tmp_path, tokenizer, rows, name):
    WRITERS[name](tmp_path / name, rows)
    (tmp_path / "reference.jsonl").write_bytes(lines_of(rows))
    check_sources(recipe.Data(train=[{"path": str(tmp_path / name)}]))
    assert prepared_pairs(tmp_path / name, tokenizer, tmp_path / "out") == \
        prepared_pairs(tmp_path / "reference.jsonl", tokenizer, tmp_path / "expected")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_may_be_compressed(tmp_path, tokenizer, rows, name):
    text = "".join(row["text"] for row in rows)
    if name.endswith(".txt"):
        (tmp_path / name).write_text(text)
    else:
        compress(tmp_path / name, {"gz": "gzip", "zst": "zstd"}[name.rpartition(".")[2]],
                 text.encode())
    documents, pairs = prepared_pairs(tmp_path / name, tokenizer, tmp_path / "out")
    assert documents == 1 and tokenizer.decode([pair[1] for pair in pairs[:-1]]) in text


def test_a_glob_and_a_folder_are_their_files_in_sorted_order(tmp_path, tokenizer, rows):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    WRITERS["a.jsonl.gz"](folder / "b.jsonl.gz", rows[40:80])
    WRITERS["a.parquet"](folder / "deep" / "c.parquet", rows[80:])
    WRITERS["a.jsonl"](folder / "a.jsonl", rows[:40])
    (folder / "README.md").write_text("not data")
    (tmp_path / "reference.jsonl").write_bytes(lines_of(rows))
    expected = prepared_pairs(tmp_path / "reference.jsonl", tokenizer, tmp_path / "expected")
    assert prepared_pairs(folder, tokenizer, tmp_path / "folder") == expected
    assert prepared_pairs(folder / "**" / "*.*[lqz]*", tokenizer, tmp_path / "glob")[0] == 120
    (tmp_path / "ab.jsonl").write_bytes(lines_of(rows[:80]))
    assert prepared_pairs(folder / "*l*", tokenizer, tmp_path / "some") == \
        prepared_pairs(tmp_path / "ab.jsonl", tokenizer, tmp_path / "ab")


def test_a_row_of_a_table_is_named_by_its_number(tmp_path, tokenizer, rows, monkeypatch):
    monkeypatch.setattr(shard, "MIN_CHUNK", 2000)
    bad = [*rows[:70], {"id": 70, "text": None}, *rows[71:]]
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        WRITERS[name](tmp_path / name, bad)
        with pytest.raises(
                InputError,
                match=f"{name} row 70: the field 'text' holds null where text is expected"):
            prepare(recipe.Data(train=[{"path": str(tmp_path / name)}]), SEQ, tokenizer,
                    tmp_path / "out")
    WRITERS["a.parquet"](tmp_path / "a.parquet", rows)
    prepare(recipe.Data(train=[{"path": str(tmp_path / "a.parquet")}]), SEQ, tokenizer,
            tmp_path / "out")
    for batch in read_batches(tmp_path / "out", 1):
        row = rows[int(re.fullmatch(r".*a.parquet row (\d+)", batch.sources[0])[1])]
        head = tokenizer.decode(batch.input_ids[0, :4]).split("</s>")[0]
        assert head.strip("\ufffd") in row["text"]


@pytest.mark.parametrize("keep", [0.5, 0.99])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst"])
def test_a_compressed_file_cut_short_is_named_with_its_line(tmp_path, tokenizer, rows, name, keep):
    WRITERS[name](tmp_path / name, rows)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:int(len(content) * keep)])
    data = recipe.Data(train=[{"path": str(tmp_path / name)}])
    with pytest.raises(InputError,
                       match=rf"{name} line \d+: the file is damaged or cut short: Truncated"):
        prepare(data, SEQ, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow", "a.jsonl.gz"])
def test_a_file_that_is_not_of_its_kind_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else" * 100)
    with pytest.raises(InputError, match=f"{name} (cannot be read|line 1: the file is damaged)"):
        check_sources(recipe.Data(train=[{"path": str(tmp_path / name)}]))


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_table_without_the_column_is_refused_with_those_it_has(tmp_path, rows, name):
    WRITERS[name](tmp_path / name, rows)
    with pytest.raises(InputError, match=f"{name} lacks the field 'body'; it has 'id', 'text'"):
        check_sources(recipe.Data(train=[{"path": str(tmp_path / name), "text": "body"}],
                                  on_bad_row="skip"))


def test_conversations_may_come_from_a_table(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + m['content'] + '\n' }}{% endfor %}")
    turns = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "word2"}]
    pq.write_table(pa.Table.from_pylist([{"chat": turns}] * 3), tmp_path / "a.parquet")
    info = prepare(recipe.Data(train=[{"path": str(tmp_path / "a.parquet"), "messages": "chat"}]),
                   64, tokenizer, tmp_path / "out")
    assert info.sources[0].documents == 3
    assert info.tokens == 3 * len(tokenizer("assistantword2\n")["input_ids"])


def test_a_data_set_of_the_hub_is_read_from_its_cache(tmp_path, tokenizer, rows, monkeypatch):
    """With a stand-in for the hub: its arguments, and that the cached Arrow files are the rows."""
    (tmp_path / "reference.jsonl").write_bytes(lines_of(rows))
    asked = []

    def load_dataset(path, name, **keys):
        asked.append((path, name, keys))
        rows = datasets.Dataset.from_json(str(tmp_path / "reference.jsonl"),
                                          cache_dir=str(tmp_path / "cache"))
        return datasets.DatasetDict(train=rows, test=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "owner/name", "config": "small", "split": "test", "revision": "abc123"}
    info = prepare(recipe.Data(train=[source]), SEQ, tokenizer, tmp_path / "out")
    assert asked[0] == ("owner/name", "small", {"revision": "abc123"})
    assert info.sources[0].documents == 120


def test_what_is_neither_here_nor_on_the_hub_is_refused(tmp_path, tokenizer, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
            InputError,
            match=r"'owner/name' is no file or folder here, and no data set .*: no network\n"):
        prepare(recipe.Data(train=[{"path": "owner/name"}]), SEQ, tokenizer, tmp_path / "out")
    # Does not ask the hub: every rank would.
    check_sources(recipe.Data(train=[{"path": "owner/name"}]))
    with pytest.raises(InputError, match=r"'owner/name\.jsonl' is not there"):
        check_sources(recipe.Data(train=[{"path": "owner/name.jsonl"}]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(InputError, match=r"'owner/name' is not there"):
        check_sources(recipe.Data(train=[{"path": "owner/name"}]))
