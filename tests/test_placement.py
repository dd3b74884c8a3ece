"""The teacher over the ranks of a node: no other numbers, nothing from other nodes.

Two nodes of two ranks on this machine, which have host names of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.counting_rank import counting_rank
from support.nodes import name_host, train_on_nodes, write_windows_recipe
from support.ranks import Ranks
from support.runs import comparable_results
from torch.distributed import distributed_c10d

from amid_ds.cluster import doctor
from amid_ds.config.parse import load_recipe
from amid_ds.distributed import nodes
from amid_ds.distributed.nodes import Nodes, find_nodes, shard_groups
from amid_ds.distributed.world import World
from amid_ds.errors import InputError
from amid_ds.planning.placement import ChosenPlacement
from amid_ds.training import placement
from amid_ds.training.job import check_recipe

STEPS, STOPPED_AT = 6, 5
ONE_NODE, TWO_NODES = Nodes((0, 0, 0, 0)), Nodes((0, 0, 1, 1))


def spying_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank of a node of two that counts each step's costs, and writes for each gather
    whether the weights train, and the ranks that it joins."""
    import torch.distributed as dist

    from amid_ds.engine import gather

    name_host(variables)
    count = gather._gather_in_order

    def spied(real: Any, counted: Any, parameters: Any, **options: Any) -> Any:
        parameters = list(parameters)
        joined = {(p.requires_grad, tuple(dist.get_process_group_ranks(p.ds_process_group)))
                  for p in parameters}
        with open(Path(log).parent / f"gathers{variables['RANK']}.jsonl", "a") as file:
            file.write(json.dumps(sorted(joined)) + "\n")
        return count(real, counted, parameters, **options)

    gather._gather_in_order = spied
    counting_rank(argv, variables, log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("placement")


@pytest.fixture(scope="module")
def recipe(llama_pair, instructions_file, folder) -> Path:
    return write_windows_recipe(folder, llama_pair, instructions_file,
                                train__eval_every=STEPS, train__steps=STEPS)


@pytest.fixture(scope="module")
def over_all(recipe, folder) -> Path:
    """The run whose teacher lies over all ranks."""
    train_on_nodes(4, recipe, folder / "zero3", "teacher.placement=zero3")
    return folder / "zero3"


@pytest.fixture(scope="module")
def stopped(recipe, folder) -> Ranks:
    """The ranks of a run that chose its placement, over the ranks of a node, and was stopped."""
    return train_on_nodes(4, recipe, folder / "node", stop_at=STOPPED_AT, target=spying_rank)


def test_a_run_that_goes_on_with_another_placement_is_the_run_of_one(recipe, stopped, over_all,
                                                                     folder):
    run = folder / "node"
    assert "teacher.placement: node over 2 data-parallel ranks" in stopped.output()
    chosen = json.loads((run / "provenance.json").read_text())["teacher"]["placement"]
    assert (chosen["placement"], chosen["shard_over"]) == ("node", 2) and chosen["reason"]
    assert load_recipe(run / "recipe.yaml").teacher.placement == "auto"
    train_on_nodes(4, recipe, run, "teacher.placement=replicated")
    assert comparable_results(run) == comparable_results(over_all)


def test_the_teacher_is_gathered_within_its_node_and_prefetched_undisturbed(stopped, folder):
    for rank in range(4):
        lines = (Path(stopped.folder.name) / f"gathers{rank}.jsonl").read_text().splitlines()
        student, teacher = [True, [0, 1, 2, 3]], [False, [0, 1] if rank < 2 else [2, 3]]
        gathers = [json.loads(line) for line in lines]
        assert all(group in (student, teacher) for gather in gathers for group in gather)
        # One prefetch has weights of both models.
        assert [teacher, student] in gathers
    counted = [json.loads(line) for line in (folder / "node" / "0.jsonl").read_text().splitlines()]
    assert all(line["complete"] and not line["invalidations"] for line in counted[3:])
    assert len(counted) == STOPPED_AT and counted[-1]["micro_batches"] == 2
    # Once for the window, as under zero3.
    assert 0.9 * counted[-1]["parameters"] < counted[-1]["teacher_bytes"]
    assert counted[-1]["teacher_bytes"] <= counted[-1]["parameters"]


def test_what_a_run_measures_of_its_gathers_is_less_of_the_teacher_and_as_much_of_the_student(
        stopped, over_all, folder):
    node, zero3 = (json.loads((run / "measured.json").read_text())["network_per_step"]
                   for run in (folder / "node", over_all))
    assert node["student_gathers"] == pytest.approx(zero3["student_gathers"], rel=0.01)
    # A half of each weight comes from the other rank of the node; of four, three quarters.
    assert node["teacher_gathers"] == pytest.approx(zero3["teacher_gathers"] * 0.5 / 0.75, rel=0.01)


def test_ranks_of_a_node_that_are_no_neighbours_are_refused_on_all_ranks(recipe, tmp_path):
    ranks = train_on_nodes(4, recipe, tmp_path / "run", "teacher.placement=node", expected=2,
                           CYCLIC="")
    assert "rank 1 runs on another node than its neighbours of 2" in ranks.output()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("node_of, tp_size, named", [
    ((0, 0, 1), 1, "nodes of 1 to 2 ranks"),
    ((0, 1, 0, 1), 1, "rank 1 runs on another node than its neighbours of 2"),
    ((0, 0, 1, 1), 4, "tensor_parallel 4 on nodes of 2"),
], ids=["unequal", "cyclic", "a copy on two nodes"])
def test_nodes_that_cannot_each_hold_the_teacher_are_refused(node_of, tp_size, named):
    with pytest.raises(InputError) as error:
        Nodes(node_of).copies_per_node(tp_size)
    assert named in error.value.found and "shard_over" in error.value.remedy


@pytest.mark.parametrize("node_of, passed, named", [
    ((0, 0, 1, 1), True, "over 2 data-parallel"), ((0, 1, 0, 1), False, "rank 1 runs on another")])
def test_doctor_tells_whether_the_nodes_can_each_hold_the_teacher(node_of, passed, named, recipe,
                                                                      monkeypatch):
    world = World(0, 4, torch.device("cpu"), hosts=dict(enumerate(map(str, node_of))))
    monkeypatch.setattr(World, "run_on_main", lambda _, work: work())
    given = load_recipe(recipe, ["teacher.placement=node"])
    verdict, = doctor.check_placement(given, world)
    assert verdict.passed == passed and named in str(verdict)
    assert not list(doctor.check_placement(load_recipe(recipe), world))


def test_a_nodes_ranks_have_one_host_name_and_share_copies():
    world = World(0, 4, torch.device("cpu"), hosts={0: "b", 1: "b", 2: "a", 3: "a"})
    assert find_nodes(world) == TWO_NODES
    assert TWO_NODES.copies_per_node(1) == 2 and TWO_NODES.copies_per_node(2) == 1
    assert ONE_NODE.copies_per_node(1) == 4 and (ONE_NODE.count, TWO_NODES.count) == (1, 2)


@pytest.mark.parametrize("given, where, expected", [
    ({}, TWO_NODES, ("node", 7)),
    ({}, ONE_NODE, ("zero3", None)),
    ({}, Nodes((0, 1, 0, 1)), ("zero3", None)),
    ({"shard_over": 1}, ONE_NODE, ("node", 7)),
    # The plan knows neighbours on a node.
    ({"shard_over": 2}, Nodes((0, 1, 0, 1)), ("zero3", None)),
    ({"placement": "zero3"}, TWO_NODES, ("zero3", None)),
    ({"placement": "replicated"}, TWO_NODES, ("replicated", None)),
    ({"placement": "node"}, TWO_NODES, ("node", 2)),
    ({"placement": "node", "shard_over": 1}, TWO_NODES, ("node", 1)),
    ({"placement": "node", "shard_over": 2}, Nodes((0, 1, 0, 1)), ("node", 2)),
    ({"placement": "node"}, ONE_NODE, ("zero3", None)),
])
def test_auto_is_planned_where_there_is_a_choice_and_else_the_recipe_decides(
        given, where, expected, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "make_setting", lambda *_: None)
    monkeypatch.setattr(placement, "choose_placement",
                        lambda *_: ChosenPlacement("node", 7, "the plan's"))
    overrides = [f"teacher.{key}={value}" for key, value in given.items()]
    job = check_recipe(load_recipe(recipe, [*overrides, f"output_dir={tmp_path / 'run'}"]), 4)
    chosen = placement._placement(job, where)
    assert (chosen.placement, chosen.shard_over) == expected and chosen.reason
    assert ("share a node, and" in chosen.reason) == (
        chosen.placement == "node" and where.node_of == (0, 1, 0, 1))


def test_ranks_to_shard_over_that_cannot_be_are_refused_by_the_recipe(recipe, tmp_path):
    def load(*overrides: str):
        return load_recipe(recipe, [*overrides, f"output_dir={tmp_path / 'run'}"])

    with pytest.raises(InputError, match=r"teacher\.shard_over 3 on 4 data-parallel"):
        check_recipe(load("teacher.shard_over=3"), 4)
    with pytest.raises(InputError, match="`shard_over` 2 with `placement: zero3`"):
        load("teacher.placement=zero3", "teacher.shard_over=2")
    with pytest.raises(InputError, match="shard_over"):
        load("teacher.shard_over=0")


@pytest.mark.parametrize("tp_size, copies", [(1, 2), (2, 2), (2, 1), (4, 3)])
def test_every_rank_names_the_same_groups_which_cover_the_ranks(tp_size, copies, monkeypatch):
    monkeypatch.setattr(nodes, "neighbour_group", lambda ranks: tuple(ranks))
    block = copies * tp_size
    made = [shard_groups(rank, tp_size, copies) for rank in range(2 * block)]
    for rank, groups in enumerate(made):
        assert groups.whole == tuple(range(rank // block * block, rank // block * block + block))
        assert groups.split == tuple(other for other in groups.whole
                                     if other % tp_size == rank % tp_size)
        assert rank in groups.split and len(groups.split) == copies


def test_no_two_groups_of_neighbours_have_one_colour():
    """NCCL splits them off by torch's colours, which are hashes: two alike would be one group."""
    for size in (2, 4, 8, 16, 32, 64, 72, 128):
        for step in (1, 2, 4, 8):
            block = size * step
            groups = [tuple(range(first + offset, first + block, step))
                      for first in range(0, 1 << 14, block) for offset in range(step)]
            colours = {distributed_c10d._process_group_color(group) for group in groups}
            assert len(colours) == len(groups), (size, step)
