"""What slurm/README.md gives to copy names only what there is; node.sh ends as its ranks do."""

from __future__ import annotations

import configparser
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.data import write_texts
from support.models import make_model
from support.runs import ROOT, rank_environment, write_recipe

from amid_ds.config.parse import load_recipe
from amid_ds.distributed.launch import free_port

NODE_SCRIPT = ROOT / "slurm" / "node.sh"


@pytest.fixture(scope="module")
def blocks() -> dict[str, list[str]]:
    """The document's blocks of text by language."""
    found: dict[str, list[str]] = {}
    text = (ROOT / "slurm" / "README.md").read_text()
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S):
        found.setdefault(language, []).append(block)
    return found


def test_the_dockerfile_copies_what_there_is_and_installs_extras_of_the_package(blocks):
    [dockerfile] = blocks["dockerfile"]
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.M)
              for word in line.split()]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert copied and all((ROOT / name).exists() for name in copied)
    assert {"setup.cfg", "pyproject.toml", "amid_ds", "slurm", "ds_configs",
            *re.findall(r"file: (\S+)", setup["metadata"]["long_description"])} <= {*copied}
    [extras] = re.findall(r"'/src\[(.*?)\]'", dockerfile)
    assert {*extras.split(",")} <= {*setup["options.extras_require"]}
    assert "/src/slurm/node.sh /usr/local/bin/amid-ds-node" in dockerfile


def test_the_manifests_start_node_sh_with_torchruns_own_variables_and_its_statuses(blocks):
    documents = [document for block in blocks["yaml"] for document in yaml.safe_load_all(block)]
    kinds = {document.get("kind", "SkyPilot"): document for document in documents}
    assert {*kinds} == {"Service", "Job", "TrainJob", "SkyPilot"}
    pod = kinds["Job"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    needed = {"PET_NNODES", "PET_NODE_RANK", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR"}
    assert needed <= {variable["name"] for variable in container["env"]}
    assert needed <= {*re.findall(r"PET_\w+", kinds["SkyPilot"]["run"])}
    assert container["command"] == kinds["TrainJob"]["spec"]["trainer"]["command"]
    rules = kinds["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule["onExitCodes"]["values"], rule["onExitCodes"]["containerName"])
            for rule in rules if "onExitCodes" in rule] == [
        ("FailJob", [2], container["name"]), ("Ignore", [75], container["name"])]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy needs it"
    assert kinds["SkyPilot"]["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert str(NODE_SCRIPT.relative_to(ROOT)) in kinds["SkyPilot"]["run"]
    overrides = re.findall(r"\w+=/\S+$", kinds["SkyPilot"]["run"], re.M)
    load_recipe(ROOT / "amid_ds" / "config" / "recipes" / "pretrain.yaml", overrides)


def start_nodes(recipe: Path, *overrides: str) -> list[subprocess.Popen]:
    """node.sh for two nodes of a rank each, on this machine."""
    shared = {**rank_environment(), "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1",
              "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port()),
              "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return [subprocess.Popen([NODE_SCRIPT, recipe, *overrides],
                             env={**shared, "PET_NODE_RANK": str(node)},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for node in range(2)]


def statuses(nodes: list[subprocess.Popen]) -> list[int]:
    for node in nodes:
        node.communicate(timeout=200)
    return [node.returncode for node in nodes]


@pytest.mark.slow
def test_two_nodes_end_with_the_ranks_status_and_go_on_after_one_was_asked_to_stop(tmp_path):
    model, text = make_model(tmp_path / "model", "llama"), write_texts(tmp_path / "text.jsonl")
    recipe = write_recipe(tmp_path / "a recipe.yaml", model, None, text, tmp_path / "run",
                          train__steps=100_000)
    assert statuses(start_nodes(recipe, "train.stepz=3")) == [2, 2]
    # Asked to stop before there are ranks.
    nodes = start_nodes(recipe)
    for node in nodes:
        while not _children(node.pid, "torchrun"):
            time.sleep(0.1)
        node.send_signal(signal.SIGTERM)
    assert statuses(nodes) == [75, 75]
    for _ in range(2):
        nodes, before = start_nodes(recipe), _steps(tmp_path / "run")
        while _steps(tmp_path / "run") < before + 3:
            assert all(node.poll() is None for node in nodes)
            time.sleep(0.2)
        nodes[1].send_signal(signal.SIGTERM)
        assert statuses(nodes) == [75, 75]
        assert _steps(tmp_path / "run") >= before + 3
    nodes, before = start_nodes(recipe), _steps(tmp_path / "run")
    while _steps(tmp_path / "run") < before + 3:
        time.sleep(0.2)
    [rank] = _children(*_children(nodes[1].pid, "torchrun"))
    os.kill(rank, signal.SIGKILL)
    assert statuses(nodes) == [1, 1]


def _children(process: int, pattern: str = "amid_ds") -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process), "-f", pattern], capture_output=True,
                           text=True)
    return [int(pid) for pid in found.stdout.split()]


def _steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0
