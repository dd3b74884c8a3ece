"""From files to micro-batches: every token once, correct labels, bad input named by its line."""

import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.data import split_documents
from support.ranks import Ranks, run_ranks
from support.runs import write_recipe
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from amid_ds.bench.data import measure_data
from amid_ds.config import recipe
from amid_ds.data import (
    PreparedDataset,
    PreparedLoader,
    check_sources,
    pack,
    preparation,
    prepare,
    prepare_all,
    read_batches,
    shard,
)
from amid_ds.data.readers import DataFile
from amid_ds.data.tokenizer import load_tokenizer
from amid_ds.errors import InputError

SEQ = 16


@pytest.fixture
def many_chunks(monkeypatch):
    """Small chunks, so that a small corpus becomes many shards."""
    monkeypatch.setattr(shard, "MIN_CHUNK", 2000)


def texts(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(f"word{rng.randrange(999)}" for _ in range(rng.randint(1, 60)))
            + "\n" * rng.randrange(3)
            for _ in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def data_of(*sources, **keys):
    return recipe.Data(train=list(sources), **keys)


def labelled(batch):
    """(input token, label) of every position with a loss."""
    keep = batch.labels != -100
    return list(zip(batch.input_ids[keep].tolist(), batch.labels[keep].tolist(), strict=True))


def expected_pairs(documents, tokenizer):
    """The pairs that a text source trains on: each token of all documents and the next."""
    stream = [i for text in documents
              for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return list(itertools.pairwise(stream))


def test_text_rows_train_on_every_token_once_and_in_order(tmp_path, tokenizer):
    documents = texts(40)
    path = write_jsonl(tmp_path / "corpus.jsonl",
                       [{"id": i, "body": text} for i, text in enumerate(documents)])
    info = prepare(data_of({"path": path, "text": "body"}), SEQ, tokenizer, tmp_path / "out")
    batches = list(read_batches(tmp_path / "out", 3))
    pairs = [pair for batch in batches for pair in labelled(batch)]
    assert pairs == expected_pairs(documents, tokenizer)
    assert info.tokens == len(pairs) and info.sources[0].documents == 40 and not info.reused
    assert {batch.input_ids.shape[1] for batch in batches[:-1]} == {SEQ}
    assert batches[0].input_ids.dtype == batches[0].labels.dtype == torch.int64


def test_shards_together_hold_the_whole_corpus(tmp_path, tokenizer, many_chunks):
    """Cut into many shards, only the pair across each shard's border is missing."""
    documents = texts(200)
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in documents])
    prepare(data_of({"path": path}), SEQ, tokenizer, tmp_path / "out")
    shards = len(list((tmp_path / "out" / "shards").glob("*.arrow")))
    batches = read_batches(tmp_path / "out", 1)
    pairs = [pair for batch in batches for pair in labelled(batch)]
    wanted = expected_pairs(documents, tokenizer)
    assert shards > 10 and len(pairs) == len(wanted) - (shards - 1)
    at = 0
    # In order; only a pair that begins with an end of text may be missing.
    for pair in pairs:
        while wanted[at] != pair:
            assert wanted[at][0] == tokenizer.eos_token_id
            at += 1
        at += 1
    assert at == len(wanted)


def test_a_text_file_is_one_document_with_its_white_space(tmp_path, tokenizer, monkeypatch):
    # Read in many pieces, and from two chunks.
    monkeypatch.setattr("amid_ds.data.readers.PIECE_BYTES", 50)
    monkeypatch.setattr(shard, "MIN_CHUNK", 4000)
    folder = tmp_path / "texts"
    folder.mkdir()
    contents = ["".join(texts(100, seed)).replace("\n", "\n  \n") for seed in (1, 2)]
    for name, content in zip("ab", contents, strict=True):
        (folder / f"{name}.txt").write_bytes(content.encode())
    info = prepare(data_of({"path": str(folder)}), SEQ, tokenizer, tmp_path / "out")
    batches = list(read_batches(tmp_path / "out", 1))
    ids, previous = [], None
    # Rows overlap by one token within a shard.
    for batch in batches:
        row = [*batch.input_ids[0].tolist(), batch.labels[0, -1].item()]
        ids += row[1:] if previous == row[0] else row
        previous = row[-1]
    assert ids.count(tokenizer.eos_token_id) == info.sources[0].documents == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(contents)


