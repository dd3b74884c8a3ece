"""LoRA and frozen students: the reference loop's optimizers, and what a run has trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from amid_ds.checkpoint.zero_shards import ZeroShards
from amid_ds.config.parse import load_recipe
from amid_ds.models.adapters import initial_value
from amid_ds.models.loading import meta_model
from amid_ds.models.trained import choose_trained
from support.reference_loop import reference_adamw
from support.runs import ROOT, read_metrics

# Of AdamW: above the rounding of gradients that are nearly zero, which it would make steps of.
EPS = 1e-6


def write_stage_config(folder: Path, stage: int, **changes) -> str:
    """Write a packaged fp32 config with this ZeRO stage, which at 3 gathers every parameter."""
    config = json.loads((ROOT / "ds_configs" / "zero3_fp32.json").read_text())
    config["zero_optimization"] = {"stage": stage} | (
        {"stage3_param_persistence_threshold": 0} if stage == 3 else {}) | changes
    path = folder / f"zero{stage}{''.join(changes)}.json"
    path.write_text(json.dumps(config))
    return str(path)


def with_peft(lora: dict):
    """A maker of the reference loop's optimizer that first puts peft's adapters on its model, with
    the values that a run of seed 0 begins with."""
    from peft import LoraConfig, get_peft_model

    def make(model: nn.Module, train: dict) -> torch.optim.Optimizer:
        saved = lora.get("modules_to_save")
        get_peft_model(model, LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"],
            target_modules=lora.get("targets", "all-linear"), modules_to_save=saved,
            ensure_weight_tying=saved is not None))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = initial_value(name, parameter.shape, 0)
        return reference_adamw(model, train)

    return make


def trained_weights(run: Path, step: int) -> dict[str, Tensor]:
    """The weights that a run has trained, by name, out of its checkpoint of `step`."""
    recipe = load_recipe(run / "recipe.yaml")
    student = meta_model(recipe.student.model)
    choose_trained(student, recipe.student)
    shards = ZeroShards(run / "checkpoints" / f"step_{step:08}",
                        {name: parameter.shape for name, parameter in student.named_parameters()
                         if parameter.requires_grad})
    return {name: shards.whole(name) for name in shards.shapes}


def assert_trains_as(truth: tuple[list[dict], dict[str, Tensor]], run: Path) -> None:
    """Each step's metrics, and what was trained, are the reference loop's to 1e-5."""
    lines, weights = truth
    got = read_metrics(run)
    assert len(got) == len(lines)
    for line, expected in zip(got, lines, strict=True):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-5), (line["step"], key)
    ours = trained_weights(run, len(lines))
    theirs = {name.replace(".modules_to_save.default", ""): weight
              for name, weight in weights.items()}
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-5,
                                   msg=lambda m, n=name: f"{n}: {m}")
