"""Mixtures and hybrids train on tensor-parallel ranks as a plain loop does, resume and export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.families import save_tiny
from support.ranks import run_ranks
from support.reference_loop import reference_loop
from support.runs import read_metrics, write_gathering_config, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds.checkpoint.export import export

# (student, teacher, ranks) on tensor_parallel 2.
RUNS = [("gpt_oss", "qwen3_moe", 2),
        *(pytest.param(*run, marks=pytest.mark.slow) for run in (
            ("mixtral", "deepseek_v3", 4), ("deepseek_v3", "gpt_oss", 2),
            ("qwen3_next", "mixtral", 2), ("falcon_h1", "qwen3_next", 2),
            ("qwen3_moe", "falcon_h1", 2), ("deepseek_v32", "glm4_moe", 4),
            ("nemotron_h", "deepseek_v32", 2),
            ("glm4", "gemma4_text", 2)))]
EPS = 1e-4


def recipe_of(folder: Path, data: Path, student: str, teacher: str, **changes: object) -> Path:
    models = [save_tiny(name, folder / f"{role}_{name}", seed=seed) for seed, (role, name)
              in enumerate((("student", student), ("teacher", teacher)))]
    return write_recipe(folder / "recipe.yaml", *models, data, folder / "run",
                        **{"data__prepared": str(folder / "data"), "train__learning_rate": 1e-3,
                           "train__eps": EPS, "student__router_aux_loss": 0,
                           "deepspeed": str(write_gathering_config(folder)), **changes})


def require_equal(run: Path, out: Path, truth: tuple[list, dict]) -> None:
    """The run's metrics and its export are those of the plain loop."""
    lines, weights = truth
    for expected, line in zip(lines, read_metrics(run), strict=True):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=2e-4), (line["step"], key)
    exported = AutoModelForCausalLM.from_pretrained(export(run, out))
    for key, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[key], rtol=1e-3, atol=2e-4,
                                   msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("student", "teacher", "ranks"), RUNS)
def test_a_split_mixture_or_hybrid_trains_as_a_plain_loop_does(student, teacher, ranks,
                                                               instructions_file, tmp_path):
    recipe = recipe_of(tmp_path, instructions_file, student, teacher,
                       train__micro_batch_size=4 // (ranks // 2))
    run_ranks(ranks, "train", recipe, "tensor_parallel=2", timeout=300)
    models = [Path(yaml.safe_load(recipe.read_text())[role]["model"])
              for role in ("student", "teacher")]
    require_equal(tmp_path / "run", tmp_path / "out", reference_loop(
        *models, yaml.safe_load(recipe.read_text()), tmp_path / "data"))


@pytest.mark.slow
@pytest.mark.parametrize("student", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_a_mixture_resumes_in_any_tensor_parallel_layout(
        student, stage, instructions_file, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    recipe = recipe_of(tmp_path, instructions_file, student, "qwen3_moe", train__steps=6,
                       checkpoint__every=2, checkpoint__keep=10, deepspeed=str(config))
    models = [Path(yaml.safe_load(recipe.read_text())[role]["model"])
              for role in ("student", "teacher")]
    # Two steps in each layout: one rank, two that share each weight, two of each half.
    for steps, ranks, tp in ((2, 1, 1), (4, 2, 2), (6, 2, 1)):
        started = run_ranks(ranks, "train", recipe, f"tensor_parallel={tp}", timeout=300)
        if steps > 2:
            assert f"resumed after step {steps - 2}" in started.output()
        for later in (tmp_path / "run" / "checkpoints").glob("step_*"):
            if int(later.name.removeprefix("step_")) > steps:
                shutil.rmtree(later)
        shutil.rmtree(tmp_path / "run" / "model", ignore_errors=True)
        kept = read_metrics(tmp_path / "run")[:steps]
        assert [line["step"] for line in kept] == list(range(1, steps + 1))
    # The last start has made the last two steps by the second's checkpoint.
    lines, _ = reference_loop(*models, yaml.safe_load(recipe.read_text()), tmp_path / "data")
    for expected, line in zip(lines, read_metrics(tmp_path / "run"), strict=True):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=2e-4), (line["step"], key)
