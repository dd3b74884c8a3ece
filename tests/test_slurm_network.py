"""What really goes between nodes in a step, by the kernel's counters, beside what `plan` says.

`python tests/test_slurm_network.py` prints it as a table.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
from support import counting_node, slurm_cluster
from support.data import write_texts
from support.models import make_model
from support.ranks import Ranks
from support.runs import read_metrics, write_gathering_config, write_recipe

from amid_ds.config.parse import load_recipe
from amid_ds.planning.devices import find_device
from amid_ds.planning.estimate import estimate_plan

NODES, RANKS_PER_NODE = 2, 2
# What a node's card is limited to for the table, as tc(8) has it.
RATE = "50mbit"
# 3 and 18 MB in fp32: what is not weights is then a small part of what is sent.
STUDENT = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4)
TEACHER = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6)
# Changes of the recipe, and of ZeRO's section.
LAYOUTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "zero3": ({"teacher__placement": "zero3"}, {}),
    "node": ({"teacher__placement": "node"}, {}),
    "replicated": ({"teacher__placement": "replicated"}, {}),
    # Every weight of the student is gathered at each use: without and with a copy on each node.
    "each use": ({"teacher__placement": "node"},
                 {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}),
    "each use, hpZ": ({"teacher__placement": "node"},
                      {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
                       "zero_hpz_partition_size": RANKS_PER_NODE})}


class Step(NamedTuple):
    """Bytes per step that each node's card has taken in and given out; what `plan` says that a node
    takes in, and the teacher's part of it; seconds of a step; the losses of the run."""

    taken: list[float]
    given: list[float]
    planned: float
    planned_teacher: float
    seconds: float
    losses: list[float]


def measure(cluster: slurm_cluster.Cluster, folder: Path, layout: str, srun: bool = False) -> Step:
    """A run on the cluster's two nodes, its models made in `folder`; srun: started by Slurm."""
    recipe_changes, zero_changes = LAYOUTS[layout]
    run = Path(tempfile.mkdtemp(dir=folder))
    counts = run / "counts"
    counts.mkdir()
    for name, seed, sizes in (("student", 0, STUDENT), ("teacher", 1, TEACHER)):
        if not (folder / name).exists():
            make_model(folder / name, "llama", seed, **sizes)
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_texts(rows)
    recipe = write_recipe(
        run / "recipe.yaml", folder / "student", folder / "teacher", rows, run / "run",
        deepspeed=str(write_gathering_config(run, **zero_changes)),
        train__steps=counting_node.LAST_STEP, data__prepared=str(folder / "data"),
        **recipe_changes)
    if srun:
        done = cluster.run(
            "srun", f"--nodes={NODES}", f"--ntasks-per-node={RANKS_PER_NODE}", "--cpus-per-task=1",
            sys.executable, counting_node.__file__, counts, "train", recipe,
            PYTHONPATH=str(Path(__file__).parent), MASTER_ADDR="n1", MASTER_PORT="29400")
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        ranks = Ranks(NODES * RANKS_PER_NODE, "train", recipe,
                      variables={"MASTER_ADDR": "10.77.0.1"}, target=functools.partial(
                          counting_node.rank_on_node, f"{cluster.prefix}n", counts, RANKS_PER_NODE))
        assert ranks.wait(240) == [0] * NODES * RANKS_PER_NODE, ranks.output()
    by_host = {path.name.partition("-")[0]: json.loads(path.read_text())
               for path in counts.iterdir()}
    nodes = list(by_host.values())
    assert len(nodes) == NODES
    network = estimate_plan(load_recipe(recipe), NODES, NODES * RANKS_PER_NODE,
                            find_device("cpu", RANKS_PER_NODE)).network_per_step
    teacher = network["teacher_between_nodes"]
    return Step([node["in"] for node in nodes], [node["out"] for node in nodes],
                RANKS_PER_NODE * (network["student_between_nodes"] + teacher),
                RANKS_PER_NODE * teacher, nodes[0]["seconds"],
                [line["loss"] for line in read_metrics(run / "run")])


@pytest.fixture(scope="module")
def step_of(tmp_path_factory) -> Iterator[Callable[..., Step]]:
    """step_of(layout, srun): measured once."""
    missing = slurm_cluster.missing()
    if missing:
        assert "CI" not in os.environ, f"CI tests Slurm, and there is no {', '.join(missing)}"
        pytest.skip(
            f"no {', '.join(missing)}; see tests/support/slurm_cluster.py for what to install")
    folder = tmp_path_factory.mktemp("network")
    with slurm_cluster.Cluster(NODES) as cluster:
        yield functools.cache(
            lambda layout, srun=False: measure(cluster, folder, layout, srun))


@pytest.mark.parametrize("layout, srun", [
    ("node", False), *(pytest.param(layout, False, marks=pytest.mark.slow)
                       for layout in LAYOUTS if layout != "node"),
    # Ranks where Slurm puts them.
    pytest.param("zero3", True, marks=pytest.mark.slow)])
def test_a_node_takes_in_and_gives_out_per_step_what_the_plan_says(step_of, layout, srun):
    step = step_of(layout, srun)
    for measured in (*step.taken, *step.given):
        assert measured == pytest.approx(step.planned, rel=0.05)


@pytest.mark.slow
def test_a_teacher_over_the_ranks_of_a_node_takes_nothing_from_other_nodes(step_of):
    nowhere, whole = step_of("replicated"), step_of("zero3")
    of_teacher = whole.taken[0] - nowhere.taken[0]
    assert of_teacher == pytest.approx(whole.planned_teacher, rel=0.05)
    # To what the agreements of two runs differ by.
    assert abs(step_of("node").taken[0] - nowhere.taken[0]) < 0.01 * of_teacher
    assert step_of("node").planned_teacher == 0


@pytest.mark.slow
def test_losses_do_not_depend_on_where_weights_lie(step_of):
    for layout in LAYOUTS:
        assert step_of(layout).losses == pytest.approx(step_of("zero3").losses, rel=1e-6), layout


def print_table() -> None:
    """The measurements as engine/README.md has them, each node's card limited to RATE."""
    with (tempfile.TemporaryDirectory(prefix="network-") as folder,
          slurm_cluster.Cluster(NODES) as cluster):
        for name in cluster.names:
            cluster.throttle(name, RATE)
        print("| | a node takes in | gives out | planned | of the teacher, planned | seconds |\n"
              "|---|---:|---:|---:|---:|---:|")
        for layout in LAYOUTS:
            step = measure(cluster, Path(folder), layout)
            cells = [max(step.taken), max(step.given), step.planned, step.planned_teacher]
            print(f"| {layout} | " + " | ".join(f"{cell / 1e6:.2f}" for cell in cells)
                  + f" | {step.seconds:.2f} |", flush=True)


if __name__ == "__main__":
    print_table()
