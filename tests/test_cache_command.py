"""`amid-ds cache`: a teacher's distributions written down, the same bytes by any ranks and jobs."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data import write_instructions, write_texts
from support.disks import SmallDisk
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.data import PreparedDataset, TargetFolder
from amid_ds.run.places import check_places

SHARD = "[0-9]" * 6


@pytest.fixture(scope="module")
def models(llama_pair):
    return llama_pair


def make_recipe(folder: Path, models, rows: Path, **changes) -> Path:
    student, teacher = models
    changes.setdefault("train__micro_batch_size", 4)
    return write_recipe(folder / "recipe.yaml", student, teacher, rows, folder / "run",
                        data__prepared=str(folder / "prepared"), **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def true_log_p(teacher: Path, prepared: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """By row: log p [n, V] in float64 by transformers alone, and the next tokens [n]."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    rows = PreparedDataset(prepared)
    found = []
    for number in range(len(rows)):
        row = rows.row(number)
        tokens = torch.from_numpy(row.tokens.astype(np.int64))
        # Each document by itself; its first token is not predicted.
        log_p = torch.full((len(tokens), model.config.vocab_size), torch.nan, dtype=torch.float64)
        for start, stop in itertools.pairwise([0, *row.doc_starts, len(tokens)]):
            if stop - start > 1:
                logits = model(input_ids=tokens[None, start:stop - 1]).logits[0]
                log_p[start + 1:stop] = logits.log_softmax(-1)
        places = np.concatenate([np.arange(start, stop) for start, stop in zip(
            row.loss_spans[::2], row.loss_spans[1::2], strict=True)])
        found.append((log_p.numpy()[places], row.tokens[places]))
    return found


@pytest.mark.parametrize("write_rows", [write_texts, write_instructions])
@pytest.mark.parametrize("options", [["--topk", "8"], ["--sample", "12", "--exponent", "0.8"]],
                         ids=["topk", "sample"])
def test_what_is_kept_is_the_teachers_own_log_softmax_within_the_stated_error(
        options, write_rows, models, tmp_path):
    # Enough for shards of two micro-batches of a row each.
    rows = write_rows(tmp_path / "rows.jsonl", rows=100)
    recipe = make_recipe(tmp_path, models, rows, train__micro_batch_size=1)
    out = tmp_path / "cache"
    assert main(["cache", str(recipe), "--out", str(out), *options]) == 0
    folder = TargetFolder.open(out)
    assert folder.manifest.shard_rows == 2
    truth = true_log_p(models[1], tmp_path / "prepared")
    assert len(folder) == len(truth)
    assert folder.manifest.positions == sum(len(labels) for _, labels in truth)
    for number, (log_p, labels) in enumerate(truth):
        row = folder.row(number)
        assert len(row.ids) == len(labels)
        kept = row.ids >= 0
        own = np.take_along_axis(log_p, row.ids.clip(0), -1)
        # fp16's half of the last digit, and fp32 arithmetic of the model.
        error = 2**-11 * np.abs(own) + 1e-4
        assert (np.abs(row.log_probabilities - own)[kept] <= error[kept]).all()
        label = np.take_along_axis(log_p, labels[:, None].astype(np.int64), -1)[:, 0]
        assert (np.abs(row.label_log_probabilities - label) <= 2**-11 * np.abs(label) + 1e-4).all()
        if options[0] == "--topk":
            least_kept = own.min(-1, keepdims=True)
            assert ((log_p > least_kept + 1e-4).sum(-1) <= 8).all()
            rest = np.log1p(-np.exp(own).sum(-1))
            assert (np.abs(row.log_rest - rest) <= 2**-11 * np.abs(rest) + 1e-3).all()


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """(folder with a recipe whose teacher is sharded and gathered at each use, its contents).

    Shards of two micro-batches of a row each.
    """
    folder = tmp_path_factory.mktemp("alone")
    config, rows = write_gathering_config(folder), write_texts(folder / "rows.jsonl", rows=70)
    make_recipe(folder, models, rows, deepspeed=str(config), train__micro_batch_size=1)
    assert main(["cache", str(folder / "recipe.yaml"), "--out", str(folder / "cache"),
                 "--topk", "8"]) == 0
    return folder, contents(folder / "cache")


