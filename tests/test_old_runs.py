"""Runs that version 0.1's first layout of the code left behind still open and go on.

tests/fixtures/old_runs holds two of them as they were after step 4 of 8, made before the modules
moved into packages, and beside them the metrics of the same runs when nobody interrupted them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
from support.ranks import Ranks, rank_main
from support.runs import read_metrics
from transformers import AutoModelForCausalLM

from amid_ds.checkpoint.export import export
from amid_ds.checkpoint.manifest import Manifest, verify
from amid_ds.checkpoint.state import Layout
from amid_ds.run.attempts import read_attempts

OLD_RUNS = Path(__file__).parent / "fixtures" / "old_runs"


def train_in(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """A rank whose recipe's relative paths start from `folder`."""
    os.chdir(folder)
    rank_main(argv, variables, log)


@pytest.fixture
def old_runs(tmp_path) -> Path:
    return Path(shutil.copytree(OLD_RUNS, tmp_path / "old_runs"))


# TAID's interpolation, adaptive rollouts with their buffer, ZeRO-3 on two ranks; and a streamed
# source, ZeRO-1 on one rank. The third resumes the first on another layout.
@pytest.mark.parametrize(("run", "ranks", "saved_on"),
                         [("rollouts", 2, 2), ("stream", 1, 1), ("rollouts", 1, 2)])
def test_an_old_run_goes_on_as_if_it_had_not_been_interrupted(old_runs, run, ranks, saved_on):
    resumed = Ranks(ranks, "train", f"{run}.yaml",
                    target=functools.partial(train_in, str(old_runs)))
    assert resumed.wait() == [0] * ranks, resumed.output()
    assert "resumed after step 4" in resumed.output()
    lines = (OLD_RUNS / "uninterrupted" / f"{run}.jsonl").read_text().splitlines()
    expected = [json.loads(line) for line in lines]
    got = read_metrics(old_runs / run)
    assert [line["step"] for line in got] == list(range(1, 9))
    for line, truth in zip(got, expected, strict=True):
        for name in ("loss", "kd_loss", "ce_loss", "grad_norm", "lam", "tokens"):
            assert line[name] == pytest.approx(truth[name], rel=1e-4), (line["step"], name)
    attempts = read_attempts(old_runs / run)
    assert [attempt.status for attempt in attempts] == [0, 0]
    assert [attempt.ranks for attempt in attempts] == [saved_on, ranks]


@pytest.mark.parametrize(("run", "layout"), [("rollouts", Layout(2, 1, 3, "fp32")),
                                             ("stream", Layout(1, 1, 1, "fp32"))])
def test_an_old_checkpoint_is_verified_read_and_exported(old_runs, run, layout, tmp_path,
                                                         monkeypatch):
    monkeypatch.chdir(old_runs)
    checkpoint = Path(run) / "checkpoints" / "step_00000004"
    assert verify(checkpoint) is None
    manifest = Manifest.read(checkpoint)
    assert (manifest.layout, manifest.state.step) == (layout, 4)
    on_disk = json.loads((checkpoint / "manifest.json").read_text())["content"]
    assert manifest.state.teacher_tokens_per_pass == on_disk["state"]["tokens_per_pass"]
    assert manifest.state.taid == on_disk["state"].get("interpolation")
    assert ((manifest.state.rollout is None) == (run == "stream")
            == (manifest.state.streams is not None))
    # Written again, the manifest says the same: the two versions read each other's checkpoints.
    manifest.write(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["content"] == on_disk
    assert AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out")).config.vocab_size > 0
