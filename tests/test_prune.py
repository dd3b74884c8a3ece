"""`amid-ds prune`: planted dead parts go and nothing else, on any number of ranks; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.data import write_texts
from support.models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.cli import main

FAMILIES = ["llama", "llama-tied", "qwen2-tied", "qwen3", "mistral", "gemma", "gemma2", "gemma3",
            "gpt2"]
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=8,
             num_key_value_heads=4, head_dim=8)
GPT2_SIZES = dict(n_embd=32, n_inner=48, n_layer=4, n_head=8)
# By layer, of the teacher.
LAYERS, CHANNELS, NEURONS, GROUPS = [0, 3], [0, 5, 31, 12, 7, 20, 21, 22], [3, 47, 0], [1, 3]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "rows.jsonl", rows=30)


def teacher(folder: Path, family: str, **changes) -> Path:
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    if family in ("gemma2", "gemma3"):
        changes["layer_types"] = ["sliding_attention", "full_attention", "full_attention",
                                  "sliding_attention"]
    model = make_model(folder, family, **{**sizes, **changes})
    loaded = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in loaded.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    loaded.save_pretrained(model)
    return model


def plant(folder: Path, layers=(), channels=(), neurons=(), groups=()) -> None:
    """Kill parts of a model, in the middle of what stays alive. Neurons and groups of each layer
    differ: they are moved on by the layer's number."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    gpt2 = model.config.model_type == "gpt2"
    weights = dict(model.named_parameters())
    channels = list(channels)
    for name, weight in weights.items():
        # Writers of the hidden states, as [what they read, hidden].
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            view = weight.data.T
        elif name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "c_proj.weight",
                            "c_proj.bias")):
            view = weight.data
        else:
            continue
        view[..., channels] = 0
        if gpt2:
            # What is 0 is the mean, which a LayerNorm takes away.
            alive = [c for c in range(model.config.hidden_size) if c not in channels]
            view[..., alive] -= view[..., alive].mean(-1, keepdim=True)
    for layer in range(model.config.num_hidden_layers):
        prefix = f"transformer.h.{layer}." if gpt2 else f"model.layers.{layer}."
        out = weights[prefix + ("attn.c_proj.weight" if gpt2 else "self_attn.o_proj.weight")].data
        down = weights[prefix + ("mlp.c_proj.weight" if gpt2 else "mlp.down_proj.weight")].data
        out, down = (out, down) if gpt2 else (out.T, down.T)
        if layer in layers:
            out.zero_()
            down.zero_()
            if gpt2:
                weights[prefix + "attn.c_proj.bias"].data.zero_()
                weights[prefix + "mlp.c_proj.bias"].data.zero_()
        for neuron in dead_neurons(neurons, layer):
            if gpt2 or neuron % 2:
                down[neuron] = 0
            else:
                weights[prefix + "mlp.up_proj.weight"].data[neuron] = 0
        width = 4 if gpt2 else 16
        for group in dead_groups(groups, layer):
            out[group * width:(group + 1) * width] = 0
    if gpt2 and channels:
        for name, weight in weights.items():
            if ".ln_" in name and name.endswith("bias"):
                weight.data[channels] = 0
    model.save_pretrained(folder)


def dead_neurons(neurons, layer: int) -> list[int]:
    return sorted((neuron + layer) % 48 for neuron in neurons)


def dead_groups(groups, layer: int) -> list[int]:
    return sorted((group + layer) % 4 for group in groups)


def prune(model: Path, out: Path, *options: object) -> Path:
    assert main(["prune", str(model), str(out), *map(str, options)]) == 0
    return out


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(20, (3, 24), generator=torch.Generator().manual_seed(5))
    return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_dead_parts_go_and_the_logits_stay(family, texts, tmp_path):
    model = teacher(tmp_path / "teacher", family)
    plant(model, LAYERS, CHANNELS, NEURONS, GROUPS)
    before = logits(model)
    heads = 6 if family == "gpt2" else 4
    if family == "gpt2":
        # A head is its own group here, and hidden states are as wide as all heads.
        plant(model, groups=GROUPS)
        before = logits(model)
    out = prune(model, tmp_path / "student", "--layers", 2, "--hidden", 24, "--intermediate", 45,
                "--heads", heads, "--data", texts)
    torch.testing.assert_close(logits(out), before, rtol=2e-5, atol=2e-5)
