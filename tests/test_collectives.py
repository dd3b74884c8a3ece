"""Whatever happens on one rank, the others go on or end: equal collectives under uneven data, and failures told."""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
import torch.distributed as dist

from amid_ds.distributed.rendezvous import init_distributed

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast",
               "broadcast_object_list", "reduce_scatter", "reduce_scatter_tensor", "barrier")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    student = small.make_model(folder / "student", "llama-tied", 0, num_hidden_layers=1)
    teacher = small.make_model(folder / "teacher", "llama", 1, num_hidden_layers=1)
    rows = small.make_instructions(folder / "rows.jsonl")
    return functools.partial(small.make_recipe, folder / "r.yaml", student, teacher, rows, train__steps=3,
                             data__prepared=str(folder / "data"))


def uneven(folder: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """A rank that writes down the collectives of each step. In step 2 the last data-parallel rank has no token."""
    from amid_ds.training import trainer

    rank, size, real_step = int(variables["RANK"]), int(variables["WORLD_SIZE"]), trainer.train_step
    calls: list[list] = []

    def counted(name, real, *args, **kwargs):
        calls.append([name, dist.get_process_group_ranks(kwargs.get("group"))])
        return real(*args, **kwargs)

    for name in COLLECTIVES:
        setattr(dist, name, functools.partial(counted, name, getattr(dist, name)))

    def step(job, ds, window, tokens, state, world, *rest):
        if rank >= size - world.tp_size and state["step"] == 1:
            window = [replace(batch, labels=torch.full_like(batch.labels, -100)) for batch in window]
        calls.clear()
        values = real_step(job, ds, window, tokens, state, world, *rest)
        Path(folder, f"step{state['step']}.rank{rank}").write_text(json.dumps(calls))
        return values

    trainer.train_step = step
    small.be_a_rank(argv, variables, log)


def test_two_ranks_make_the_same_collectives_in_the_same_order_in_every_step_of_uneven_data(recipe, tmp_path):
    run = recipe(out=tmp_path / "run")
    ranks = small.Ranks(4, "train", run, "tensor_parallel=2", be=functools.partial(uneven, str(tmp_path)))
    assert ranks.wait() == [0] * 4, ranks.text()
    for step in (1, 2, 3):
        calls = [json.loads((tmp_path / f"step{step}.rank{rank}").read_text()) for rank in range(4)]
        assert len(calls[0]) > 20
        for pair in itertools.combinations(range(4), 2):      # what both take part in, in the order of each
            first, second = ([call for call in calls[rank] if set(pair) <= set(call[1])] for rank in pair)
            assert first == second, (step, pair)
    assert all(line["loss"] > 0 for line in small.metrics(tmp_path / "run"))


def fails(where: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """A rank of which number 1 fails at `where`, alone."""
    from amid_ds.engine import build
    from amid_ds.training import trainer

    def broken(*args, **kwargs):
        raise MemoryError("no memory on this rank alone")

    if variables["RANK"] == "1":
        setattr(*{"loading": (build, "cut_head"), "a step": (trainer.engine, "optimizer_step")}[where], broken)
    small.be_a_rank(argv, variables, log)


@pytest.mark.parametrize("where", ["loading", "a step"])
def test_an_exception_on_one_rank_ends_all_of_them(recipe, tmp_path, where):
    run = recipe(out=tmp_path / "run")
    ranks = small.Ranks(2, "train", run, "tensor_parallel=2", be=functools.partial(fails, where))
    began = time.monotonic()
    assert ranks.wait(90) == [1, 1], ranks.text(0) + ranks.text(1)
    assert time.monotonic() - began < 80
    assert "no memory on this rank alone" in ranks.text(1)


def test_a_process_that_was_a_group_of_one_is_no_rank_afterwards(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with init_distributed(10):
        assert [os.environ[name] for name in names] == ["0", "1", "0"]
    assert not os.environ.keys() & set(names)      # or what it submits next would train alone on every node