def test_the_loss_of_a_response_row_is_on_the_response_alone(tmp_path, tokenizer):
    rows = [{"q": "word1 and", "a": "number 7"}, {"q": "x", "a": "a longer word2 answer é"}]
    path = write_jsonl(tmp_path / "instructions.jsonl", rows)
    data = data_of({"path": path, "prompt": "q", "response": "a"}, isolate_documents=False)
    prepare(data, 64, tokenizer, tmp_path / "out")
    [batch] = read_batches(tmp_path / "out", 2)
    for i, row in enumerate(rows):
        prompt, response = tokenizer(row["q"])["input_ids"], tokenizer(row["a"])["input_ids"]
        whole = [*prompt, *response, tokenizer.eos_token_id]
        labels = [-100] * (len(prompt) - 1) + whole[len(prompt):]
        padding = batch.labels.shape[1] - len(labels)
        assert batch.input_ids[i, :len(whole) - 1].tolist() == whole[:-1]
        assert batch.labels[i].tolist() == labels + [-100] * padding


def test_a_long_prompt_loses_its_left_and_a_long_response_its_right(tmp_path, tokenizer):
    long, short = " ".join(texts(5)), "word1"
    rows = [{"q": long, "a": short}, {"q": short, "a": long}, {"q": "x", "a": "y"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    info = prepare(data_of({"path": path, "prompt": "q", "response": "a"}), SEQ, tokenizer,
                   tmp_path / "out")
    assert info.sources[0].truncated == 2
    [batch] = read_batches(tmp_path / "out", 3)
    long_ids, short_ids = tokenizer(long)["input_ids"], tokenizer(short)["input_ids"]
    assert batch.input_ids.shape == (3, SEQ)
    assert batch.input_ids[0].tolist() == [*long_ids, *short_ids][-SEQ:]
    assert labelled(batch)[:len(short_ids)][-1][1] == short_ids[-1]
    assert batch.labels[0, -1] == tokenizer.eos_token_id
    assert batch.input_ids[1].tolist() == [short_ids[-1], *long_ids[:SEQ - 1]]
    assert batch.labels[1].tolist() == long_ids[:SEQ]


@pytest.mark.parametrize("waiting", [1, 64])
def test_isolated_prompts_share_rows_each_as_it_is_in_a_row_of_its_own(tmp_path, tokenizer,
                                                                       monkeypatch, waiting):
    monkeypatch.setattr(pack, "OPEN_ROWS", waiting)
    rng = random.Random(4)
    rows = [{"q": "word1 " * rng.randint(1, 9), "a": f"{i} " + "word2 " * rng.randint(1, 15)}
            for i in range(60)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    infos, documents = [], []
    # The default is to isolate prompts.
    for isolate in (None, False):
        data = data_of({"path": path, "prompt": "q", "response": "a"}, isolate_documents=isolate)
        infos.append(prepare(data, 120, tokenizer, tmp_path / f"out{isolate}").sources[0])
        batches = list(read_batches(tmp_path / f"out{isolate}", 3))
        isolated_documents = itertools.chain.from_iterable(map(split_documents, batches))
        inputs = sum(batch.input_ids.numel() - batch.padding for batch in batches)
        assert inputs == pytest.approx(infos[-1].rows * 120 * (1 - infos[-1].padding))
        documents.append(sorted([pair for pair in zip(ids[0].tolist(), labels.tolist(), strict=True)
                                 if pair[1] != -100] for ids, labels in isolated_documents))
    together, alone = infos
    assert documents[0] == documents[1] and together.tokens == alone.tokens
    assert together.rows < alone.rows / 2 and together.padding < alone.padding / 2
    assert "% padding" in str(together)


def test_isolated_texts_start_again_and_do_not_predict_the_next_ones_beginning(tmp_path, tokenizer,
                                                                               many_chunks,
                                                                               monkeypatch):
    # Each document is read in several pieces.
    monkeypatch.setattr("amid_ds.data.encode.PIECE_BYTES", 50)
    documents = texts(60)
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in documents])
    prepare(data_of({"path": path}, isolate_documents=True), SEQ, tokenizer, tmp_path / "out")
    pairs, ends = [], 0
    for batch in read_batches(tmp_path / "out", 2):
        pairs += labelled(batch)
        for ids, labels in split_documents(batch):
            end = ids[0] == tokenizer.eos_token_id
            assert not end[:-1].any() and (not end[-1] or labels[-1] == -100)
            ends += end.any()
    wanted = [pair for pair in expected_pairs(documents, tokenizer)
              if pair[0] != tokenizer.eos_token_id]
    assert sorted(pairs) == sorted(wanted) and ends > 20


@pytest.fixture
def prepared(tmp_path, tokenizer, many_chunks):
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": text} for text in texts(60, 1)])
    two = write_jsonl(tmp_path / "two.jsonl", [{"text": text} for text in texts(150, 2)])
    prepare(data_of({"path": one}, {"path": two}), SEQ, tokenizer, tmp_path / "out")
    return tmp_path / "out"


def step_data(folder, size=1, rank=0, micro=1, workers=0, **keys):
    return PreparedLoader(folder, seed=3, global_batch_size=8, micro_batch_size=micro, dp_rank=rank,
                    dp_size=size, workers=workers, **keys)


@pytest.mark.parametrize(("size", "micro"), [(1, 8), (2, 4), (4, 1), (8, 1)])
def test_a_step_reads_the_same_rows_in_any_layout(prepared, size, micro):
    alone = step_data(prepared)
    for step in (0, 1, 10**6):
        ranks = [step_data(prepared, size, rank, micro).window(step) for rank in range(size)]
        together = [row for window in zip(*ranks, strict=True) for batch in window
                    for row in batch.rows]
        assert together == [batch.rows[0] for batch in alone.window(step)]


def test_interrupted_runs_in_changing_layouts_read_every_row_once(prepared):
    rows = len(PreparedDataset(prepared))
    # Weights in proportion to the rows: the epochs of both sources end together.
    shares = PreparedDataset(prepared).counts
    rng, steps, seen = random.Random(1), rows // 8, []
    interruptions = sorted(rng.sample(range(1, steps), 10))
    for step, stop in itertools.pairwise([0, *interruptions, steps]):
        size = rng.choice([1, 2, 4, 8])
        for rank in range(size):
            for window in step_data(prepared, size, rank, weights=shares).windows(step, stop):
                seen += [row for batch in window for row in batch.rows]
    assert len(seen) == len(set(seen)) == steps * 8 > rows - 8


def test_a_source_with_more_weight_than_rows_comes_again_and_says_so(prepared):
    one, two = PreparedDataset(prepared).counts
    data = step_data(prepared, weights=[3.0, 1.0])
    steps = 2 * (one + two) // 8
    rows = [row for window in data.windows(0, steps) for batch in window for row in batch.rows]
    often, seldom = data.epochs(steps)
    assert often == pytest.approx(sum(row < one for row in rows) / one)
    assert seldom == pytest.approx(sum(row >= one for row in rows) / two)
    assert often > 3 > 1 > seldom
    assert {rows.count(row) for row in range(one)} == {int(often), int(often) + 1}
    assert max(rows.count(row) for row in range(one, one + two)) == 1


def test_threads_read_ahead_without_changing_the_order(prepared):
    plain = [[batch.rows for batch in window] for window in step_data(prepared).windows(5, 25)]
    ahead = [[batch.rows for batch in window]
             for window in step_data(prepared, workers=3).windows(5, 25)]
    assert plain == ahead and len(plain) == 20


def test_the_time_waited_for_data_is_counted(prepared, monkeypatch):
    """By a clock that only reading moves."""
    clock = [0.0]
    monkeypatch.setattr("amid_ds.data.loader.time.perf_counter", lambda: clock[0])

    def window(data, step):
        clock[0] += 2.0
        return []

    monkeypatch.setattr(PreparedLoader, "window", window)
    data = step_data(prepared)
    for _ in data.windows(0, 5):
        # The time between two reads is no waiting.
        clock[0] += 100.0
    assert data.waited == 10.0


def test_steps_are_read_before_they_are_asked_for(prepared, monkeypatch):
    begun = [threading.Event() for _ in range(9)]
    monkeypatch.setattr(PreparedLoader, "window", lambda data, step: begun[step].set() or [])
    windows = step_data(prepared, workers=2).windows(0, 9)
    next(windows)
    assert all(event.wait(30) for event in begun[:5]) and not begun[6].is_set()
    windows.close()


def test_a_row_is_named_by_its_file_and_line(prepared, tokenizer):
    data = PreparedDataset(prepared)
    for number in range(0, len(data), 7):
        tokens, *_, location = data.row(number)
        path, line = re.fullmatch(r"(.*) line (\d+)", location).groups()
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(text)["text"] for text in file]
        head = tokenizer.decode(tokens[:6].tolist()).split("</s>")[0]
        tail = "".join(lines[int(line) - 1:])
        assert head in tail and tail.index(head) <= len(lines[int(line) - 1])


