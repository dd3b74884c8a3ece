"""Data as people bring them: what is read is what they mean, and what cannot be is refused."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data import write_jsonl
from support.models import WORDS, make_model

from amid_ds.cli import main
from amid_ds.config.recipe import Data, EvalSet, Source
from amid_ds.data import check_sources, prepare, prepare_all, read_prompts, readers
from amid_ds.data.locate import source_files
from amid_ds.data.prepared import PreparedDataset
from amid_ds.data.tables import table_columns
from amid_ds.errors import InputError
from amid_ds.eval.rows import RowOptions

SEQ = 16
TEXTS = [f"{i} {WORDS[i % len(WORDS)]}" for i in range(100)]
PAIRS = [{"prompt": f"{WORDS[i]} ", "response": WORDS[i + 1]} for i in range(8)]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def texts_of(path, on_bad_row="error", **keys):
    """The first column of every usable row of a source."""
    return list(read_prompts(Source(path=str(path), **keys), on_bad_row))


def refused(words, path, **keys):
    with pytest.raises(InputError, match=words):
        texts_of(path, **keys)


# Splits and slices

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set `owner/name` with train in three files and test in one, as if from the hub."""
    def cached(texts, name):
        parts = datasets.Dataset.from_dict({"text": texts})
        parts.save_to_disk(tmp_path / name, num_shards=3 if name == "train" else 1)
        return datasets.load_from_disk(str(tmp_path / name))

    splits = datasets.DatasetDict(train=cached(TEXTS, "train"),
                                  test=cached([f"test {text}" for text in TEXTS[:20]], "test"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    return splits


@pytest.mark.parametrize("split", ["train", "train[:10%]", "train[90%:]", "train[30:60]",
                                   "train[-5:]", "train+test", "train[:10%]+train[-80%:]",
                                   "test[10:]+train[33:67]"])
def test_a_slice_of_a_split_is_the_rows_that_datasets_gives(hub, split):
    expected = []
    # Independently of ReadInstruction, whose absolute form the code under test takes.
    for part in split.split("+"):
        name, _, bounds = part.partition("[")
        rows = hub[name]["text"]
        first, _, stop = bounds.rstrip("]").partition(":")
        first, stop = (int(value[:-1]) * len(rows) // 100 if value.endswith("%") else
                       int(value) if value else None for value in (first, stop))
        expected += list(rows)[first:stop]
    assert texts_of("owner/name", split=split) == expected


def test_a_training_and_an_evaluation_slice_share_no_row_and_name_their_rows(hub, tokenizer,
                                                                             tmp_path):
    rows = {}
    for split in ("train[:90%]", "train[90%:]"):
        prepare(Data(train=[{"path": "owner/name", "split": split}]), SEQ, tokenizer,
                tmp_path / split)
        prepared = PreparedDataset(tmp_path / split)
        rows[split] = {prepared.row(number).source for number in range(len(prepared))}
    assert not rows["train[:90%]"] & rows["train[90%:]"]
    last = source_files(Source(path="owner/name", split="train[90%:]"))[0]
    assert last.path.endswith("data-00002-of-00003.arrow") and last.first == 90 - 67
    assert any(f"{last.path} row 23".endswith(name) for name in rows["train[90%:]"])


@pytest.mark.parametrize(("split", "words"), [
    ("validation", "'validation' .*: Unknown split.*\n.*train, test"),
    ("train[:10", "Unrecognized instruction format"), ("train[50:50]", "has no row"),
    ("train[:900%]", "(?i)percent|100")])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(hub, split, words):
    refused(words, "owner/name", split=split)


@pytest.mark.parametrize("split", ["train[:10%]", "test"])
def test_a_split_of_plain_files_is_refused(tmp_path, split):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    refused("whose files have no splits", path, split=split)
    refused("whose files have no splits", tmp_path, split=split)
    assert texts_of(path, split="train") == ["a"]


def test_a_slice_of_a_stream_is_refused(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    data = Data(train=[{"path": str(tmp_path), "split": "train[:10%]", "stream": True}])
    with pytest.raises(InputError, match="Bad split: train"):
        prepare_all(data, SEQ, tokenizer, tmp_path / "out")


# What save_to_disk leaves

def test_a_saved_data_set_is_what_load_from_disk_gives_without_datasets_own_caches(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=2)
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    loaded.filter(lambda row: len(row["text"]) > 5)
    loaded.map(lambda row: {"text": row["text"].upper()})
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 2
    for path in (tmp_path / "saved", tmp_path, tmp_path / "saved" / "*.arrow",
                 tmp_path / "**" / "*.arrow"):
        assert texts_of(path) == TEXTS
    assert texts_of(tmp_path / "saved", split="train[:10%]") == TEXTS[:10]
    mapped = next(path for path in (tmp_path / "saved").glob("cache-*.arrow")
                  if "text" in pa.ipc.open_stream(str(path)).schema.names)
    assert texts_of(mapped) == [text.upper() for text in TEXTS]


def test_of_a_saved_dict_the_named_split_is_read_and_none_named_is_refused(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [f"{name} {text}" for text in TEXTS]})
             for name in ("train", "test")}
    datasets.DatasetDict(**parts).save_to_disk(tmp_path / "saved")
    for name in parts:
        assert texts_of(tmp_path / "saved", split=name) == parts[name]["text"][:]
        assert texts_of(tmp_path / "saved" / name) == parts[name]["text"][:]
    refused("has the splits train, test, and the source names none", tmp_path / "saved")
    refused("has the splits train, test", tmp_path)
    # An evaluation set becomes a source on the way.
    part = Data(train=[{"path": "x"}], eval=[EvalSet(path=str(tmp_path / "saved"))]).parts()
    with pytest.raises(InputError, match="has the splits"):
        source_files(part["eval/saved"].train[0])


def test_a_saved_data_set_that_lost_a_file_or_its_list_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path, num_shards=2)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "_indices_files": [{"f": "x"}]}))
    refused("a selection of its rows", tmp_path)
    for damaged in ('{"_data_files": "none"}', '{"_data_files": ["a"]}', "[]", "{", "\0"):
        (tmp_path / "state.json").write_text(damaged)
        refused("state.json cannot be read", tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / state["_data_files"][1]["filename"]).unlink()
    refused("has lost its file .*data-00001-of-00002.arrow", tmp_path)


