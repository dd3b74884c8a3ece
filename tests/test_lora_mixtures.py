"""LoRA on a mixture: its linear layers have adapters, its routed experts have none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from support.families import plain_model, save_tiny
from support.lora import EPS, assert_trains_as
from support.ranks import run_ranks
from support.reference_loop import reference_adamw, reference_loop
from support.runs import comparable_metrics, write_gathering_config, write_recipe
from torch import nn
from transformers import AutoModelForCausalLM

from amid_ds.cli import main
from amid_ds.config.recipe import Lora, Student
from amid_ds.models.adapter_folders import ADAPTER_FILE, model_source
from amid_ds.models.adapters import file_key, initial_value, is_adapter, write_adapter_config
from amid_ds.models.hollow import hollow_causal_lm
from amid_ds.models.loading import load_causal_lm, meta_model
from amid_ds.models.trained import choose_trained

RANK = 4
LORA = {"rank": RANK, "alpha": 8.0}


def linear_layers(model: nn.Module) -> set[str]:
    """Names of a plain model's linear layers, but its head and the gates of shared experts."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)
            and name != "lm_head" and min(module.weight.shape) >= RANK}


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(3, 27)[None]).logits


# A dense layer and a shared expert, a gate of one output, and neither.
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "mixtral"])
def test_every_linear_layer_has_an_adapter_and_peft_opens_its_folder(family, tmp_path):
    folder, out = save_tiny(family, tmp_path / "model"), tmp_path / "adapter"
    lora = Lora(**LORA, dropout=0.1)
    student = Student(model=str(folder), lora=lora)
    model = load_causal_lm(str(folder), "fp32")
    targets = linear_layers(model)
    names = choose_trained(model, student).keys()
    assert {name.partition(".lora_")[0] for name in names} == targets
    hollow = hollow_causal_lm(str(folder), torch.float32)
    assert choose_trained(hollow, student).keys() == names == {
        name for name, parameter in hollow.named_parameters() if parameter.requires_grad}
    draw = torch.Generator().manual_seed(0)
    for name in names:
        values = model.get_parameter(name).data
        values.copy_(0.05 * torch.randn(values.shape, generator=draw))
    out.mkdir()
    write_adapter_config(out, meta_model(str(folder)), lora, str(folder))
    save_file({file_key(name): model.get_parameter(name).detach() for name in names},
              out / ADAPTER_FILE)
    expected, plain = logits_of(model), plain_model(folder)
    assert (logits_of(plain) - expected).abs().max() > 0.1
    for opened in (PeftModel.from_pretrained(plain, out), AutoModelForCausalLM.from_pretrained(out),
                   model_source(str(out)).load("auto")):
        torch.testing.assert_close(logits_of(opened), expected, rtol=1e-4, atol=1e-4)


def adapted_in_place(model: nn.Module, train: dict) -> torch.optim.Optimizer:
    """The reference loop's optimizer of a model with peft's layers, which begin as a run's of seed
    0: inside of a module that peft does not know as a mixture."""
    peft.inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=LORA["alpha"],
                   target_modules=[f"shell.{name}" for name in linear_layers(model)]),
        nn.ModuleDict({"shell": model}))
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = initial_value(name, parameter.shape, 0)
    return reference_adamw(model, train)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_it_trains_as_plain_torch_resumes_and_is_exported_merged(
        family, shared_model, instructions_file, tmp_path, capfd):
    student, teacher = save_tiny(family, tmp_path / "student"), shared_model("llama", 1)
    run, merged = tmp_path / "run", tmp_path / "merged"
    rows = {"path": str(instructions_file), "prompt": "prompt", "response": "response"}
    recipe = write_recipe(
        tmp_path / "r.yaml", student, teacher, instructions_file, run, train__eps=EPS,
        student__lora=LORA, student__router_aux_loss=0, data__isolate_documents=False,
        data__prepared=str(tmp_path / "data"), data__eval=[{**rows, "name": "rows"}],
        checkpoint__every=3, deepspeed=str(write_gathering_config(tmp_path)))
    run_ranks(2, "train", recipe)
    whole = comparable_metrics(run)
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    shutil.rmtree(run / "model")
    assert "resumed after step 3" in run_ranks(2, "train", recipe).output()
    truth = reference_loop(student, teacher, yaml.safe_load(recipe.read_text()),
                           tmp_path / "data", adapted_in_place)
    assert_trains_as(truth, run)
    assert comparable_metrics(run) == whole
    assert main(["export", str(run), str(merged), "--merge"]) == 0
    adapted = PeftModel.from_pretrained(plain_model(student), run / "model")
    torch.testing.assert_close(logits_of(adapted), logits_of(plain_model(Path(merged))),
                               rtol=1e-5, atol=1e-5)
    capfd.readouterr()
    assert main(["eval", str(merged), "--data", str(instructions_file), "--seq-length", "24",
                 "--seeds", "0", "--json"]) == 0
    score = json.loads(capfd.readouterr().out.splitlines()[-1])
    engine = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert score["loss"] == pytest.approx(engine["loss"], rel=1e-5)