def test_a_row_that_begins_with_a_document_is_named_by_it():
    documents = [pack.SourceDocument([([1, 2, 3], True), ([9], True)], 0, line)
                 for line in range(3)]
    rows = list(pack.pack_text(documents, 4))
    assert [(row.line, row.tokens) for row in rows] == [(0, [1, 2, 3, 9, 1]), (1, [1, 2, 3, 9, 1]),
                                                        (2, [1, 2, 3, 9])]


def test_a_document_begins_as_the_tokenizer_begins_a_text(tmp_path, tokenizer, many_chunks,
                                                          monkeypatch):
    """As Llama puts <s> first: once per document, also if a document is read in many pieces."""
    monkeypatch.setattr("amid_ds.data.readers.PIECE_BYTES", 50)
    tokenizer.save_pretrained(tmp_path / "framing")
    framing = load_tokenizer(str(tmp_path / "framing"))
    framing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<pad> $0", special_tokens=[("<pad>", 2)])
    text = "\n".join(texts(100))
    (tmp_path / "a.txt").write_text(text)
    prepare(data_of({"path": str(tmp_path / "a.txt")}), SEQ, framing, tmp_path / "out")
    assert len(list((tmp_path / "out" / "shards").glob("*.arrow"))) > 5
    ids = [batch.input_ids[0].tolist() for batch in read_batches(tmp_path / "out", 1)]
    assert ids[0] == [2, *tokenizer(text)["input_ids"]][:SEQ]
    assert sum(row.count(2) for row in ids) == 1
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "word1", "a": "word2"}])
    prepare(data_of({"path": path, "prompt": "q", "response": "a"}), 4096, framing,
            tmp_path / "rows")
    [batch] = read_batches(tmp_path / "rows", 1)
    assert batch.input_ids[0].tolist() == [2, *tokenizer("word1")["input_ids"],
                                           *tokenizer("word2")["input_ids"]]