# Files that nobody means

HIDDEN = [".ipynb_checkpoints/a-checkpoint.jsonl", ".cache/a.jsonl", ".git/a.jsonl", "._a.jsonl",
          "__MACOSX/a.jsonl", "deep/.hidden/deeper/a.jsonl"]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_files_are_passed_over_unless_named(tmp_path, hidden):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "seen"}])
    (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(tmp_path / hidden, [{"text": "hidden"}])
    for path in (tmp_path, tmp_path / "**" / "*.jsonl", tmp_path / "*.jsonl"):
        assert texts_of(path) == ["seen"]
    for path in (tmp_path / hidden, (tmp_path / hidden).parent / "*a*.jsonl"):
        if path.name.startswith("*") and hidden.startswith("._"):
            path = path.parent / "._*"
        assert texts_of(path) == ["hidden"]


# Marks, lines and JSON

def test_a_byte_order_mark_and_windows_line_ends_change_no_row(tmp_path):
    rows = "".join(json.dumps({"text": text}) + "  \r\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + rows.encode()))
    assert texts_of(tmp_path / "a.jsonl") == texts_of(tmp_path / "b.jsonl.gz") == TEXTS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_another_encoding_is_refused_by_its_mark(tmp_path, encoding, on_bad_row):
    text = "\ufeff" * encoding.endswith("be") + '{"text": "a"}\n'
    (tmp_path / "a.jsonl").write_bytes(text.encode(encoding))
    refused("a.jsonl is UTF-16 or UTF-32", tmp_path / "a.jsonl", on_bad_row=on_bad_row)


BAD_LINES = {
    "a number of 5,000 digits": '{"text": ' + "7" * 5000 + "}",
    "nested beyond the stack": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "NaN for text": '{"text": NaN}',
    "a NUL": '{"text": "a\0b"}',
    "an empty line": "",
    "a list": '["a"]',
    "an opening of a JSON array": "[",
    "half a surrogate": '{"text": "\\ud800"}',
    "two objects": '{"text": "a"}{"text": "b"}',
    "no JSON": "text",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(tmp_path, line):
    content = '{"text": "first"}\n' + BAD_LINES[line] + '\n{"text": "last"}\n'
    (tmp_path / "a.jsonl").write_text(content)
    refused("a.jsonl line 2: ", tmp_path / "a.jsonl")
    assert texts_of(tmp_path / "a.jsonl", on_bad_row="skip") == ["first", "last"]


def test_json_over_several_lines_is_refused_with_what_makes_lines_of_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}], indent=1))
    refused(r"a.json line 1: not JSON: .*each line is to be an object by itself \(`jq -c",
            tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_line_too_long_to_hold_is_one_bad_row(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(readers, "PIECE_BYTES", 64)
    lines = ['{"text": "first"}', '{"text": "%s"}' % ("x" * 5000), '{"text": "last"}',
             '{"text": "%s"}' % ("y" * 986)]
    content = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    refused(f"{name} line 2: a line of 5,013 bytes", tmp_path / name)
    texts = texts_of(tmp_path / name, on_bad_row="skip")
    assert len(lines[3]) == 998
    if name == "a.txt":
        assert "".join(texts) == "\n".join([lines[0], *lines[2:]])
        return
    assert texts == ["first", "last", "y" * 986]
    if name == "a.jsonl":
        # Whatever the spans, each line is read once.
        for target in (7, 100, 1500):
            spans = readers.split_file(0, readers.DataFile(str(tmp_path / name)), target)
            rows = [row for span in spans for row in readers.read_raw_rows(span, ["text"])]
            assert [row.values for row in rows] == [("first",), (), ("last",), ("y" * 986,)]


@pytest.mark.slow
def test_a_compressed_line_of_3_gigabytes_needs_the_memory_of_the_limit(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(3072):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "last"}\n')
    code = ("import resource, sys\n"
            "from amid_ds.data import read_prompts\n"
            "from amid_ds.config.recipe import Source\n"
            "print(list(read_prompts(Source(path=sys.argv[1]), 'skip')))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jsonl.gz")], text=True,
                          capture_output=True, check=True)
    texts, kilobytes = done.stdout.split("\n")[:2]
    assert texts == "['last']" and int(kilobytes) < 1.5e6


