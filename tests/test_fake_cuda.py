"""The GPU's branches, on a faked CUDA: what a GPU computes is not tested here."""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.fake_cuda import FakeCuda, FakeStream, fake_cuda_rank
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import comparable_metrics, write_gathering_config, write_recipe

from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.memory import least_free_memory
from amid_ds.monitor.hang_watchdog import _main_thread_place


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


def fake_ranks(*arguments: object, size: int = 2, variables: dict[str, str] | None = None,
               **options: object) -> Ranks:
    """Ranks on faked GPUs; options: fake_cuda_rank's."""
    return Ranks(size, *arguments, variables=variables,
                 target=functools.partial(fake_cuda_rank, **options))


# Every rank sees all GPUs of its host, or its own alone (`srun --gpus-per-task=1`), here under Open
# MPI, whose variable DeepSpeed compares with LOCAL_RANK.
@pytest.mark.parametrize("visible", [
    {}, {"devices": 1, "own": True, "variables": {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}}],
    ids=["all", "own"])
def test_a_run_on_faked_gpus_has_the_losses_of_one_on_cpus(recipe, metrics_on_cpus, tmp_path,
                                                           visible):
    ranks = fake_ranks("train", recipe(tmp_path / "gpu"), **visible)
    assert ranks.wait() == [0, 0], ranks.output()
    assert comparable_metrics(tmp_path / "gpu") == metrics_on_cpus
    provenance = json.loads((tmp_path / "gpu" / "provenance.json").read_text())
    assert provenance["gpu_allocator"] == "expandable_segments:True"


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_two_ranks_on_one_gpu_are_refused_in_one_message(recipe, tmp_path, command):
    ranks = fake_ranks(command, recipe(tmp_path / "gpu"), devices=1)
    assert ranks.wait() == [2, 2], ranks.output()
    assert re.search(r"^amid-ds: ranks 0, 1 on \S+ share the GPU GPU-0$.*remedy: .*--gpus-per",
                     ranks.output(), re.M | re.S), ranks.output()
    assert ranks.output().count("share the GPU") == 1 and "share" not in ranks.output(1)
    assert "Traceback" not in ranks.output() + ranks.output(1)


