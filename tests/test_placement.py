"""The teacher over the ranks of a node: two nodes of two ranks, by the ranks' host names."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from support.ranks import Ranks, rank_main
from support.runs import comparable_metrics, write_gathering_config, write_recipe

RANKS_PER_NODE = 2


def node_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank of a node of RANKS_PER_NODE, whose host has a name of its own."""
    host = f"node{int(variables['RANK']) // RANKS_PER_NODE}"
    socket.gethostname = lambda: host
    rank_main(argv, variables, log)


def train(recipe: Path, run: Path, *overrides: str, ranks: int = 4) -> Ranks:
    """A run to its end."""
    processes = Ranks(ranks, "train", recipe, f"output_dir={run}", *overrides, target=node_rank)
    statuses = processes.wait()
    assert statuses == [0] * ranks, "\n".join(map(processes.output, range(ranks)))
    return processes


@pytest.fixture(scope="module")
def recipe(llama_pair, instructions_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    return write_recipe(folder / "r.yaml", *llama_pair, instructions_file, folder / "run",
                        data__prepared=str(folder / "data"),
                        deepspeed=str(write_gathering_config(folder)))


def test_placements_give_the_same_losses(recipe, tmp_path):
    metrics = {}
    for placement in ("zero3", "node", "replicated", "auto"):
        processes = train(recipe, tmp_path / placement, f"teacher.placement={placement}")
        print(processes.output())
        print(json.loads((tmp_path / placement / "provenance.json").read_text())["teacher"])
        metrics[placement] = comparable_metrics(tmp_path / placement)
    assert metrics["node"] == metrics["zero3"]
    assert metrics["auto"] == metrics["zero3"]
    assert metrics["replicated"] == metrics["zero3"]
