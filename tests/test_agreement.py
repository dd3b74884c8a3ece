"""What all ranks agree on: extremes, the first error, what one of them has, in few messages."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.exchanges import Record, count_collectives
from support.ranks import RankPool

from amid_ds.distributed.failures import FailureMonitor
from amid_ds.distributed.progress import launched_collectives, rank_behind
from amid_ds.distributed.world import Peak, World, _packed, _unpacked
from amid_ds.errors import InputError, TrainingError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pool():
    pool = RankPool()
    yield pool
    pool.close()


def agree(rank: int, group: Any, size: int) -> dict[str, Any]:
    """What a rank of `size` gets from each method."""
    world = World(rank, size, CPU, agreement=group)
    number = (5, -3, 7, -3)[rank]
    return {"least": world.least(number), "most": world.most(number), "float": world.most(rank / 3),
            "any": [world.any(rank == one) for one in (0, size - 1, size)],
            "broadcast": [world.broadcast({"of": rank}, source) for source in range(size)],
            "first": [world.first(rank if rank in having else None)
                      for having in ([], [size - 1], [1, size - 1])],
            "collect": world.collect("x" * rank), "gather": world.gather((rank, None)),
            "barrier": world.barrier()}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_the_same_answers_on_any_number_of_ranks(pool, size):
    numbers = (5, -3, 7, -3)[:size]
    expected = {"least": min(numbers), "most": max(numbers), "float": (size - 1) / 3,
                "any": [True, True, False],
                "broadcast": [{"of": source} for source in range(size)],
                "first": [None, size - 1, 1], "gather": [(rank, None) for rank in range(size)],
                "barrier": None}
    for rank, answers in enumerate(pool.run(size, agree, size)):
        assert answers.pop("collect") == (["x" * each for each in range(size)] if rank == 0
                                          else None)
        assert answers == expected
        assert type(answers["least"]) is int


def launched_without(rank: int, group: Any, late: int) -> dict[str, int]:
    """What a rank of four has launched while `late` has not come to the last agreement."""
    world = World(rank, 4, CPU, agreement=group)
    # Other tests' worlds have left their messages in other groups.
    others = launched_collectives(world).keys() - {"agreements", group.group_name}
    for number in range(3):
        world.barrier()
        world.collect(number)
        world.broadcast(number, number)
    if rank == late:
        launched = launched_collectives(world)
        world.barrier()
        return {name: launched[name] for name in launched.keys() - others}
    before = world.agreements.total()
    thread = threading.Thread(target=world.barrier)
    thread.start()
    while world.agreements.total() == before:
        time.sleep(0.001)
    launched = launched_collectives(world)
    thread.join()
    return {name: launched[name] for name in launched.keys() - others}


@pytest.mark.parametrize("late", range(4))
def test_the_rank_that_an_agreement_waits_for_is_the_one_behind(pool, late):
    # Ranks send and receive different numbers of messages in each.
    assert rank_behind(dict(enumerate(pool.run(4, launched_without, late)))) == late


def fail_on(rank: int, group: Any, failing: list[int]) -> str:
    """The error that a rank of four gets where these fail, or what its work returned."""
    def work() -> str:
        if rank in failing:
            raise InputError(f"no file on {rank}", "a file", "make one")
        return f"done on {rank}"

    try:
        return World(rank, 4, CPU, agreement=group).run_checked(work)
    except InputError as error:
        return error.found


def test_the_lowest_ranks_error_is_raised_on_all(pool):
    assert pool.run(4, fail_on, [3, 2]) == ["no file on 2"] * 4
    assert pool.run(4, fail_on, []) == [f"done on {rank}" for rank in range(4)]


def fail_early(rank: int, group: Any) -> tuple[str, bool]:
    """The error of a rank of three, of which one fails before an agreement within another; and that
    all of them leave together."""
    world = World(rank, 3, CPU, agreement=group)

    def work() -> None:
        if rank == 1:
            raise InputError("no memory on 1", "more", "find it")
        world.run_checked(lambda: None)

    try:
        world.run_checked(work)
    except InputError as error:
        world.barrier()
        return error.found, error.agreed
    return "done", False


def test_ranks_that_agree_on_an_error_one_level_apart_leave_together(pool):
    assert pool.run(3, fail_early) == [("no memory on 1", True)] * 3


def work_on_main(rank: int, group: Any, fails: bool) -> Any:
    """What a rank of three gets of rank 0's work."""
    def work() -> list[int]:
        assert rank == 0
        if fails:
            raise TrainingError("rank 0 could not")
        return [1, 2]

    try:
        return World(rank, 3, CPU, agreement=group).run_on_main(work)
    except TrainingError as error:
        return str(error)