def test_a_shard_that_another_job_has_made_is_left_as_it_is(prepared, tmp_path, tokenizer):
    source = recipe.Source(path=str(tmp_path / "one.jsonl"))
    chunk = next(shard.plan_chunks([[DataFile(source.path)]]))
    before = (prepared / "shards" / "000000.arrow").stat().st_mtime_ns
    assert shard.ShardWriter([source], [False], SEQ, "error", tokenizer, "uint16",
                             prepared / "shards").write(chunk, wait=True)
    assert (prepared / "shards" / "000000.arrow").stat().st_mtime_ns == before


def test_a_row_of_a_text_file_is_named_by_the_line_of_its_piece(tmp_path, tokenizer, many_chunks,
                                                                monkeypatch):
    monkeypatch.setattr("amid_ds.data.readers.PIECE_BYTES", 50)
    lines = [f"{i} {text}\n" for i, text in enumerate(texts(100))]
    (tmp_path / "a.txt").write_text("".join(lines))
    prepare(data_of({"path": str(tmp_path / "a.txt")}), SEQ, tokenizer, tmp_path / "out")
    every_line = "".join(lines).splitlines(keepends=True)
    for batch in read_batches(tmp_path / "out", 1):
        line = int(re.fullmatch(r".*a.txt line (\d+)", batch.sources[0])[1])
        head, tail = tokenizer.decode(batch.input_ids[0, :SEQ // 2]), "".join(every_line[line - 1:])
        assert head in tail and tail.index(head) < 50 + max(map(len, every_line))


def test_a_row_cut_inside_a_learnt_segment_learns_what_follows_its_first_token():
    document = pack.SourceDocument([([1, 2], False), ([3, 4, 5], True), ([6], False), ([7], True)],
                                   0, 0)
    [row] = pack.one_row_per_document([document], 4, "left", pack.PackingCounts())
    assert (row.tokens, row.loss_spans) == ([3, 4, 5, 6, 7], [1, 3, 4, 5])


def test_a_complete_folder_is_reused_and_a_killed_job_goes_on(prepared, tmp_path, tokenizer):
    data = data_of({"path": str(tmp_path / "one.jsonl")}, {"path": str(tmp_path / "two.jsonl")})
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
              for path in (prepared / "shards").iterdir()}
    assert prepare(data, SEQ, tokenizer, prepared).reused
    manifest = (prepared / "manifest.json").read_bytes()
    # Killed before the end, with two shards missing, one of them written but not counted.
    (prepared / "manifest.json").unlink()
    (prepared / "shards" / "000001.json").unlink()
    (prepared / "shards" / "000003.json").unlink()
    (prepared / "shards" / "000003.arrow").unlink()
    assert not prepare(data, SEQ, tokenizer, prepared).reused
    assert (prepared / "manifest.json").read_bytes() == manifest
    for path in (prepared / "shards").iterdir():
        content, time = before.pop(path.name)
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path.stem not in ("000001", "000003"))
    assert not before


