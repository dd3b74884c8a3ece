"""The teacher over a node's ranks in every layout, at the end of a run, and in generation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.data import write_instructions
from support.nodes import name_host, train_on_nodes, write_windows_recipe
from support.patches import rank_without_compiler
from support.ranks import Ranks
from support.runs import comparable_results, read_metrics

from amid_ds.checkpoint.export import export

NODE, OVER_ALL = "teacher.placement=node", "teacher.placement=zero3"


def node_rank_without_compiler(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank of a node of two that can compile nothing."""
    name_host(variables)
    rank_without_compiler(argv, variables, log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("placement")


@pytest.fixture(scope="module")
def recipe(llama_pair, instructions_file, folder) -> Path:
    return write_windows_recipe(folder, llama_pair, instructions_file,
                                train__eval_every=2, train__steps=4, checkpoint__every=2)


# Ranks, overrides of both runs, of the one on nodes.
LAYOUTS: dict[str, tuple[int, list[str], list[str]]] = {
    "tp 2, a copy on each node": (4, ["tensor_parallel=2"], [NODE]),
    "tp 2, over two copies": (8, ["tensor_parallel=2"], [NODE, "teacher.shard_over=2"]),
    "loaded by transformers": (4, ["teacher.model=BIN"], [NODE]),
    "loaded by transformers, tp 2": (4, ["teacher.model=BIN", "tensor_parallel=2"], [NODE]),
    "over one rank": (2, [], [NODE, "teacher.shard_over=1"]),
    "over two nodes": (8, [], [NODE, "teacher.shard_over=4"]),
    "stage 2": (4, ["deepspeed=ds_configs/zero2.json", "teacher.dtype=bf16"], [NODE]),
    "stage 2, tp 2": (4, ["deepspeed=ds_configs/zero2.json", "teacher.dtype=bf16",
                          "tensor_parallel=2"], [NODE]),
    "offloaded": (4, ["deepspeed=ds_configs/zero3_offload.json", "teacher.dtype=bf16"], [NODE]),
    "whole small weights": (4, ["deepspeed=ds_configs/zero3_fp32.json"], [NODE]),
    "rollouts": (4, ["rollout={share: 0.5, max_new_tokens: 6}"], [NODE]),
    "muon": (4, ["train.optimizer=muon"], [NODE]),
}


@pytest.fixture(scope="module")
def bin_teacher(llama_pair, folder) -> Path:
    """The teacher, its weights in a file of torch.save."""
    saved = shutil.copytree(llama_pair[1], folder / "bin")
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_teacher_over_a_node_gives_the_same_numbers_in_every_layout(layout, recipe, bin_teacher,
                                                                        tmp_path):
    ranks, both, on_nodes = LAYOUTS[layout]
    both = [override.replace("BIN", str(bin_teacher)) for override in both]
    runs = []
    for placement in ([OVER_ALL], on_nodes):
        run = tmp_path / f"run{len(runs)}"
        train_on_nodes(ranks, recipe, run, *both, *placement, target=node_rank_without_compiler)
        runs.append(comparable_results(run))
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_a_checkpoint_resumes_on_other_ranks_and_under_any_placement(recipe, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on_nodes(4, recipe, whole, "train.steps=8", OVER_ALL)
    for ranks, steps, *overrides in [(4, 2, NODE), (2, 4, OVER_ALL), (4, 6, NODE),
                                     (4, 8, NODE, "tensor_parallel=2")]:
        (parts / "STOP").unlink(missing_ok=True)
        train_on_nodes(ranks, recipe, parts, "train.steps=8", *overrides,
                       stop_at=steps if steps < 8 else None)
    for ours, theirs in zip(read_metrics(parts), read_metrics(whole), strict=True):
        for key in ("loss", "kd_loss", "ce_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5), (ours["step"], key)


@pytest.mark.slow
def test_the_model_of_a_run_and_its_checkpoints_have_nothing_of_the_teacher_on_its_node(recipe,
                                                                                      tmp_path):
    sizes, models = [], []
    for placement in (OVER_ALL, NODE):
        run = tmp_path / placement.rpartition("=")[2]
        train_on_nodes(4, recipe, run, placement)
        sizes.append(sorted((path.name, path.stat().st_size)
                            for path in (run / "checkpoints").rglob("*.pt")))
        exported = export(run, tmp_path / f"{run.name}.out")
        models.append((exported / "model.safetensors").read_bytes())
    assert models[0] == models[1]
    assert sizes[0] == sizes[1] != []


@pytest.mark.slow
def test_answers_are_the_same_from_a_teacher_on_each_node(llama_pair, recipe, tmp_path):
    prompts = write_instructions(tmp_path / "rows.jsonl", rows=21)

    def answers(name: str, ranks: int, source: Any, **options: Any) -> str:
        out = tmp_path / name
        arguments = ["generate", source, "--prompts", prompts, "--out", out, "--max-new-tokens", 8]
        processes = Ranks(ranks, *arguments, **options)
        assert processes.wait() == [0] * ranks, processes.output()
        return out.read_text()

    alone = answers("alone", 1, llama_pair[1])
    on_nodes = tmp_path / "nodes.yaml"
    on_nodes.write_text(recipe.read_text().replace("teacher:\n", "teacher:\n  placement: node\n"))
    for target in (node_rank_without_compiler, short_of_memory):
        assert answers(target.__name__, 4, on_nodes, target=target) == alone


def short_of_memory(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank of a node of two on which the whole model has no room."""
    from amid_ds.engine.engine import Engine

    Engine.fits_gathered = lambda *_: False
    node_rank_without_compiler(argv, variables, log)