def test_what_rank_0_makes_or_raises_is_every_ranks(pool):
    assert pool.run(3, work_on_main, False) == [[1, 2]] * 3
    assert pool.run(3, work_on_main, True) == ["rank 0 could not"] * 3


def count_messages(rank: int, group: Any) -> list[tuple[Any, ...]]:
    """(operation, bytes, times) of an agreement that nothing is wrong, and of a step's sums."""
    record = Record()
    methods = {name: method for name, method in vars(dist.ProcessGroup).items()}
    count_collectives(record)
    world = World(rank, 4, CPU, agreement=group)
    try:
        world.run_checked(lambda: None)
        world.sum_with_peaks(torch.zeros(5), torch.zeros(2))
    finally:
        for name, method in methods.items():
            if getattr(dist.ProcessGroup, name) is not method:
                setattr(dist.ProcessGroup, name, method)
    return sorted((*key, times) for key, times in
                  Counter((name, size) for _, _, name, size in record).items())


def test_an_agreement_goes_up_a_tree_and_down_it_in_messages_of_8_bytes(pool):
    step = [("allreduce", 16, 1), ("allreduce", 40, 1), ("broadcast", 8, 1)]
    # 1 and 2 below 0, 3 below 1.
    assert pool.run(4, count_messages) == [
        [*step, ("recv", 8, 2)], [*step, ("recv", 8, 1), ("send", 8, 1)],
        [*step, ("send", 8, 1)], [*step, ("send", 8, 1)]]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 1000, 16_384])
def test_the_tree_holds_every_rank_once_with_log2_ranks_below_any(size):
    trees = [World(rank, size, CPU).tree for rank in range(size)]
    below = [(rank, child) for rank, (_, children) in enumerate(trees) for child in children]
    assert sorted(child for _, child in below) == list(range(1, size))
    assert all(trees[child][0] == rank < child for rank, child in below)
    assert max(len(children) for _, children in trees) == (size - 1).bit_length()


def sum_with_peaks(rank: int, _: Any, tp_size: int) -> tuple[list[float], list[Peak]]:
    candidates = torch.tensor([rank, -rank, 2.0, math.nan if rank == 1 else 9.0],
                              dtype=torch.float64)
    return World(rank, 4, CPU, tp_size).sum_with_peaks(torch.tensor([1.0, rank]), candidates)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_sum_comes_with_the_largest_of_each_candidate_and_the_lowest_rank_that_has_it(pool,
                                                                                        tp_size):
    for sums, peaks in pool.run(4, sum_with_peaks, tp_size):
        assert sums == [4 / tp_size, 6 / tp_size]
        assert peaks[:3] == [(3.0, 3), (0.0, 0), (2.0, 0)]
        assert math.isnan(peaks[3].value) and peaks[3].rank == 1


