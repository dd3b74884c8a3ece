"""A run's files are read whatever a crash, a power loss or a full disk has left of them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from support.disks import SmallDisk
from support.ranks import run_ranks
from support.runs import count_steps, write_recipe

from amid_ds.cli import main
from amid_ds.files import json_lines
from amid_ds.files.append import append_line
from amid_ds.files.atomic import replace_text
from amid_ds.files.json_lines import read_jsonl, truncate_jsonl
from amid_ds.run.attempts import append_event, read_attempts
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import RunLog, read_metrics

ONE, TWO, THREE = (f'{{"step": {step}, "loss": 1.5}}'.encode() for step in (1, 2, 3))


@pytest.fixture(autouse=True)
def nothing_said_yet():
    json_lines._warn_of_damage.cache_clear()


# What a file holds: (its bytes, the steps that are read, the damaged lines that are mentioned).
CONTENTS = {
    "whole": (ONE + b"\n" + TWO + b"\n", [1, 2], 0),
    "empty": (b"", [], 0),
    "no end of the last line": (ONE + b"\n" + TWO, [1, 2], 0),
    "a last line that is being written": (ONE + b"\n" + TWO[:-4], [1], 0),
    "a cut line": (ONE[:9] + b"\n" + TWO + b"\n", [2], 1),
    "a line behind a cut one": (ONE[:9] + TWO + b"\n" + THREE + b"\n", [2, 3], 1),
    "NULs before a line": (ONE + b"\n" + b"\0" * 40 + TWO + b"\n", [1, 2], 1),
    "NULs at the end": (ONE + b"\n" + b"\0" * 40, [1], 0),
    "a line of NULs": (b"\0" * 40 + b"\n" + TWO + b"\n", [2], 1),
    "invalid UTF-8": (ONE + b"\n\xff\xfe\n" + TWO + b"\n", [1, 2], 1),
    "no objects": (ONE + b'\n17\n[1, 2]\nnull\n"step"\n' + TWO + b"\n", [1, 2], 4),
    "no step": (ONE + b"\n{}\n" + TWO + b"\n", [1, 2], 1),
    "deep nesting": (ONE + b"\n" + b"[" * 100_000 + b"\n" + TWO + b"\n", [1, 2], 1),
    "a long number": (ONE + b"\n" + b"1" * 5000 + b"\n" + TWO + b"\n", [1, 2], 1),
    "other line ends": (ONE + b"\r\n\n  \n" + TWO + b"\r\n", [1, 2], 0),
    "odd steps": (ONE + b'\n{"step": "2"}\n{"step": null}\n{"step": -1}\n{"step": 1e99}\n'
                  b'{"step": true}\n', [1], 5),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_whole_lines_are_read_and_damaged_ones_said_once(name, tmp_path, caplog):
    content, steps, damaged = CONTENTS[name]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    for _ in range(2):
        lines = read_jsonl(path, "step", json_lines.has_step)
        assert [line["step"] for line in lines] == steps
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (damaged > 0)
    assert damaged == 0 or f"{path}: {damaged} damaged line(s)" in said[0]


def test_truncation_keeps_whole_lines_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = b'{"step":2,  "loss":1e-3,"note":"\xe2\x80\xa8"}'
    path.write_bytes(ONE[:7] + ONE + b"\n" + odd + b"\nrest\n" + THREE + b"\n" + THREE[:5])
    truncate_jsonl(path, 2, json_lines.has_step)
    assert path.read_bytes() == ONE + b"\n" + odd + b"\n"


def test_a_line_is_never_appended_to_one_that_was_cut(tmp_path):
    run = RunFolder(tmp_path)
    run.attempts.write_bytes(b'{"event": "begun", "job": nu')
    append_event(tmp_path, "ended", status=0, failure=None)
    append_event(tmp_path, "ended", status=75, failure=None)
    assert run.attempts.read_bytes().count(b"\n") == 3
    assert [attempt.status for attempt in read_attempts(tmp_path)] == [75]


@pytest.fixture
def disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk", 0.3)
    yield disk
    disk.vanish()


def test_on_a_full_disk_a_line_is_appended_whole_or_not_at_all(disk):
    path = disk.folder / "attempts.jsonl"
    append_line(path, "x" * 100)
    disk.fill()
    with pytest.raises(OSError):
        append_line(path, "y" * 5000)
    assert path.read_text() == "x" * 100 + "\n"


def test_a_file_that_cannot_be_replaced_is_as_it_was_with_nothing_beside_it(disk):
    path = disk.folder / "recipe.yaml"
    replace_text(path, "before")
    disk.fill()
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        replace_text(path, "after" * 10_000)
    assert path.read_text() == "before"
    assert sorted(item.name for item in disk.folder.iterdir()) == ["filler", "recipe.yaml"]


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    path.chmod(0o664)
    replace_text(path, "{}")
    assert path.stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize("repaired", [True, False])
def test_a_disk_that_fills_ends_no_log_and_is_mentioned_once_a_file(repaired, disk, caplog):
    caplog.set_level(logging.INFO)
    run = RunFolder(disk.folder)
    metrics = {"tokens": 5, "loss": 1.0, "kd_loss": 1.0, "ce_loss": None,
               "tokens_per_second": 9.0}
    with RunLog(run, 0, 600) as log:
        log.step(1, metrics)
        disk.fill()
        for step in range(2, 600):
            log.step(step, metrics)
        log.evaluation(599, {"held-out": {"loss": 1.0}})
        if repaired:
            disk.repair()
            (disk.folder / "filler").unlink(missing_ok=True)
            log.step(600, metrics)
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "cannot be written" in text]) <= 3
    steps = [line["step"] for line in read_metrics(disk.folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert (len(steps) == 600) == repaired
    assert repaired == (not any("lacks its last" in text for text in said))


@pytest.fixture(scope="module")
def finished(llama_pair, text_file, tmp_path_factory) -> Path:
    """A sweep's folder with one run of 6 steps in it; to be copied."""
    root = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(root / "r.yaml", *llama_pair, text_file, root / "sweep" / "run",
                          data__eval=[{"path": str(text_file), "name": "held-out"}],
                          train__eval_every=3, checkpoint__every=3)
    run_ranks(1, "train", recipe)
    return root / "sweep"