# Tables

def invalid_text(bad):
    """A column of texts of which some are no UTF-8."""
    raw = [b"\xff\xfe" if number in bad else text.encode() for number, text in enumerate(TEXTS)]
    return pa.array(raw, pa.binary()).view(pa.string())


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("nested", [False, True], ids=["text", "messages"])
def test_text_of_a_table_that_is_no_utf8_is_one_bad_row(tmp_path, name, nested):
    column = invalid_text({17, 99})
    if nested:
        turns = pa.StructArray.from_arrays([pa.array(["assistant"] * len(TEXTS)), column],
                                           ["role", "content"])
        column = pa.ListArray.from_arrays(pa.array(range(len(TEXTS) + 1), pa.int32()), turns)
    table = pa.table({"text": column})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name, row_group_size=30)
    else:
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    keys = {"messages": "text"} if nested else {}
    refused(f"{name} row 17: cannot be read: .*utf-8", tmp_path / name, **keys)
    left = texts_of(tmp_path / name, on_bad_row="skip", **keys)
    assert [row[0]["content"] if nested else row for row in left] == \
        [text for number, text in enumerate(TEXTS) if number not in (17, 99)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, name):
    schema = pa.schema([("text", pa.string())] * 2)
    batch = pa.record_batch([pa.array(["a"])] * 2, schema=schema)
    if name == "a.parquet":
        pq.write_table(pa.Table.from_batches([batch]), tmp_path / name)
    else:
        with pa.ipc.new_stream(str(tmp_path / name), schema) as writer:
            writer.write_batch(batch)
    refused("has the column 'text' 2 times", tmp_path / name, on_bad_row="skip")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_of_instructions_may_lack_the_column_that_they_may_lack(tmp_path, name):
    table = pa.Table.from_pylist([{"instruction": "a", "output": "b"}])
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    prompt, = texts_of(tmp_path / name, template="minillm")
    assert "### Instruction:\na" in prompt and "### Input" not in prompt


def test_a_parquet_file_without_a_row_group_is_empty(tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])):
        pass
    with pytest.raises(InputError, match="is empty: it has no row group"):
        check_sources(Data(train=[{"path": str(tmp_path / "a.parquet")}]))


def test_a_wrong_offset_in_an_arrow_file_is_a_damaged_file_and_no_crash(tmp_path):
    """An offset of 2^30 leads far outside the file."""
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 1 << 30, 3)))
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abc")])
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([column], ["text"]))
    refused("a.arrow cannot be read: .*offset", tmp_path / "a.arrow", on_bad_row="skip")


# The JSON of a prepared folder