def test_eight_workers_write_the_bytes_of_one(tmp_path, tokenizer, many_chunks, monkeypatch):
    monkeypatch.setattr(preparation, "PARALLEL_BYTES", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts(150)])
    for workers in (1, 8):
        prepare(data_of({"path": path}, workers=workers), SEQ, tokenizer, tmp_path / f"by{workers}")
    one, eight = ({path.relative_to(tmp_path / name): path.read_bytes()
                   for path in (tmp_path / name).rglob("*.*")}
                  for name in ("by1", "by8"))
    assert len(one) > 20 and one == eight


def test_a_bad_row_found_by_a_worker_process_stops_them_all(tmp_path, tokenizer, many_chunks,
                                                            monkeypatch):
    monkeypatch.setattr(preparation, "PARALLEL_BYTES", 0)
    rows = [{"text": text} for text in texts(150)]
    path = write_jsonl(tmp_path / "corpus.jsonl", [*rows[:100], {"text": 5}, *rows[100:]])
    with pytest.raises(InputError, match=r"corpus.jsonl line 101: the field 'text' holds a number"):
        prepare(data_of({"path": path}, workers=2), SEQ, tokenizer, tmp_path / "out")


def test_two_jobs_share_the_work_on_one_folder(tmp_path, tokenizer, many_chunks):
    """While another process holds a shard's lock, the others are made; then it is waited for."""
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts(150)])
    out = tmp_path / "out"
    prepare(data_of({"path": path}), SEQ, tokenizer, tmp_path / "alone")
    (out / "shards").mkdir(parents=True)
    lock = out / "shards" / "000001.lock"
    other = subprocess.Popen([sys.executable, "-c",
                              "import fcntl, sys; file = open(sys.argv[1], 'wb'); "
                              "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); "
                              "sys.stdin.read()", lock],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"

    def made() -> int:
        return len(list((out / "shards").glob("*.json")))

    ours = threading.Thread(target=prepare, args=(data_of({"path": path}), SEQ, tokenizer, out))
    ours.start()
    try:
        shards = len(list((tmp_path / "alone" / "shards").glob("*.json")))
        deadline = time.monotonic() + 30
        while made() < shards - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made() == shards - 1
        assert not (out / "shards" / "000001.json").exists() and ours.is_alive()
    finally:
        # The other job dies without having made the shard.
        other.communicate()
    ours.join()
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == \
        {path.name: path.read_bytes() for path in (tmp_path / "alone" / "shards").iterdir()}


JOB = """
import sys
from pathlib import Path
from amid_ds.config.recipe import Data
from amid_ds.data import load_tokenizer, preparation, prepare, shard
shard.MIN_CHUNK, preparation.PARALLEL_BYTES = 2000, 0
if __name__ == "__main__":
    path, tokenizer, out, workers = sys.argv[1:]
    data = Data(train=[{"path": path}], prepared=out, workers=int(workers))
    prepare(data, 16, load_tokenizer(tokenizer), Path(out))
"""


def start_job(tmp_path, path, tokenizer, workers):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    return subprocess.Popen([sys.executable, script, path, tokenizer.name_or_path, tmp_path / "out",
                             str(workers)])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")
            if path.is_file()}


