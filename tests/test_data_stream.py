"""Streamed sources: the rows of `prepare`, in the same steps on any ranks and over resumes."""

import itertools
import json
import random
import shutil

import pytest
from support.data import write_texts
from support.ranks import run_ranks
from support.runs import comparable_metrics, write_recipe

from amid_ds.config import recipe
from amid_ds.data import (
    PreparedLoader,
    StreamLoader,
    merge_stream_states,
    prepare,
    read_batches,
    stream,
    stream_summary,
)
from amid_ds.errors import InputError

SEQ = 16


def write(folder, files, documents, seed=0):
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(files):
        rows = [{"text": f"{number} {i} "
                 + " ".join(f"word{rng.randrange(999)}" for _ in range(rng.randint(1, 30)))}
                for i in range(documents)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def open_steps(data, tokenizer, rank=0, size=1, state=None, workers=0, micro=1):
    return StreamLoader(data, SEQ, tokenizer, state, global_batch_size=8, micro_batch_size=micro,
                      dp_rank=rank, dp_size=size, workers=workers)


def rows_in(windows):
    return [(row, ids.tolist()) for window in windows for batch in window
            for row, ids in zip(batch.rows, batch.input_ids, strict=True)]


def test_a_share_of_the_files_gives_the_rows_that_prepare_makes_of_it(tmp_path, tokenizer):
    data = recipe.Data(train=[{"path": write(tmp_path / "corpus", 4, 30), "stream": True}])
    streamed = rows_in(open_steps(data, tokenizer).windows(0, 9))
    for number in range(4):
        prepare(recipe.Data(train=[{"path": str(tmp_path / "corpus" / f"{number}.jsonl")}]), SEQ,
                tokenizer, tmp_path / f"out{number}")
        expected = [batch.input_ids[0].tolist()
                    for batch in read_batches(tmp_path / f"out{number}", 1)]
        assert [ids for row, ids in streamed if row % 4 == number] == expected[:18]


def test_each_row_is_known_by_its_source_streamed_or_prepared(tmp_path, tokenizer):
    paths = [write(tmp_path / name, 2, 30, seed) for seed, name in enumerate("ab")]
    streamed, prepared = (recipe.Data(train=[{"path": path, "weight": weight, "stream": stream}
                                             for path, weight in zip(paths, (1, 3), strict=True)])
                          for stream in (True, False))
    prepare(prepared, SEQ, tokenizer, tmp_path / "out")
    layout = {"global_batch_size": 8, "micro_batch_size": 4, "dp_rank": 0, "dp_size": 1,
              "workers": 0}
    for loader in (StreamLoader(streamed, SEQ, tokenizer, None, **layout),
                   PreparedLoader(tmp_path / "out", seed=0, weights=[1, 3], **layout)):
        found = set()
        for batch in itertools.chain.from_iterable(loader.windows(0, 3)):
            named = [next(i for i, path in enumerate(paths) if source.startswith(path))
                     for source in batch.sources]
            assert batch.row_sources == named
            assert batch.source_numbers.tolist() == [
                source for source, row in zip(named, batch.labels, strict=True)
                for label in row if label != -100]
            found |= set(named)
        assert found == {0, 1}


def test_blocks_together_hold_every_document_once_and_in_order(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_CHARACTERS", 400)
    path = write(tmp_path / "corpus", 1, 30)
    ids, previous = [], None
    for batch in itertools.chain.from_iterable(open_steps(
            recipe.Data(train=[{"path": path, "stream": True}]), tokenizer).windows(0, 30)):
        row = [*batch.input_ids[0].tolist(), batch.labels[0][batch.labels[0] != -100][-1].item()]
        # Rows of a block overlap by one token.
        ids += row[1:] if previous == row[0] else row
        previous = row[-1]
    texts = [json.loads(line)["text"]
             for line in (tmp_path / "corpus" / "0.jsonl").read_text().splitlines()]
    twice = [i for text in texts * 2
             for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    # And into the second epoch.
    assert len(ids) > len(twice) / 2 + SEQ and ids == twice[:len(ids)]


@pytest.mark.parametrize("workers", [0, 1])
def test_ten_interruptions_in_changing_layouts_change_nothing(tmp_path, tokenizer, monkeypatch,
                                                              workers):
    """Over several epochs of two sources, in small blocks; the state passes through JSON."""
    monkeypatch.setattr(stream, "BLOCK_CHARACTERS", 400)
    data = recipe.Data(train=[{"path": write(tmp_path / "one", 5, 7), "stream": True,
                               "weight": 2.0},
                              {"path": write(tmp_path / "two", 2, 9, seed=1), "stream": True}])
    steps = 60
    whole = rows_in(open_steps(data, tokenizer).windows(0, steps))
    rng, state, rows_of_all = random.Random(2), None, []
    for start, stop in itertools.pairwise([0, *sorted(rng.sample(range(1, steps), 10)), steps]):
        size = rng.choice([1, 2, 4, 8])
        ranks = [open_steps(data, tokenizer, rank, size, state, workers) for rank in range(size)]
        # Three steps are read ahead and must not count.
        windows = [rank.windows(start, stop + 3) for rank in ranks]
        for _ in range(start, stop):
            per_rank = [rows_in([next(each)]) for each in windows]
            rows_of_all += [rows[i] for i in range(8 // size) for rows in per_rank]
        state = json.loads(json.dumps(merge_stream_states([rank.state(stop) for rank in ranks])))
        for each in windows:
            each.close()
    assert rows_of_all == whole
    assert min(position["epoch"] for position in state["places"].values()) >= 1


def test_bad_rows_are_named_or_counted_and_an_empty_share_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "corpus", 1, 3)
    (tmp_path / "corpus" / "0.jsonl").write_text(
        '{"text": "word1 word2"}\n{"text": ""}\n{"text": "word3 word4"}\n')
    strict = recipe.Data(train=[{"path": path, "stream": True}])
    with pytest.raises(InputError, match="share 0 of 1 row 1: the field 'text' is empty"):
        open_steps(strict, tokenizer).window(0)
    lenient = recipe.Data(train=[{"path": path, "stream": True}], on_bad_row="skip")
    steps = open_steps(lenient, tokenizer)
    list(steps.windows(0, 2))
    assert stream_summary(lenient, steps.state(2)).endswith(" bad rows left out")
    (tmp_path / "corpus" / "0.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="has no row left to train on"):
        open_steps(lenient, tokenizer).window(0)


def test_what_cannot_be_streamed_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "corpus", 1, 3)
    for source, message in (({"path": str(tmp_path / "nowhere")}, "cannot be streamed"),
                            ({"path": path, "text": "body"},
                             "lacks the field 'body'; it has 'text'")):
        with pytest.raises(InputError, match=message):
            open_steps(recipe.Data(train=[{**source, "stream": True}]), tokenizer)
    with pytest.raises(ValueError, match="stream all of them, or prepare all"):
        recipe.Data(train=[{"path": path, "stream": True}, {"path": path}])
    four = recipe.Data(train=[{"path": write(tmp_path / "four", 4, 3), "stream": True}])
    steps = open_steps(four, tokenizer)
    steps.window(0)
    (tmp_path / "four" / "3.jsonl").unlink()
    with pytest.raises(InputError, match=r"are read in \[2\] shares, before in \[4\]"):
        open_steps(four, tokenizer, state=steps.state(1))


def test_a_run_on_streamed_data_goes_on_on_other_ranks_as_if_it_had_not_stopped(shared_model,
                                                                                tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(2):
        write_texts(folder / f"{number}.jsonl", seed=number)
    recipe = write_recipe(tmp_path / "r.yaml", shared_model("llama"), None, folder / "0.jsonl",
                          tmp_path / "run", data__train=[{"path": str(folder), "stream": True}],
                          data__workers=1, checkpoint={"every": 2, "keep": 3}, train__steps=6)
    run_ranks(2, "train", recipe)
    whole = comparable_metrics(tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    assert "resumed after step 2" in run_ranks(1, "train", recipe).output()
    assert [line["loss"] for line in comparable_metrics(tmp_path / "run")] == pytest.approx(
        [line["loss"] for line in whole], rel=1e-4)
    assert not (tmp_path / "run" / "data").exists()
