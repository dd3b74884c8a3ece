"""Readers of a run's files against random damage: what is whole is read, and nothing raises."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from amid_ds.checkpoint.card import model_card
from amid_ds.checkpoint.state import TrainState
from amid_ds.cluster.status import run_status
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError
from amid_ds.experiments.reported_run import read_reported_run
from amid_ds.experiments.sweep import final_metrics
from amid_ds.files.json_lines import has_step, truncate_jsonl
from amid_ds.monitor.memory_probe import read_measurements
from amid_ds.planning.check import check_plan
from amid_ds.run.attempts import Failure, append_event, read_attempts, read_failures
from amid_ds.run.folder import RunFolder
from amid_ds.run.log import read_evaluations, read_metrics

OLD_RUN = Path(__file__).parent / "fixtures" / "old_runs" / "rollouts"
# Values that JSON may hold where a number or text is expected.
ODD_VALUES = [b"null", b"true", b'"x"', b"[]", b"{}", b"-1", b"1e400", b"NaN", b"-Infinity",
              b"9" * 400, b"0.0", b'""', b"[[[[", b"\0\0\0\0"]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of an older version that a newer one has gone on with."""
    run = shutil.copytree(OLD_RUN, tmp_path / "run")
    folder = RunFolder(run)
    append_event(run, "submitted", jobs=["7"], folder=str(run))
    append_event(run, "begun", nodes="n1", ranks=2, changed={"train.steps": [1, 2]})
    append_event(run, "stepping", step=2)
    failure = asdict(Failure(1, "n1", 2, "an error", time.time()))
    append_event(run, "ended", status=1, failure=failure)
    folder.failures.mkdir(exist_ok=True)
    (folder.failures / "local.0.1.json").write_text(json.dumps(failure))
    folder.evaluations.write_text("".join(
        json.dumps({"step": step, "name": name, "tokens": 9, "loss": 1.0, "perplexity": None})
        + "\n" for step in (1, 2) for name in ("a", "b")))
    return run


def damage(content: bytes, draw: random.Random) -> bytes:
    """The content after a few of the things that disks, crashes and hands do to it."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        to = min(len(content), at + draw.choice([1, 4, 60, 600]))
        how = draw.randrange(7)
        if how == 0:
            content = content[:at]
        elif how == 1:
            content = content[:at] + content[to:]
        elif how == 2:
            content = content[:at] + b"\0" * (to - at) + content[to:]
        elif how == 3:
            content = content[:at] + draw.randbytes(to - at) + content[to:]
        elif how == 4:
            content = content[:to] + content[at:]
        elif how == 5:
            content = content[:at] + b"\n" + content[at:]
        else:
            content = replace_a_value(content, draw)
    return content


def replace_a_value(content: bytes, draw: random.Random) -> bytes:
    """Put an odd value in the place of one that follows a colon."""
    colons = [at for at, byte in enumerate(content) if byte == ord(":")]
    if not colons:
        return content
    at = draw.choice(colons) + 1
    end = min((place for place in (content.find(mark, at) for mark in b",}") if place >= 0),
              default=len(content))
    return content[:at] + draw.choice(ODD_VALUES) + content[end:]


def read_everything(run: Path) -> None:
    """All that commands make of a run's files; InputError where nothing can be made of them."""
    readers: list[Callable[[], object]] = [
        lambda: run_status(run), lambda: final_metrics(run), lambda: read_attempts(run),
        lambda: read_failures(run), lambda: read_evaluations(run),
        lambda: read_measurements(run), lambda: check_plan(run, "cpu"),
        lambda: model_card(run / "checkpoints" / "step_00000002", load_recipe(run / "recipe.yaml"),
                           TrainState(2, 9), "fp32")]
    for read in readers:
        with contextlib.suppress(InputError):
            read()
    with contextlib.suppress(InputError):
        reported = read_reported_run(run, "run")
        reported.seconds_by_phase()
        for key in ("loss", "kd_loss", "perf/mfu"):
            reported.curve(key)
        reported.evaluation_curve("a", "loss")


@pytest.mark.parametrize("seed, count", [(0, 12), pytest.param(1, 300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl", "attempts.jsonl", "lives.jsonl",
                                  "measured.json", "provenance.json", "failures/local.0.1.json"])
def test_no_damage_stops_a_reader(name, seed, count, run):
    draw = random.Random(f"{name} {seed}")
    path = run / name
    content = path.read_bytes()
    for _ in range(count):
        path.write_bytes(damage(content, draw))
        read_everything(run)
        append_event(run, "begun", nodes="n2", ranks=1, changed={})
        assert read_attempts(run)[-1].nodes == "n2"


@pytest.mark.parametrize("seed, count", [(0, 50), pytest.param(1, 3000, marks=pytest.mark.slow)])
def test_lines_that_no_damage_has_touched_are_kept(seed, count, tmp_path):
    draw = random.Random(seed)
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "tokens": 9, "loss": 1.5, "tokens_per_second": 3.5}).encode()
             for step in range(20)]
    for _ in range(count):
        hit = sorted(draw.sample(range(20), 4))
        path.write_bytes(b"\n".join(damage(line, draw) if number in hit else line
                                    for number, line in enumerate(lines)) + b"\n")
        untouched = [number for number in range(20) if number not in hit]
        assert set(untouched) <= {line["step"] for line in read_metrics(tmp_path)}
        truncate_jsonl(path, 12, has_step)
        kept = path.read_bytes().splitlines()
        assert all(lines[number] in kept for number in untouched if number <= 12)