def lone_gpu_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that sees GPUs if it is rank 0."""
    (fake_cuda_rank if variables["RANK"] == "0" else rank_main)(argv, variables, log)


def test_a_node_without_its_gpus_is_named():
    ranks = Ranks(2, "doctor", target=lone_gpu_rank)
    assert ranks.wait(60) == [1, 1], ranks.output()
    assert re.search(r"^amid-ds: no GPU is visible to rank 1 on \S+, but others have one$",
                     ranks.output(), re.M), ranks.output()


def grouped_rank(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank on its own faked GPU that writes how it joined its groups, their ranks, the
    bytes that are free, and what torch's allocator was told."""
    from amid_ds.cluster import doctor

    fake = FakeCuda(1, free_bytes=(60 + int(variables["RANK"])) << 30,
                    first=int(variables["RANK"]))
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
        free = least_free_memory(world)
        # Torch 2.11 does not tell.
        read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
        settings = read() if read else next(map(os.environ.get, os.environ.keys() & {
            "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}))
        Path(folder, variables["RANK"]).write_text(json.dumps([joined, made, free, settings]))
        return ()

    doctor.CHECKS = (check,)
    rank_main(argv, variables, log)


def joined_ranks(folder: Path, size: int, **variables: str) -> list[list]:
    """What each grouped_rank wrote."""
    ranks = Ranks(size, "doctor", variables=variables,
                  target=functools.partial(grouped_rank, str(folder)))
    assert ranks.wait() == [0] * size, ranks.output()
    return [json.loads((folder / str(rank)).read_text()) for rank in range(size)]


def test_the_default_group_is_bound_to_the_ranks_gpu_and_the_one_of_gloo_has_all_ranks(tmp_path):
    for joined, made, _, _ in joined_ranks(tmp_path, 2):
        assert joined == [["cpu:gloo,cuda:nccl", "cuda:0"]] and made == [["gloo", None]]
    # A rank by itself has nobody to connect to, or to agree with.
    (joined, made, _, _), = joined_ranks(tmp_path, 1)
    assert joined == [["cpu:gloo,cuda:nccl", "None"]] and made == []


def test_free_memory_is_the_rank_with_leasts_and_has_what_torch_holds_unused(tmp_path):
    # Rank 0: 60 GiB, and 3 held of which tensors use 1.
    assert [free for _, _, free, _ in joined_ranks(tmp_path, 2)] == [62 << 30] * 2


@pytest.mark.parametrize("variables, settings", [
    ({}, "expandable_segments:True"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False")])
def test_gpu_memory_is_in_expandable_segments_unless_the_user_says_otherwise(
        tmp_path, variables, settings):
    assert joined_ranks(tmp_path, 1, **variables)[0][-1] == settings


def splitting_rank(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank on faked GPUs that writes the ranks of each group that it makes, and whether it
    alone names them."""
    made: list[tuple[list[int] | None, bool]] = []
    new_group = dist.new_group

    def recorded(ranks=None, *arguments, **options):
        made.append((ranks and list(ranks), options.get("use_local_synchronization", False)))
        Path(folder, variables["RANK"]).write_text(json.dumps(made))
        return new_group(ranks, *arguments, **options)

    dist.new_group = recorded
    fake_cuda_rank(argv, variables, log)


# NCCL splits a group off the default one, by colours, in an act of all its ranks: one that made
# another number of groups, or left itself out, would make all others wait for ever.
@pytest.mark.parametrize("zero, changes", [
    ({}, {"tensor_parallel": 2, "teacher__shard_over": 1}),
    pytest.param({"zero_hpz_partition_size": 2}, {"teacher__shard_over": 2},
                 marks=pytest.mark.slow)], ids=["tensor parallel", "secondary partitions"])
def test_every_group_is_made_by_all_ranks_at_once(recipe, tmp_path, zero, changes):
    config = write_gathering_config(tmp_path, **zero)
    ranks = Ranks(4, "train", recipe(
        tmp_path / "run", deepspeed=str(config), teacher__placement="node", train__steps=1,
        **changes), target=functools.partial(splitting_rank, str(tmp_path)))
    assert ranks.wait() == [0] * 4, "\n".join(map(ranks.output, range(4)))
    made = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    for act in zip(*made, strict=True):
        named, alone = zip(*act, strict=True)
        if not any(alone):
            assert all(group == named[0] for group in named)
            continue
        assert all(alone) and all(rank in group for rank, group in enumerate(named))
        # Neighbours name the same ones, in order, or each would wait for others.
        assert all(named[other] == group == sorted(group) for group in named for other in group)
    assert any(alone for _, alone in made[0])


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
    ranks = Ranks(2, "train", recipe(tmp_path / "run", train__hang_timeout=8),
                  target=functools.partial(hanging_rank, sign))
    assert ranks.wait(60)[0] == 1, ranks.output()
    said = re.search(r"step 2 hangs; look at rank 1 on .* first: it works in (.*)", ranks.output())
    assert said, ranks.output()
    assert said[1].endswith("wait for it in a collective") == (sign == "a collective")
    if sign == "the stream":
        assert re.search(r"  rank 0 on .*: it waits for its GPU in ", ranks.output())


def synchronize(seen: list[str]) -> None:
    """What torch's frame of a wait for a stream looks like to another thread, which asks."""
    begun: list[bool] = []

    def ask() -> None:
        while not begun:
            time.sleep(0.001)
        seen.append(_main_thread_place(False))

    threading.Thread(target=ask).start()
    begun.append(True)
    while not seen:
        time.sleep(0.001)


# ZeRO-3 waits so for its own stream, in a reduction that a peer does not come to.
def test_a_rank_that_waits_for_another_stream_than_the_default_waits_for_its_gpu():
    seen: list[str] = []
    synchronize(seen)
    assert seen[0].startswith("it waits for its GPU in ")


def test_importing_deepspeed_tries_to_build_no_op(monkeypatch):
    deepspeed = import_deepspeed()
    monkeypatch.delattr(deepspeed.ops, "__compatible_ops__")
    # Raises a TypeError where it is called.
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", None)
    from deepspeed.comm.torch import build_shm_op

    import_deepspeed()
    assert build_shm_op() is None


@pytest.mark.parametrize("status, verdict", [
    (0, "ok    C compiler   it finds Python's headers on every node"),
    (1, "FAIL  C compiler   no Python.h here on ")])
def test_doctor_says_on_a_gpu_whether_triton_could_compile(tmp_path, status, verdict):
    compiler = tmp_path / "cc"
    # It must be asked for Python's headers, in a folder that there is, and not be told to write.
    compiler.write_text(f"""#!/bin/sh
[ -d "$2" ] && [ "$3" = -fsyntax-only ] && grep -q Python.h || exit 2
[ {status} = 0 ] || echo no Python.h here >&2
exit {status}
""")
    compiler.chmod(0o755)
    ranks = fake_ranks("doctor", size=1, variables={"CC": str(compiler)})
    assert ranks.wait() == [status], ranks.output()
    assert verdict in ranks.output()