def test_jobs_at_once_on_one_folder_write_the_bytes_of_one(tmp_path, tokenizer, many_chunks):
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts(600)])
    jobs = [start_job(tmp_path, path, tokenizer, 1) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    prepare(data_of({"path": path}), SEQ, tokenizer, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_killed_job_leaves_no_process_and_what_it_finished(tmp_path, tokenizer, many_chunks):
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts(2000)])
    job = start_job(tmp_path, path, tokenizer, 2)
    shards = tmp_path / "out" / "shards"
    while len(list(shards.glob("*.json"))) < 3:
        assert job.poll() is None
    workers = [process for process in Path("/proc").glob("[0-9]*")
               if str(job.pid) in ancestors(process)]
    job.kill()
    job.wait()
    finished = {path: path.stat().st_mtime_ns for path in shards.glob("*.json")}
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
    prepare(data_of({"path": path}, prepared=str(tmp_path / "out")), SEQ, tokenizer,
            tmp_path / "out")
    prepare(data_of({"path": path}), SEQ, tokenizer, tmp_path / "alone")
    assert len(workers) >= 2
    assert len(finished) < len(list((tmp_path / "alone" / "shards").glob("*.json")))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


def alive(process):
    try:
        # Empty for a zombie that nobody has waited for.
        return (process / "cmdline").read_bytes() != b""
    except OSError:
        return False


def ancestors(process):
    """The process ids above a process, as texts."""
    ids = []
    while True:
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            return ids
        if parent == "0":
            return ids
        ids.append(parent)
        process = Path("/proc") / parent


def test_shards_made_before_a_bad_row_was_found_stay(tmp_path, tokenizer, many_chunks):
    rows = [{"text": text} for text in texts(150)]
    path = write_jsonl(tmp_path / "corpus.jsonl", [*rows[:100], {"text": 5}, *rows[100:]])
    out = tmp_path / "out"
    with pytest.raises(InputError, match="line 101"):
        prepare(data_of({"path": path}, prepared=str(out)), SEQ, tokenizer, out)
    finished = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("*.json")}
    assert prepare(data_of({"path": path}, prepared=str(out), on_bad_row="skip"), SEQ, tokenizer,
                   out).rows
    assert finished and all(path.stat().st_mtime_ns == time for path, time in finished.items())
    with pytest.raises(InputError, match=r"without 1 bad rows, such as .*corpus.jsonl line 101"):
        prepare(data_of({"path": path}, prepared=str(out)), SEQ, tokenizer, out)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match="cannot be written"):
        prepare(data_of({"path": path}), SEQ, tokenizer, tmp_path / "corpus.jsonl" / "out")