def test_packed_numbers_have_the_order_of_values_then_of_falling_ranks():
    generator = random.Random(0)
    values = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, -3.4e38,
              *(generator.gauss(0, 10 ** generator.randint(-30, 30)) for _ in range(200))]
    values = torch.tensor(values).tolist()
    cases = [(value, rank) for value in values for rank in (0, 1, 16_383, 2**20 - 1)]
    packed = {case: _packed(torch.tensor([case[0]]), case[1]).item() for case in cases}
    for (value, rank), number in packed.items():
        assert _unpacked(number) == Peak(value, rank)
    ordered = sorted(cases, key=packed.__getitem__)
    assert ordered == sorted(cases, key=lambda case: (case[0], -case[1]))
    # Of either sign.
    nan = torch.tensor([math.nan, math.nan]).copysign(torch.tensor([1.0, -1.0]))
    assert (_packed(nan, 5) > max(packed.values())).all()
    assert math.isnan(_unpacked(_packed(nan, 5)[1].item()).value)


@pytest.mark.parametrize(("size", "seconds"), [(2, 2.0), (1000, 2.0), (16_384, 32.768)])
def test_ranks_together_ask_for_failures_at_most_500_times_a_second(size, seconds):
    monitor = FailureMonitor(dist.HashStore(), 0, size)
    monitor.stop()
    assert monitor.interval == seconds and size / monitor.interval <= 500


@pytest.mark.parametrize("rank, calls", [(0, ["report", "barrier", "withdraw"]),
                                         (1, ["report", "barrier"])])
def test_rank_0_alone_takes_back_the_failure_with_which_all_leave(rank, calls, monkeypatch):
    """It holds the store, and may have ended before another rank asks for it."""
    made: list[str] = []
    monkeypatch.setattr(World, "barrier", lambda self: made.append("barrier"))
    failures = SimpleNamespace(report=lambda message: made.append("report"),
                               withdraw=lambda: made.append("withdraw"))
    World(rank, 1, CPU, failures=failures).leave(TrainingError("why"))
    assert made == calls


def test_a_failure_that_is_taken_back_is_no_failure_and_nobody_waits_for_its_key():
    """A rank between its two requests would wait for a deleted key, and abort at its end."""
    store = dist.HashStore()
    own, peer = FailureMonitor(store, 1, 2), FailureMonitor(store, 0, 2)
    own.report("no memory\nhere")
    assert (own.of_a_peer(), peer.of_a_peer()) == (None, "no memory")
    own.withdraw()
    assert peer.of_a_peer() is None and own.store.check(["failed"])
    for monitor in (own, peer):
        monitor.stop()


def test_only_an_error_of_a_collective_is_laid_to_a_peer_that_has_failed():
    """Any other is this rank's own, on which the ranks agree, also where a peer fails too."""
    store = dist.HashStore()
    monitors = [FailureMonitor(store, rank, 2) for rank in range(2)]
    monitors[1].report("rank 1 has no memory")
    world = World(0, 1, CPU, failures=monitors[0])
    with pytest.raises(RuntimeError) as own:
        torch.zeros(2) + torch.zeros(3)
    assert world.explained(own.value) is own.value
    with pytest.raises(RuntimeError) as of_collective:
        store.set_timeout(timedelta(milliseconds=10))
        dist.distributed_c10d._store_based_barrier(0, store, "name", 2, timedelta(seconds=0.01))
    assert "rank 1 has no memory" in str(world.explained(of_collective.value))
    for monitor in monitors:
        monitor.stop()


def work_on_hosts(rank: int, group: Any, failing: int | None) -> Any:
    """What a rank of three, on hosts of two and one, gets of the first ranks' work."""
    def work() -> int:
        if rank == failing:
            raise TrainingError("this host cannot")
        return rank

    try:
        return World(rank, 3, CPU, agreement=group, is_first_on_host=rank != 1).run_on_hosts(work)
    except TrainingError as error:
        return str(error)


def test_the_first_rank_of_each_host_works_and_its_error_is_every_ranks(pool):
    assert pool.run(3, work_on_hosts, None) == [0, None, 2]
    assert pool.run(3, work_on_hosts, 2) == ["this host cannot"] * 3
