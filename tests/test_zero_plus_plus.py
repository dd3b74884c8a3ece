"""ZeRO++: later gathers of the student among neighbours (hpZ), or in 8 bits (qwZ)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import fp32_state
from support.counting_rank import counting_rank
from support.eight_bits import quantizing_rank
from support.patches import rank_without_compiler
from support.ranks import Ranks
from support.runs import comparable_metrics, read_metrics, write_gathering_config, write_recipe

from amid_ds.config.parse import load_recipe
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.ds_config import read_deepspeed_config
from amid_ds.engine.zero_plus_plus import load_quantizer
from amid_ds.errors import InputError
from amid_ds.planning.devices import find_device
from amid_ds.planning.estimate import estimate_plan

STEPS = 6
LAST = f"step_{STEPS:08d}"
HPZ, QWZ = {"zero_hpz_partition_size": 2}, {"zero_quantized_weights": True}


@pytest.fixture(scope="module")
def train(llama_pair, instructions_file, tmp_path_factory):
    """train(run, zero, ranks, target, **changes): a run of two micro-batches a step on four ranks,
    every weight gathered at each use; zero: changes of the section of ZeRO. Returns the first
    rank's words."""
    folder = tmp_path_factory.mktemp("plus_plus")

    def run(path: Path, zero: dict, ranks: int = 4, target=counting_rank, **changes) -> str:
        config = write_gathering_config(path.parent, stage3_max_reuse_distance=0,
                                        stage3_prefetch_bucket_size=0, **zero)
        recipe = write_recipe(path.with_suffix(".yaml"), *llama_pair, instructions_file, path,
                              deepspeed=str(config), data__prepared=str(folder / "data"),
                              train__global_batch_size=8, train__steps=STEPS, checkpoint__every=3,
                              **changes)
        processes = Ranks(ranks, "train", recipe, target=target)
        statuses = processes.wait()
        assert statuses == [0] * ranks, "\n".join(map(processes.output, range(ranks)))
        return processes.output()
    return run


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory) -> Path:
    """The run without ZeRO++."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(run, {})
    return run


@pytest.fixture(scope="module")
def secondary(train, tmp_path_factory) -> Path:
    """The run with secondary partitions over two neighbours."""
    run = tmp_path_factory.mktemp("secondary") / "run"
    train(run, HPZ)
    return run


def counts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "0.jsonl").read_text().splitlines()]


def received(run: Path) -> dict[str, int]:
    return json.loads((run / "measured.json").read_text())["network_per_step"]


def planned(run: Path) -> dict[str, int]:
    return estimate_plan(load_recipe(run.with_suffix(".yaml")), 1, 4,
                         find_device("cpu", 4)).network_per_step


def test_no_number_of_a_run_differs_by_its_secondary_partitions(plain, secondary):
    assert comparable_metrics(secondary) == comparable_metrics(plain)
    last = [fp32_state(run / "checkpoints" / LAST) for run in (plain, secondary)]
    for ours, theirs in zip(*last, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "samples and evaluation", "neighbours' teacher"])
def test_nor_does_one_of_muon_of_samples_or_of_a_teacher_over_neighbours(train, instructions_file,
                                                                        tmp_path, kind):
    rows = {"path": str(instructions_file), "prompt": "prompt", "response": "response"}
    changes = {
        "muon": {"train__optimizer": "muon", "train__muon": {"learning_rate": 0.01}},
        "samples and evaluation": {"data__eval": [rows], "train__eval_every": 2, "rollout": {
            "adaptive": {"init_threshold": 1.0, "capacity": 100}, "max_new_tokens": 4}},
        "neighbours' teacher": {"teacher__placement": "node", "teacher__shard_over": 2}}[kind]
    for name, zero in (("plain", {}), ("secondary", HPZ)):
        train(tmp_path / name, zero, target=rank_without_compiler, **changes)
    assert comparable_metrics(tmp_path / "secondary") == comparable_metrics(tmp_path / "plain")


def test_all_gathers_of_a_step_but_the_first_are_of_neighbours(plain, secondary):
    gathered = [line["student_bytes"] for line in counts(plain)]
    assert [line["student_bytes"] for line in counts(secondary)] == gathered
    # Forward and backward of two micro-batches. Of four ranks a gather brings three quarters, of
    # two neighbours a half.
    once = received(plain)["student_gathers"] / 0.75 / 4
    assert received(secondary)["student_gathers"] == pytest.approx(once * (0.75 + 3 * 0.5),
                                                                   rel=0.05)
    assert received(secondary)["student_gathers"] == pytest.approx(
        planned(secondary)["student_gathers"], rel=0.05)
    # The teacher lies over all ranks, once.
    assert received(secondary)["teacher_gathers"] == received(plain)["teacher_gathers"] > 0
    steady = counts(secondary)[3:]
    assert all(line["complete"] and not line["invalidations"] for line in steady)


@pytest.mark.parametrize("ranks", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_a_resumed_run_has_the_secondary_partitions_of_its_own_weights(train, secondary, tmp_path,
                                                                       ranks):
    cut = tmp_path / "cut"
    shutil.copytree(secondary, cut)
    shutil.rmtree(cut / "checkpoints" / LAST)
    assert "resumed after step 3" in train(cut, HPZ, ranks)
    if ranks == 4:
        assert comparable_metrics(cut) == comparable_metrics(secondary)
    # Fewer ranks add up in another order.
    assert [line["loss"] for line in read_metrics(cut)] == pytest.approx(
        [line["loss"] for line in read_metrics(secondary)], rel=1e-5)


@pytest.mark.parametrize("zero", [QWZ, pytest.param({**QWZ, **HPZ}, marks=pytest.mark.slow)],
                         ids=["all ranks", "neighbours"])
def test_the_students_matrices_travel_in_eight_bits_and_nothing_else_does(train, plain, tmp_path,
                                                                          zero):
    run = tmp_path / "run"
    train(run, zero, target=quantizing_rank)
    losses = [[line["loss"] for line in read_metrics(each)] for each in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    # A head and the norms in fp32, the other matrices in a byte and the scales of their groups.
    share = (0.75 + 3 * 0.5) / 3 if HPZ.items() <= zero.items() else 1
    whole, rounded = received(plain), received(run)
    assert 0.25 < rounded["student_gathers"] / (whole["student_gathers"] * share) < 0.45
    assert rounded["student_gathers"] == pytest.approx(planned(run)["student_gathers"], rel=0.1)
    assert rounded["teacher_gathers"] == whole["teacher_gathers"]
    # Gradients and what is saved are as wide as before.
    assert rounded["student_reductions"] == whole["student_reductions"]


@pytest.mark.parametrize("zero, tensor_parallel, reason", [
    ({"zero_hpz_partition_size": 3}, 1, "it must divide the number of data-parallel ranks, 4"),
    ({"stage": 2, **HPZ}, 1, "it needs stage 3"), ({"stage": 2, **QWZ}, 1, "it needs stage 3"),
    (HPZ, 2, "does not do both"), (QWZ, 2, "does not do both"),
    ({"zero_quantized_gradients": True}, 1, "read the bytes of a gradient as fp16"),
    ({"zero_quantized_nontrainable_weights": True}, 1, "whose probabilities are the target"),
    ({"mics_shard_size": 2}, 1, "DeepSpeed has removed it"),
    ({"zeropp_loco_param": {}}, 1, "DeepSpeed has removed it")])
def test_what_cannot_be_is_refused_by_name(llama_pair, instructions_file, tmp_path, zero,
                                           tensor_parallel, reason):
    config = write_gathering_config(tmp_path, **zero)
    recipe = load_recipe(write_recipe(
        tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
        deepspeed=str(config), tensor_parallel=tensor_parallel))
    with pytest.raises(InputError, match=rf"{list(zero)[-1]}.*{reason}"):
        read_deepspeed_config(recipe, 4 // tensor_parallel)


def test_eight_bits_are_refused_on_a_cpu_before_a_model_is_read(llama_pair, instructions_file,
                                                                tmp_path):
    config = write_gathering_config(tmp_path, **QWZ)
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                          deepspeed=str(config))
    processes = Ranks(2, "train", recipe)
    assert processes.wait() == [2, 2], processes.output()
    assert "zero_quantized_weights: true on a CPU" in processes.output()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be a compiler for its kernels")
def test_without_a_compiler_for_its_kernels_eight_bits_are_refused():
    import_deepspeed()
    with pytest.raises(InputError, match="zero_quantized_weights cannot be compiled"):
        load_quantizer()