def test_a_folder_of_other_data_is_refused_by_name_or_made_anew(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts(20)])
    out = tmp_path / "out"
    prepare(data_of({"path": path}), SEQ, tokenizer, out)
    with pytest.raises(InputError, match="`seq_length` is 16 there and 8 in this recipe"):
        prepare(data_of({"path": path}, prepared=str(out)), 8, tokenizer, out)
    # An unfinished folder is refused too.
    (out / "manifest.json").unlink()
    with pytest.raises(InputError, match="`seq_length` is 16 there and 8 in this recipe"):
        prepare(data_of({"path": path}, prepared=str(out)), 8, tokenizer, out)
    prepare(data_of({"path": path}), SEQ, tokenizer, out)
    rows = len(PreparedDataset(out))
    prepare(data_of({"path": path}), 8, tokenizer, out)
    assert len(PreparedDataset(out)) > rows


BAD_LINES = [
    (b'{"text": "x"', "not JSON"),
    (b'["text"]', "holds a list where an object is expected"),
    (b'{"txt": "x"}', "lacks the field 'text'; it has 'txt'"),
    (b'{"text": 5}', "the field 'text' holds a number where text is expected"),
    (b'{"text": null}', "the field 'text' holds null"),
    (b'{"text": ""}', "the field 'text' is empty"),
    (b'{"text": "a\\u0000b"}', "the field 'text' holds a NUL character"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff at position 10"),
    (b'{"text": "\x00"}', "holds a NUL byte"),
    (b"", "an empty line"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("number", [2, 150])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tokenizer, many_chunks, line, message,
                                             number):
    lines = [json.dumps({"text": text}).encode() for text in texts(200)]
    lines.insert(number - 1, line)
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(InputError, match=f"corpus.jsonl line {number}: .*{re.escape(message)}"):
        prepare(data_of({"path": str(path)}), SEQ, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    if number == 2:
        with pytest.raises(InputError, match=f"corpus.jsonl line 2: .*{re.escape(message)}"):
            check_sources(data_of({"path": str(path)}))


def test_skipped_rows_are_counted_and_the_first_ten_shown(tmp_path, tokenizer, many_chunks, capsys):
    good = [json.dumps({"text": text}) for text in texts(150)]
    lines = [line for text in good for line in (text, '{"text": 1}')]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    info = prepare(data_of({"path": str(path)}, on_bad_row="skip"), SEQ, tokenizer,
                   tmp_path / "out").sources[0]
    assert (info.documents, info.skipped, len(info.shown)) == (150, 150, 10)
    assert info.shown[3] == f"{path} line 8: the field 'text' holds a number where text is expected"
    printed = capsys.readouterr().err
    assert "150 bad rows left out" in printed and printed.count("holds a number") == 10


def test_a_source_that_is_missing_empty_or_unknown_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "table.xlsx").write_text("x")
    (tmp_path / "bare").mkdir()
    for name, message in [("nowhere.jsonl", "not there"), ("empty.jsonl", "is empty"),
                          ("table.xlsx", "not known"),
                          ("bare", "no files of a known kind"), ("*.txt", "no files")]:
        with pytest.raises(InputError, match=message):
            check_sources(data_of({"path": str(tmp_path / name)}))


def test_a_byte_order_mark_and_windows_line_ends_are_no_error(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    check_sources(data_of({"path": str(path)}))
    # Inside a file the mark is no white space.
    path.write_bytes(b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        check_sources(data_of({"path": str(path)}))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "a"}])
    bare = load_tokenizer(tokenizer.name_or_path)
    bare.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        prepare(data_of({"path": path}), SEQ, bare, tmp_path / "out")


def test_a_shard_cut_short_is_refused(prepared, tmp_path, tokenizer):
    path = prepared / "shards" / "000002.arrow"
    path.write_bytes(path.read_bytes()[:-10])
    data = data_of({"path": str(tmp_path / "one.jsonl")}, {"path": str(tmp_path / "two.jsonl")})
    for use in (lambda: prepare(data, SEQ, tokenizer, prepared),
                lambda: list(read_batches(prepared, 8))):
        with pytest.raises(InputError, match=r"000002.arrow is damaged: it has \d+ bytes"):
            use()
    path.unlink()
    with pytest.raises(InputError, match=r"000002.arrow is damaged: it has no file"):
        list(read_batches(prepared, 8))


def test_a_flipped_bit_is_found_when_the_row_is_read(prepared):
    path = prepared / "shards" / "000002.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError,
                       match=r"000002.arrow is damaged: the checksum of its row \d+ is wrong"):
        list(read_batches(prepared, 4))