def test_the_bytes_are_the_same_on_two_ranks_that_gather_the_teacher_at_each_use(
        alone, tmp_path, monkeypatch):
    folder, expected = alone
    run_ranks(2, "cache", folder / "recipe.yaml", "--out", tmp_path / "cache", "--topk", 8,
              target=never_gathered_once)
    assert contents(tmp_path / "cache") == expected


def never_gathered_once(argv, variables, log):
    """A rank on which the teacher does not fit gathered."""
    from amid_ds.engine.engine import Engine

    Engine.fits_gathered = lambda *_: False
    rank_main(argv, variables, log)


@pytest.mark.slow
def test_the_bytes_are_the_same_by_two_jobs_at_once(alone, tmp_path):
    folder, expected = alone
    arguments = ["cache", folder / "recipe.yaml", "--out", tmp_path / "cache", "--topk", 8]
    jobs = [Ranks(1, *arguments, target=slowly) for _ in range(2)]
    statuses = [job.wait() for job in jobs]
    assert statuses == [[0], [0]], jobs[0].output() + jobs[1].output()
    assert contents(tmp_path / "cache") == expected
    made = [int(job.output().rpartition("shards made: ")[2].split()[0]) for job in jobs]
    assert sum(made) == len(list((tmp_path / "cache" / "shards").glob("*.arrow"))) and all(made)


def slowly(argv, variables, log):
    """A rank that takes its time over a shard, and says how many it has made."""
    from amid_ds.data.target_work import TargetWork

    finish, made = TargetWork.finish, []

    def slow(self, number, rows):
        time.sleep(0.05)
        made.append(number)
        print("shards made:", len(made), flush=True)
        finish(self, number, rows)
    TargetWork.finish = slow
    rank_main(argv, variables, log)


def begun(arguments, out: Path, size: int = 1) -> Ranks:
    """A job that has finished a shard and is at another, whose lease it holds."""
    ranks = Ranks(size, *arguments, target=slowly)

    def is_at_another() -> bool:
        finished, held = (
            {path.name[:len("000000")] for path in out.glob(f"shards/{SHARD}{ending}")}
            for ending in (".json", ".lease.json"))
        return bool(finished and held - finished)

    ranks.wait_until(is_at_another)
    return ranks


