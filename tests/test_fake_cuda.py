"""The GPU's branches, on a faked CUDA: what a GPU computes is not tested here."""

from __future__ import annotations

import functools
import json
import re
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.fake_cuda import FakeCuda, FakeStream, fake_cuda_rank
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import comparable_metrics, write_recipe


@pytest.fixture(scope="module")
def recipe(llama_pair, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    return functools.partial(write_recipe, folder / "r.yaml", *llama_pair, text_file,
                             train__steps=4, data__prepared=str(folder / "data"))


@pytest.fixture(scope="module")
def metrics_on_cpus(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpus")
    run_ranks(2, "train", recipe(folder / "run"))
    return comparable_metrics(folder / "run")


def fake_ranks(*arguments: object, **options: object) -> Ranks:
    """Two ranks on faked GPUs; options: fake_cuda_rank's."""
    return Ranks(2, *arguments, target=functools.partial(fake_cuda_rank, **options))


# Every rank sees all GPUs of its host, or its own alone (`srun --gpus-per-task=1`).
@pytest.mark.parametrize("visible", [{}, {"devices": 1, "own": True}], ids=["all", "own"])
def test_a_run_on_faked_gpus_has_the_losses_of_one_on_cpus(recipe, metrics_on_cpus, tmp_path,
                                                           visible):
    ranks = fake_ranks("train", recipe(tmp_path / "gpu"), **visible)
    assert ranks.wait() == [0, 0], ranks.output()
    assert comparable_metrics(tmp_path / "gpu") == metrics_on_cpus


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_two_ranks_on_one_gpu_are_refused_in_one_message(recipe, tmp_path, command):
    ranks = fake_ranks(command, recipe(tmp_path / "gpu"), devices=1)
    assert ranks.wait() == [2, 2], ranks.output()
    assert re.search(r"^amid-ds: ranks 0, 1 on \S+ share the GPU GPU-0$.*remedy: .*--gpus-per",
                     ranks.output(), re.M | re.S), ranks.output()
    assert ranks.output().count("share the GPU") == 1 and "share" not in ranks.output(1)
    assert "Traceback" not in ranks.output() + ranks.output(1)


def grouped_rank(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank on its own faked GPU that writes how it joined its groups, and their ranks."""
    from amid_ds.cluster import doctor

    fake = FakeCuda(1, first=int(variables["RANK"]))
    fake.install()
    made: list[list] = []
    new_group = dist.new_group

    def recorded(ranks=None, *arguments, **options):
        made.append([options.get("backend"), ranks and list(ranks)])
        return new_group(ranks, *arguments, **options)

    dist.new_group = recorded

    def check(recipe, world):
        assert world.gather(world.rank) == list(range(world.size))
        joined = [[options["backend"], str(options.get("device_id"))] for options in fake.groups]
        Path(folder, variables["RANK"]).write_text(json.dumps([joined, made]))
        return ()

    doctor.CHECKS = (check,)
    rank_main(argv, variables, log)


@pytest.mark.parametrize("size", [1, 2])
def test_the_default_group_is_bound_to_the_ranks_gpu_and_the_one_of_gloo_has_all_ranks(
        tmp_path, size):
    ranks = Ranks(size, "doctor", target=functools.partial(grouped_rank, str(tmp_path)))
    assert ranks.wait() == [0] * size, ranks.output()
    # A rank by itself has nobody to connect to, or to agree with.
    device, made = ("cuda:0", [["gloo", None]]) if size > 1 else ("None", [])
    for rank in range(size):
        assert json.loads((tmp_path / str(rank)).read_text()) == [
            [["cpu:gloo,cuda:nccl", device]], made]


def hanging_rank(sign: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank of two; in step 2 rank 1 sleeps, and rank 0 needs a number of its GPU."""
    def around(trainer, batch):
        if trainer.state.step == 1:
            if sign == "a collective" and variables["RANK"] == "0":
                # Launched, and not waited for, as by NCCL.
                dist.all_reduce(torch.zeros(1), async_op=True)
            elif sign == "the stream" and variables["RANK"] == "0":
                FakeStream.unfinished.append(types.SimpleNamespace(is_completed=lambda: False))
            time.sleep(1000)
        yield

    patch_train_step(around)
    fake_cuda_rank(argv, variables, log)


# What tells rank 1 from rank 0: both main threads are in Python, and in no collective.
@pytest.mark.parametrize("sign", ["a collective", "the stream"])
def test_a_hanging_step_names_the_rank_that_does_not_come_where_the_others_need_a_number(
        recipe, tmp_path, sign):
    ranks = Ranks(2, "train", recipe(tmp_path / "run", train__hang_timeout=5),
                  target=functools.partial(hanging_rank, sign))
    assert ranks.wait(60)[0] == 1, ranks.output()
    said = re.search(r"step 2 hangs; look at rank 1 on .* first: it works in (.*)", ranks.output())
    assert said, ranks.output()
    assert said[1].endswith("wait for it in a collective") == (sign == "a collective")
    if sign == "the stream":
        assert re.search(r"  rank 0 on .*: it waits for its GPU in ", ranks.output())
