"""Delta-KD: the teacher's shift since its base, added to the student's base, is one teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.losses import LossProblem
from support.ranks import Ranks
from support.reference_loop import reference_loop
from support.runs import comparable_metrics, read_metrics, write_gathering_config, write_recipe
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from amid_ds.losses import AMiD, LMHead, SummedHead, linear_amid_loss, linear_argmax
from amid_ds.losses.reference import naive_loss

SCALE = 0.7


@pytest.fixture(scope="module")
def models(shared_model) -> dict[str, Path]:
    """Of different widths and heads: the teacher's logits are scaled, its base's are capped."""
    return {"student": shared_model("llama", 0), "student_base": shared_model("llama-tied", 3),
            "teacher": shared_model("llama", 1, hidden_size=64, intermediate_size=96),
            "base": shared_model("gemma2", 2)}


def target(models: dict[str, Path], scale: float = SCALE):
    """ids [1, L] -> z_student_base + scale · (log p_T - log p_base), in float64."""
    loaded = {name: AutoModelForCausalLM.from_pretrained(models[name])
              for name in ("teacher", "base", "student_base")}

    def logits(ids):
        z = {name: model(ids).logits.double() for name, model in loaded.items()}
        return (z["student_base"]
                + scale * (z["teacher"].log_softmax(-1) - z["base"].log_softmax(-1)))
    return logits


def delta(models: dict[str, Path], scale: float = SCALE) -> dict:
    own = {} if models["student_base"] == models["student"] else {
        "student_base": {"model": str(models["student_base"])}}
    return {"base": {"model": str(models["base"])}, "scale": scale, **own}


def write_delta(folder: Path, models: dict[str, Path], data: Path, out: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_recipe(folder / "recipe.yaml", models["student"], models["teacher"], data, out,
                        **{"teacher__delta": delta(models),
                           "deepspeed": str(write_gathering_config(folder)), **changes})


def train(ranks: int, recipe: Path, *overrides: str) -> None:
    processes = Ranks(ranks, "train", recipe, *overrides)
    assert processes.wait() == [0] * ranks, processes.output()


@pytest.fixture(scope="module")
def truth(models, text_file, tmp_path_factory):
    """(metrics of plain torch over the four models, the prepared data)."""
    folder = tmp_path_factory.mktemp("truth")
    recipe = write_delta(folder, models, text_file, folder / "run",
                         data__prepared=str(folder / "data"))
    train(1, recipe)
    lines, _ = reference_loop(models["student"], target(models),
                              yaml.safe_load(recipe.read_text()), folder / "data")
    return lines, folder / "data", folder / "run"


@pytest.mark.parametrize("ranks, overrides", [
    (2, ()), (2, ("tensor_parallel=2",)), (2, ("teacher.placement=replicated",)),
    pytest.param(1, ("deepspeed=ds_configs/zero1_fp32.json",), marks=pytest.mark.slow),
    pytest.param(2, ("teacher.placement=node", "teacher.shard_over=1"), marks=pytest.mark.slow),
    pytest.param(4, ("tensor_parallel=2",), marks=pytest.mark.slow)])
def test_a_run_equals_plain_torch_over_the_four_models(models, text_file, truth, tmp_path, ranks,
                                                       overrides):
    lines, prepared, _ = truth
    recipe = write_delta(tmp_path, models, text_file, tmp_path / "run",
                         data__prepared=str(prepared))
    train(ranks, recipe, *overrides)
    for ours, expected in zip(read_metrics(tmp_path / "run"), lines, strict=True):
        assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=1e-5)