def test_killed_it_goes_on_with_the_same_bytes_and_keeps_what_was_finished(alone, tmp_path):
    folder, expected = alone
    out = tmp_path / "cache"
    arguments = ["cache", folder / "recipe.yaml", "--out", out, "--topk", 8]
    ranks = begun(arguments, out, 2)
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert not (out / "manifest.json").exists() and list(out.glob("shards/*.lease.json"))
    kept = {path: path.stat().st_mtime_ns for path in out.glob(f"shards/{SHARD}.json")}
    assert kept
    assert main([str(argument) for argument in arguments]) == 0
    assert contents(out) == expected
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    # A complete folder is left as it is.
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main([str(argument) for argument in arguments]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.parametrize("number", [
    signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["USR1", "TERM"])
def test_a_signal_stops_it_in_good_order_with_75(number, alone, tmp_path):
    folder, expected = alone
    out = tmp_path / "cache"
    arguments = ["cache", folder / "recipe.yaml", "--out", out, "--topk", 8]
    ranks = begun(arguments, out, 2)
    ranks.signal(number, 1)
    assert ranks.wait() == [75, 75], ranks.output()
    assert "stopped in order" in ranks.output()
    assert not list(out.glob("shards/*.lease.json")) and not (out / "manifest.json").exists()
    assert main([str(argument) for argument in arguments]) == 0
    assert contents(out) == expected


@pytest.mark.slow
def test_two_tensor_parallel_ranks_write_what_one_writes_but_for_the_last_digits(
        alone, tmp_path):
    folder, _ = alone
    larger = "train.micro_batch_size=8"
    for kind in (["--topk", 8], ["--sample", 16]):
        one, two = tmp_path / f"one{kind[0]}", tmp_path / f"two{kind[0]}"
        assert main(["cache", str(folder / "recipe.yaml"), "--out", str(one),
                     *map(str, kind), larger]) == 0
        run_ranks(2, "cache", folder / "recipe.yaml", "--out", two, *kind, "tensor_parallel=2",
                  larger, target=never_gathered_once)
        folders = [TargetFolder.open(path) for path in (one, two)]
        assert folders[0].manifest == folders[1].manifest
        same = total = 0
        for number in range(len(folders[0])):
            rows = [each.row(number) for each in folders]
            total += rows[0].ids.size
            if rows[0].ids.shape == rows[1].ids.shape:
                same += (rows[0].ids == rows[1].ids).sum()
            np.testing.assert_allclose(rows[0].label_log_probabilities,
                                       rows[1].label_log_probabilities, rtol=2e-3)
        # But for neighbours in the order whose probabilities are equal up to rounding.
        assert same >= 0.99 * total


def test_a_full_disk_is_said_before_anything_is_computed_or_when_it_happens(
        alone, tmp_path, capsys):
    folder, expected = alone
    disk = SmallDisk(tmp_path / "disk", 1)
    out = disk.folder / "cache"
    arguments = ["cache", str(folder / "recipe.yaml"), "--out", str(out), "--topk", "8"]
    filler = disk.folder / "filler"
    try:
        # About 1,600 positions of 28 bytes.
        filler.write_bytes(b"x" * (shutil.disk_usage(disk.folder).free - 32_000))
        assert main(arguments) == 2
        assert "MB free" in capsys.readouterr().err and not list(out.glob("shards/*"))
        filler.unlink()
        ranks = Ranks(1, *arguments, target=filling)
        assert ranks.wait() == [2]
        assert "the disk is full" in ranks.output() and str(out) in ranks.output()
        disk.repair()
        assert main(arguments) == 0
        assert contents(out) == expected
    finally:
        disk.vanish()


def filling(argv, variables, log):
    """A rank whose disk is filled by somebody else when it has finished two shards."""
    from amid_ds.data.target_work import TargetWork

    finish, made = TargetWork.finish, []

    def fill_first(self, number, rows):
        made.append(number)
        if len(made) == 3:
            filler = self.folder.parent / "filler"
            with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(b"x" * 4096)
        finish(self, number, rows)
    TargetWork.finish = fill_first
    rank_main(argv, variables, log)


def test_a_cache_of_something_else_is_refused_with_what_differs(alone, models, shared_model,
                                                                 tmp_path, capsys):
    folder, expected = alone
    out, recipe = str(folder / "cache"), str(folder / "recipe.yaml")
    other = shared_model("llama", 5)
    for change, name in (([f"teacher.model={other}"], "teacher"),
                         (["train.micro_batch_size=2"], "micro_batch_size"),
                         (["train.seq_length=20", f"data.prepared={tmp_path / 'other'}"], "rows")):
        assert main(["cache", recipe, "--out", out, "--topk", "8", *change]) == 2
        error = capsys.readouterr().err
        assert f"is of something else: `{name}" in error, error
    assert main(["cache", recipe, "--out", out, "--topk", "9"]) == 2
    assert "`k` is 8 there and 9" in capsys.readouterr().err
    assert contents(folder / "cache") == expected


@pytest.mark.parametrize(("options", "said"), [
    (["--topk", "1000000"], "of a vocabulary of"), (["--topk", "0"], "--topk 0"),
    (["--topk", "4", "--sample", "4"], "--topk 4 and --sample 4"),
    (["--sample", "4", "--exponent", "0"], "--exponent 0"),
    (["--sample", "70000"], "--sample 70000"),
    (["--exponent", "2"], "without --sample"), (["teacher=null"], "no `teacher` that is a model"),
    (["teacher={ema: 0.9}"], "no `teacher` that is a model"),
    (["teacher.delta={base: {model: x}}"], "follows the student's own start"),
    (["teacher.vocabulary=grown"], "the teacher knows other ids"),
    (["data.train.0.stream=true"], "`stream: true`")])
def test_what_cannot_be_is_refused_before_anything_is_made(options, said, models, text_file,
                                                           tmp_path, capsys):
    recipe = make_recipe(tmp_path, models, text_file)
    assert main(["cache", str(recipe), "--out", str(tmp_path / "cache"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(("out", "said"), [
    ("run", "is around checkpoints of output_dir"),
    ("run/model/x", "is inside model of output_dir"),
    ("prepared", "is data.prepared"), ("corpus/cache", "is around the data source")])
def test_a_folder_that_the_run_reads_or_writes_is_refused(out, said, models, tmp_path, capsys):
    (tmp_path / "corpus" / "cache").mkdir(parents=True)
    rows = write_texts(tmp_path / "corpus" / "cache" / "rows.jsonl")
    recipe = make_recipe(tmp_path, models, rows)
    before = contents(tmp_path)
    assert main(["cache", str(recipe), "--out", str(tmp_path / out)]) == 2
    assert said in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_complete_folder_is_compared_with_its_checksums_and_made_anew_where_it_is_damaged(
        alone, tmp_path, capsys):
    folder, expected = alone
    out = tmp_path / "cache"
    shutil.copytree(folder / "cache", out)
    shard = out / "shards" / "000003.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    arguments = ["cache", str(folder / "recipe.yaml"), "--out", str(out), "--topk", "8"]
    assert main(arguments) == 2
    assert f"the shard {shard} is damaged" in capsys.readouterr().err
    shard.with_suffix(".json").unlink()
    (out / "manifest.json").unlink()
    assert main(arguments) == 0
    assert contents(out) == expected


def test_a_teacher_of_nan_stops_the_command_and_names_the_row(models, text_file, tmp_path,
                                                              capsys):
    model = AutoModelForCausalLM.from_pretrained(models[1])
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "teacher")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "teacher" / file).write_bytes((models[1] / file).read_bytes())
    recipe = make_recipe(tmp_path, (models[0], tmp_path / "teacher"), text_file)
    assert main(["cache", str(recipe), "--out", str(tmp_path / "cache"), "--topk", "8"]) != 0
    assert "NaN" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "layout"), [
    # 31 ids: a byte each; log p of 2 bytes; rest and label.
    pytest.param(["--topk", "8"], 8 * 3 + 4, marks=pytest.mark.slow),
    # One byte more of a count; a count of ids, the label, 4 bytes of a scale.
    (["--sample", "8"], 8 * 4 + 1 + 2 + 4)])
def test_the_plan_says_the_size_that_the_folder_has(kind, layout, models, text_file, tmp_path,
                                                    capsys):
    recipe = make_recipe(tmp_path, models, text_file)
    assert main(["plan", str(recipe), "--cache", *kind, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["bytes_per_position"] == layout and before["bytes"] is None
    assert main(["cache", str(recipe), "--out", str(tmp_path / "cache"), *kind]) == 0
    capsys.readouterr()
    assert main(["plan", str(recipe), "--cache", *kind, "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    folder = TargetFolder.open(tmp_path / "cache")
    assert after["positions"] == folder.manifest.positions and after["rows"] == len(folder)
    # Arrow's own words between the columns are about a kilobyte and a half a shard.
    own = folder.bytes - 2000 * folder.manifest.shards
    assert own <= after["bytes"] and (kind[0] == "--sample" or after["bytes"] <= folder.bytes)
    assert main(["plan", str(recipe), "--cache", *kind]) == 0
    assert f"{layout:.1f} bytes a position" in capsys.readouterr().out
    assert main(["plan", str(recipe), *kind]) == 2
    assert "without --cache" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_folder_it_lies_beside_the_prepared_data_and_the_run_may_begin_there(
        models, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", *models, text_file, tmp_path / "run")
    assert main(["cache", str(recipe), "--sample", "5"]) == 0
    assert TargetFolder.open(tmp_path / "run" / "data-sample5").manifest.draws == 5
    check_places(load_recipe(recipe))