DAMAGE = {
    "cut": lambda text: text[:len(text) // 2],
    "empty": lambda text: "",
    "another program's": lambda text: '{"name": "app", "version": 1}',
    "a list": lambda text: "[]",
    "nested": lambda text: "[" * 100_000,
    "no text": lambda text: "\0" * 99,
    "text for a number": lambda text: re.sub(r'("rows"|"format"): \d+', r'\1: "x"', text, count=1),
}
MANIFEST_DAMAGE = {
    **DAMAGE,
    "rows that do not add up": lambda text: text.replace('"rows": ', '"rows": 1', 1),
    "a source that is not there": lambda text: text.replace('"source": 0', '"source": 7'),
}


@pytest.fixture(scope="module")
def prepared_text(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("prepared")
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in TEXTS])
    data = Data(train=[{"path": str(folder / "a.jsonl")}], prepared="a folder that is named")
    prepare(data, SEQ, tokenizer, folder / "out")
    return data, folder / "out"


@pytest.mark.parametrize(("name", "damage"), [
    *(("manifest.json", damage) for damage in MANIFEST_DAMAGE),
    *((name, damage) for name in ("plan.json", "shards/000000.json") for damage in DAMAGE)])
def test_a_damaged_or_foreign_file_of_prepared_data_is_named(prepared_text, tmp_path, tokenizer,
                                                             name, damage):
    data, folder = prepared_text
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out" / name
    text = path.read_text()
    if name != "manifest.json":
        (tmp_path / "out" / "manifest.json").unlink()
    path.write_text(MANIFEST_DAMAGE[damage](text))
    assert path.read_text() != text
    with pytest.raises(InputError, match=rf"{name} is damaged, or another program's"):
        prepare(data, SEQ, tokenizer, tmp_path / "out")


def test_prepared_data_in_another_format_are_prepared_anew_or_refused(prepared_text, tmp_path,
                                                                      tokenizer):
    data, folder = prepared_text
    shutil.copytree(folder, tmp_path / "out")
    for name in ("manifest.json", "plan.json"):
        value = json.loads((folder / name).read_text())
        value.get("plan", value)["format"] = 1
        # As an earlier version may have had it.
        for source in value["sources"]:
            source.pop("rows", None)
        (tmp_path / "out" / name).write_text(json.dumps(value))
    with pytest.raises(InputError, match="by another version of amid-ds: its format is 1"):
        prepare(data, SEQ, tokenizer, tmp_path / "out")
    own = data.model_copy(update={"prepared": None})
    assert not prepare(own, SEQ, tokenizer, tmp_path / "out").reused
    assert (tmp_path / "out" / "manifest.json").read_text() == \
        (folder / "manifest.json").read_text()


# eval and generate

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brought") / "model"
    make_model(folder, "llama", 0)
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def evaluated(capsys, model, *options):
    status = main(["eval", model, "--seq-length", "32", "--json", *map(str, options)])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)["loss"]


@pytest.fixture
def forms(tmp_path):
    """The same eight pairs in every form that `prepare` reads."""
    plain = "".join(json.dumps(row) + "\n" for row in PAIRS)
    (tmp_path / "a.jsonl").write_text(plain)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.encode()))
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "a.parquet")
    saved = datasets.Dataset.from_list(PAIRS)
    datasets.DatasetDict(train=saved.select([0]), test=saved).save_to_disk(tmp_path / "saved")
    renamed = [{"q": row["prompt"], "a": row["response"], "text": ""} for row in PAIRS]
    write_jsonl(tmp_path / "renamed.jsonl", renamed)
    return {"a.jsonl": [], "bom.jsonl": [], "a.jsonl.gz": [], "a.parquet": [], "a.pa*": [],
            "saved": ["--split", "test"], "renamed.jsonl": ["--prompt", "q", "--response", "a"]}


def test_eval_reads_every_form_that_prepare_reads(model, forms, tmp_path, capsys):
    losses = {name: evaluated(capsys, model, "--seeds", 0, "--data", tmp_path / name, *options)
              for name, options in forms.items()}
    assert len(set(losses.values())) == 1, losses


def test_eval_reads_conversations_and_generates_nothing_for_them(model, tmp_path, capsys):
    turns = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": WORDS[1]}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    write_jsonl(tmp_path / "b.jsonl", [{"chat": turns}])
    named = ("--data", tmp_path / "b.jsonl", "--messages", "chat")
    assert evaluated(capsys, model, "--data", tmp_path / "a.jsonl") == \
        evaluated(capsys, model, *named)
    assert main(["eval", model, "--data", str(tmp_path / "a.jsonl"), "--seeds", "2"]) == 2
    assert "whose rows have no prompt" in capsys.readouterr().err