def damage(path: Path) -> None:
    """What a power loss leaves in a file: a cut line, NULs, bytes of another file, half a line."""
    if path.suffix == ".jsonl":
        first, *rest = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"\0" * 64 + first + first[:30] + b"".join(rest)
                         + b'\x8f\x00junk\n17\n{"step": 3}\n{"event": "ended"}\n' + first[:40])
    else:
        path.write_bytes(path.read_bytes()[:200] + b"\0" * 64)


RUN_FILES = ("metrics.jsonl", "eval.jsonl", "attempts.jsonl", "measured.json", "provenance.json",
             "checkpoints/latest")


@pytest.fixture
def damaged(finished, tmp_path) -> Path:
    """The finished run, with damage in every file that commands read."""
    sweep = shutil.copytree(finished, tmp_path / "sweep")
    for name in RUN_FILES:
        damage(sweep / "run" / name)
    return sweep / "run"


def test_every_command_survives_a_damaged_run(damaged, tmp_path, capsys):
    for arguments in (["status", damaged], ["report", damaged, "-o", tmp_path / "page.html"],
                      ["sweep", damaged.parent], ["checkpoints", damaged],
                      ["export", damaged, tmp_path / "model"]):
        assert main(list(map(str, arguments))) == 0, capsys.readouterr().err
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| step | 6 |" in card and "| held-out | " in card
    printed = capsys.readouterr()
    assert "step       6 of 6" in printed.out
    for name in RUN_FILES[:3]:
        assert printed.err.count(f"{name}: ") == 1, "said once"
    assert main(["plan", "--check", str(damaged), "--device", "cpu"]) == 2
    assert "measured.json is damaged" in capsys.readouterr().err


def test_a_damaged_run_goes_on_and_loses_no_whole_line(damaged, tmp_path):
    whole = [line for line in read_metrics(damaged) if line["step"] <= 3]
    shutil.rmtree(damaged / "checkpoints" / "step_00000006")
    recipe = tmp_path / "r.yaml"
    shutil.copy(damaged / "recipe.yaml", recipe)
    ranks = run_ranks(1, "train", recipe, f"output_dir={damaged}")
    assert "resumed after step 3" in ranks.output()
    assert read_metrics(damaged)[:len(whole)] == whole and len(whole) >= 2
    assert count_steps(damaged) == len(whole) + 3
    assert [json.loads(line)["step"] for line in
            (damaged / "eval.jsonl").read_text().splitlines()][-1] == 6
    assert read_attempts(damaged)[-1].status == 0
