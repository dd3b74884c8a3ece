"""If one rank fails, the others end too; with uneven data all ranks make the same collectives."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.patches import patch_train_step
from support.ranks import Ranks, rank_main
from support.runs import read_metrics, write_recipe

from amid_ds.distributed.failures import FailureMonitor
from amid_ds.distributed.progress import rank_behind
from amid_ds.distributed.rendezvous import init_distributed

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object",
               "broadcast", "broadcast_object_list", "reduce_scatter", "reduce_scatter_tensor",
               "barrier")


@pytest.fixture(scope="module")
def recipe(shared_model, instructions_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    student = shared_model("llama-tied", 0, num_hidden_layers=1)
    teacher = shared_model("llama", 1, num_hidden_layers=1)
    return functools.partial(write_recipe, folder / "r.yaml", student, teacher, instructions_file,
                             train__steps=3, data__prepared=str(folder / "data"))


def uneven_rank(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that records its collectives; in step 2 the last dp rank has no token."""
    rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    calls: list[list] = []

    def counted(name, real, *args, **kwargs):
        calls.append([name, dist.get_process_group_ranks(kwargs.get("group"))])
        return real(*args, **kwargs)

    for name in COLLECTIVES:
        setattr(dist, name, functools.partial(counted, name, getattr(dist, name)))

    def around(trainer, batch):
        if rank >= size - trainer.world.tp_size and trainer.state.step == 1:
            batch = batch._replace(window=[
                replace(each, labels=torch.full_like(each.labels, -100)) for each in batch.window])
        calls.clear()
        yield batch
        Path(folder, f"step{trainer.state.step}.rank{rank}").write_text(json.dumps(calls))

    patch_train_step(around)
    rank_main(argv, variables, log)


def test_two_ranks_make_the_same_collectives_in_the_same_order_in_every_step_of_uneven_data(
        recipe, tmp_path):
    run = recipe(out=tmp_path / "run")
    ranks = Ranks(4, "train", run, "tensor_parallel=2",
                  target=functools.partial(uneven_rank, str(tmp_path)))
    assert ranks.wait() == [0] * 4, ranks.output()
    for step in (1, 2, 3):
        calls = [json.loads((tmp_path / f"step{step}.rank{rank}").read_text()) for rank in range(4)]
        assert len(calls[0]) > 20
        # The collectives that both ranks are in, in the order of each.
        for pair in itertools.combinations(range(4), 2):
            first, second = ([call for call in calls[rank] if set(pair) <= set(call[1])]
                             for rank in pair)
            assert first == second, (step, pair)
    assert all(line["loss"] > 0 for line in read_metrics(tmp_path / "run"))


def failing_rank(where: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank; rank 1 alone fails at `where`."""
    from amid_ds.engine import build
    from amid_ds.engine.engine import Engine

    def broken(*args, **kwargs):
        raise MemoryError("no memory on this rank alone")

    if variables["RANK"] == "1":
        setattr(*{"loading": (build, "cut_head"), "a step": (Engine, "optimizer_step")}[where],
                broken)
    rank_main(argv, variables, log)


@pytest.mark.parametrize("where", ["loading", "a step"])
def test_an_exception_on_one_rank_ends_all_of_them(recipe, tmp_path, where):
    run = recipe(out=tmp_path / "run")
    ranks = Ranks(2, "train", run, "tensor_parallel=2",
                  target=functools.partial(failing_rank, where))
    began = time.monotonic()
    assert ranks.wait(90) == [1, 1], ranks.output(0) + ranks.output(1)
    assert time.monotonic() - began < 80
    assert "no memory on this rank alone" in ranks.output(0) + ranks.output(1)


def timeouts_rank(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that writes the timeout, in seconds, of each group that it is in."""
    def around(trainer, batch):
        groups = dist.distributed_c10d._world.pg_map
        seconds = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
                   for group in groups]
        Path(folder, f"rank{variables['RANK']}").write_text(json.dumps(seconds))
        yield

    patch_train_step(around)
    rank_main(argv, variables, log)


def test_every_group_waits_longer_than_the_hang_watchdog(recipe, tmp_path):
    run = recipe(out=tmp_path / "run", train__steps=1, train__hang_timeout=4000)
    ranks = Ranks(2, "train", run, "tensor_parallel=2",
                  target=functools.partial(timeouts_rank, str(tmp_path)))
    assert ranks.wait() == [0, 0], ranks.output()
    for rank in range(2):
        seconds = json.loads((tmp_path / f"rank{rank}").read_text())
        # The default group, the agreement's, the tensor-parallel one, and DeepSpeed's.
        assert len(seconds) >= 4 and set(seconds) == {4030}, seconds


def blocked_rank(where: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank of two; rank 1 fails, and rank 0 waits for it where no collective is."""
    from amid_ds.cluster import doctor
    from amid_ds.distributed import rendezvous

    FailureMonitor.CHECK_EVERY_S, FailureMonitor.GRACE_S = 0.1, 0.5

    def fail(*args, **kwargs):
        raise RuntimeError("something is wrong with this rank")

    def stand_still(*args, **kwargs):
        time.sleep(1000)

    def check(recipe, world):
        if not world.is_main:
            fail()
        dist.distributed_c10d._get_default_store().get("never set")

    doctor.CHECKS = (check,)
    if where != "the store" and variables["RANK"] == "1":
        dist.init_process_group = fail if where == "connecting" else stand_still
    if where == "connecting for ever":
        limited = rendezvous._time_limit
        rendezvous._time_limit = lambda world, limit: limited(world, timedelta(seconds=1))
    rank_main(argv, variables, log)


# A key of the groups' store that the other never sets; the first connection, which NCCL does not
# limit in time.
@pytest.mark.parametrize("where, reason", [
    ("the store", "rank 1: RuntimeError: something is wrong with this rank"),
    ("connecting", "rank 1 on .* did not meet .*: something is wrong with this rank"),
    ("connecting for ever", "did not meet the others at .*: they are not connected after 1 s")])
def test_a_rank_that_waits_in_no_collective_still_sees_a_failure(where, reason):
    ranks = Ranks(2, "doctor", target=functools.partial(blocked_rank, where))
    # The store itself gives up after doctor's 60 s.
    assert ranks.wait(40) == [1, 1], ranks.output(0) + ranks.output(1)
    assert re.search(reason, ranks.output(0)), ranks.output(0)


@pytest.mark.parametrize("launched, behind", [
    # All together, on one rank or on two.
    ([{"all": 5}, {"all": 5}], None), ([{"all": 5}], None),
    ([{"all": 6}, {"all": 5}, {"all": 6}], 1),
    # Groups 0 1, 2 3, 0 2, 1 3: 3 is missed by 2 and by 1, and 2 by 0, which is missed by none.
    ([{"01": 9, "02": 8}, {"01": 9, "13": 8}, {"23": 9, "02": 7}, {"23": 8, "13": 7}], 3),
    # A group of which a rank knows nothing says nothing of it.
    ([{"all": 5, "0": 9}, {"all": 5}], None),
    # They wait for each other: their program is wrong, and neither is behind.
    ([{"a": 2, "b": 1}, {"a": 1, "b": 2}], None),
])
def test_the_rank_behind_is_the_one_that_others_wait_for_and_that_waits_for_none(launched, behind):
    assert rank_behind(dict(enumerate(launched))) == behind


def test_a_process_that_was_a_group_of_one_is_no_rank_afterwards(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with init_distributed(10):
        assert [os.environ[name] for name in names] == ["0", "1", "0"]
    # Else a job that it submits would train alone on every node.
    assert not os.environ.keys() & set(names)