EVAL_REFUSALS = {
    "columns that say nothing": ([], ["'q', 'a'", "--text COL", "--messages COL"]),
    "half a pair": (["--prompt", "q"], ["--prompt q", "one kind of row"]),
    "two kinds": (["--text", "q", "--messages", "a"], ["--text q --messages a"]),
    "a column that is not there": (["--text", "body"],
                                   ["lacks the field 'body'", "name other columns"]),
    "a slice of a file": (["--text", "q", "--split", "train[:10%]"], ["have no splits"]),
}


@pytest.mark.parametrize("case", EVAL_REFUSALS)
def test_eval_refuses_rows_by_its_own_options_before_it_loads_a_model(case, tmp_path, capsys,
                                                                      monkeypatch, model):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained",
                        lambda *_, **__: pytest.fail("a model was loaded"))
    write_jsonl(tmp_path / "a.jsonl", [{"q": "a", "a": "b"}])
    options, words = EVAL_REFUSALS[case]
    status = main(["eval", model, "--data", str(tmp_path / "a.jsonl"), *options])
    message = capsys.readouterr().err
    assert status == 2 and [word for word in words if word not in message] == [], message


def test_eval_skips_bad_rows_if_asked(model, tmp_path, capsys):
    write_jsonl(tmp_path / "good.jsonl", PAIRS)
    write_jsonl(tmp_path / "bad.jsonl", [*PAIRS, {"prompt": "a", "response": None}])
    options = ("--seeds", 0, "--data", tmp_path / "bad.jsonl")
    assert main(["eval", model, *map(str, options)]) == 2
    assert "--on-bad-row skip" in capsys.readouterr().err
    assert evaluated(capsys, model, *options, "--on-bad-row", "skip") == \
        evaluated(capsys, model, "--seeds", 0, "--data", tmp_path / "good.jsonl")


def test_generate_reads_every_form_of_its_prompts(model, forms, tmp_path, capsys):
    answers = set()
    for number, (name, options) in enumerate(forms.items()):
        out = tmp_path / f"out{number}.jsonl"
        options = [option for option in options if option not in ("--response", "a")]
        status = main(["generate", model, "--prompts", str(tmp_path / name), "--out", str(out),
                       "--max-new-tokens", "2", "--temperature", "0", *options])
        assert status == 0, capsys.readouterr().err
        answers.add(out.read_text())
    assert len(answers) == 1 and len(answers.pop().splitlines()) == len(PAIRS)


def test_generate_refuses_a_column_without_a_file_of_prompts(model, tmp_path, capsys):
    out = ["--out", str(tmp_path / "o.jsonl")]
    assert main(["generate", model, "--prompt", "q", *out]) == 2
    assert "--prompt q without --prompts" in capsys.readouterr().err


def test_the_kind_of_rows_is_found_by_their_columns(tmp_path):
    kinds = {"text": {"text": "a"}, "prompt": {"prompt": "a", "response": "b"},
             "messages": {"messages": [], "id": 1}, "template": {"instruction": "a", "output": "b"}}
    for kind, row in kinds.items():
        write_jsonl(tmp_path / "a.jsonl", [row])
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        for name in ("a.jsonl", "a.parquet"):
            source = RowOptions().data(str(tmp_path / name)).train[0]
            assert [name for name in kinds if getattr(source, name) is not None] == \
                ([] if kind == "text" else [kind])
        # A line that cannot be used does not say what the others are.
        (tmp_path / "a.jsonl").write_text("\n{}\nno JSON\n" + json.dumps(row))
        data = RowOptions(on_bad_row="skip").data(str(tmp_path / "a.jsonl"))
        assert kind == "text" or getattr(data.train[0], kind) is not None


@pytest.mark.parametrize("write", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_column_whose_name_is_no_utf8_is_a_damaged_file(tmp_path, write):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["a"], "né": ["b"]})
    with write(str(path), table.schema) as file:
        file.write_table(table)
    path.write_bytes(path.read_bytes().replace("né".encode(), b"n\xff\xff"))
    with pytest.raises(InputError, match="the name of a column is no UTF-8"):
        table_columns(str(path), is_parquet=False)