@pytest.mark.parametrize("offset", range(0, 1800, 97))
def test_damage_anywhere_in_a_shard_is_reported_or_harms_nothing(prepared, offset):
    """Arrow's own header and offsets included: a clear error, or the rows as they were."""
    before = [batch.input_ids.tolist() for batch in read_batches(prepared, 4)]
    path = prepared / "shards" / "000002.arrow"
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x81
    path.write_bytes(content)
    try:
        assert [batch.input_ids.tolist() for batch in read_batches(prepared, 4)] == before
    except InputError as error:
        assert "000002.arrow is damaged" in str(error)


def test_damage_met_by_one_rank_ends_all_with_2_and_one_message(shared_model, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", shared_model("llama"), None, text_file,
                          tmp_path / "run", train__steps=20, data__workers=2)
    run_ranks(1, "prepare", recipe)
    path = tmp_path / "run" / "data" / "shards" / "000000.arrow"
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)
    ranks = Ranks(2, "train", recipe)
    assert ranks.wait() == [2, 2], ranks.output()
    assert "000000.arrow is damaged: the checksum of its row" in ranks.output()
    assert "Traceback" not in ranks.output()
    # Rank 0 prints for all.
    assert ranks.output(1).count("damaged") == 0


def test_prepare_verifies_the_checksums_of_what_is_there(prepared, tmp_path, tokenizer):
    data = data_of({"path": str(tmp_path / "one.jsonl")}, {"path": str(tmp_path / "two.jsonl")})
    prepare_all(data, SEQ, tokenizer, prepared, verify=True)
    path = prepared / "shards" / "000003.arrow"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"000003.arrow is damaged: it does not have the checksum"):
        prepare_all(data, SEQ, tokenizer, prepared, verify=True)


def test_evaluation_gives_every_rank_the_same_number_of_batches(prepared):
    ranks = [list(read_batches(prepared, 4, rank, 3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = sorted(row for batches in ranks for batch in batches for row in batch.rows)
    assert rows == list(range(len(PreparedDataset(prepared))))
    assert all((batch.labels == -100).all() for batches in ranks for batch in batches
               if not batch.rows)


def test_a_batch_that_ranks_do_not_divide_is_refused(prepared):
    with pytest.raises(InputError, match="global_batch_size 8 with 3"):
        step_data(prepared, size=3)


def test_tokens_of_a_large_vocabulary_keep_their_ids(tmp_path):
    """Also where the vocabulary has few tokens and large ids."""
    words = {"<unk>": 0, "</s>": 1, "word1": 65_535, "word2": 65_536, "word3": 151_642}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    large = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "word1 word2 word3"}])
    prepare(data_of({"path": path}), SEQ, large, tmp_path / "out")
    [batch] = read_batches(tmp_path / "out", 1)
    assert batch.input_ids.tolist() == [[65_535, 65_536, 151_642]]
    assert batch.labels.tolist() == [[65_536, 151_642, 1]]


def test_the_bench_measures_every_part():
    rows = measure_data(rounds=1, megabytes=0.5)
    assert [row.what for row in rows] == ["tokenizer alone", "prepare, one process", "loader",
                                          "loader, 4 threads ahead"]
    assert rows[0].of_tokenizer == 1 and all(row.tokens_per_second > 0 for row in rows)
