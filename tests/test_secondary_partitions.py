"""ZeRO++'s secondary partitions (hpZ): later gathers stay among neighbours, and no number differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import fp32_state
from support.counting_rank import counting_rank
from support.ranks import Ranks
from support.runs import comparable_metrics, write_gathering_config, write_recipe

from amid_ds.config.parse import load_recipe
from amid_ds.engine.ds_config import read_deepspeed_config
from amid_ds.errors import InputError

STEPS = 6


@pytest.fixture(scope="module")
def train(llama_pair, instructions_file, tmp_path_factory):
    """train(run, hpz, ranks, **changes): a run of two micro-batches a step on four ranks, every
    weight gathered at each use; hpz: neighbours that hold the student once more."""
    folder = tmp_path_factory.mktemp("secondary")

    def run(path: Path, hpz: int, ranks: int = 4, **changes) -> str:
        config = write_gathering_config(path.parent, stage3_max_reuse_distance=0,
                                        stage3_prefetch_bucket_size=0,
                                        zero_hpz_partition_size=hpz)
        recipe = write_recipe(path.with_suffix(".yaml"), *llama_pair, instructions_file, path,
                              deepspeed=str(config), data__prepared=str(folder / "data"),
                              **{"train__global_batch_size": 8, "train__steps": STEPS,
                                 "checkpoint__every": 3, **changes})
        processes = Ranks(ranks, "train", recipe, target=counting_rank)
        statuses = processes.wait()
        assert statuses == [0] * ranks, "\n".join(map(processes.output, range(ranks)))
        return processes.output()
    return run


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """(without, with): the folders of a run without and one with secondary partitions."""
    folder = tmp_path_factory.mktemp("runs")
    for name, hpz in (("without", 1), ("with", 2)):
        train(folder / name, hpz)
    return folder / "without", folder / "with"


def counts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "0.jsonl").read_text().splitlines()]


def received(run: Path) -> dict[str, int]:
    return json.loads((run / "measured.json").read_text())["network_per_step"]


def test_no_number_of_a_run_differs_by_its_secondary_partitions(runs):
    without, with_them = runs
    assert comparable_metrics(with_them) == comparable_metrics(without)
    last = [fp32_state(run / "checkpoints" / f"step_{STEPS:08d}") for run in runs]
    for ours, theirs in zip(*last, strict=True):
        assert torch.equal(ours, theirs)


def test_all_gathers_of_a_step_but_the_first_are_of_neighbours(runs):
    without, with_them = runs
    gathered = [line["student_bytes"] for line in counts(without)]
    assert [line["student_bytes"] for line in counts(with_them)] == gathered
    # Of four ranks a gather brings three quarters, of two neighbours a half.
    once = received(without)["student_gathers"] / 0.75 / 4
    assert received(with_them)["student_gathers"] == pytest.approx(once * (0.75 + 3 * 0.5), rel=0.05)
    # The teacher lies over all ranks, once.
    assert received(with_them)["teacher_gathers"] == received(without)["teacher_gathers"] > 0
    steady = counts(with_them)[3:]
    assert all(line["complete"] and not line["invalidations"] for line in steady)


@pytest.mark.parametrize("ranks", [4, 2])
def test_a_resumed_run_has_the_secondary_partitions_of_its_own_weights(train, runs, tmp_path,
                                                                       ranks):
    for run, hpz in zip(runs, (1, 2), strict=True):
        cut = tmp_path / run.name
        shutil.copytree(run, cut)
        shutil.rmtree(cut / "checkpoints" / f"step_{STEPS:08d}")
        assert "resumed after step 3" in train(cut, hpz, ranks)
        if ranks == 4:
            assert comparable_metrics(cut) == comparable_metrics(run)
    ours, theirs = (comparable_metrics(tmp_path / run.name) for run in runs)
    assert ours == theirs


@pytest.mark.parametrize("size, stage, tensor_parallel, reason", [
    (3, 3, 1, "it must divide the number of ranks, 4"), (2, 2, 1, "it needs stage 3"),
    (2, 3, 2, "neighbouring ranks would hold parts of different weights")])
def test_secondary_partitions_that_cannot_be_are_refused_by_name(llama_pair, instructions_file,
                                                                tmp_path, size, stage,
                                                                tensor_parallel, reason):
    config = write_gathering_config(tmp_path, stage=stage, zero_hpz_partition_size=size)
    recipe = load_recipe(write_recipe(
        tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
        deepspeed=str(config), tensor_parallel=tensor_parallel))
    with pytest.raises(InputError, match=f"zero_hpz_partition_size: {size} .*{reason}"):
        read_deepspeed_config(recipe, 4 // tensor_parallel)
