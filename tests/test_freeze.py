"""What `student.freeze` names stays as it was, and the rest trains as plain torch does."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from support.lora import EPS, assert_trains_as, without_export, write_stage_config
from support.ranks import run_ranks
from support.reference_loop import reference_adamw, reference_loop
from support.runs import write_recipe
from torch import nn


def freezing(*parts: str):
    """A maker of the reference loop's optimizer that first freezes what has one of these parts."""
    def make(model: nn.Module, train: dict) -> torch.optim.Optimizer:
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.requires_grad_(False)
        return reference_adamw(model, train)

    return make


@pytest.mark.parametrize(("family", "patterns", "parts", "ranks", "tensor_parallel", "stage"), [
    ("llama", ["embed_tokens", "layers.0.*"], ["embed_tokens", "layers.0."], 2, 1, 3),
    ("llama", ["embed_tokens", "layers.0.*"], ["embed_tokens", "layers.0."], 1, 1, 0),
    ("llama", ["lm_head", "model.norm*"], ["lm_head", "model.norm"], 2, 2, 3),
    # The head is the embedding.
    ("qwen2-tied", ["lm_head", "*bias"], ["embed_tokens", "bias"], 2, 1, 2),
    # Their norms are on split heads: one trains, one does not.
    ("qwen3", ["layers.1.self_attn", "embed_tokens"], ["layers.1.self_attn", "embed_tokens"], 2, 2,
     3)])
def test_all_but_the_frozen_trains_as_plain_torch_does(shared_model, llama_pair, instructions_file,
                                                       tmp_path, family, patterns, parts, ranks,
                                                       tensor_parallel, stage):
    pair = shared_model(family, 0), llama_pair[1]
    recipe = write_recipe(
        tmp_path / "r.yaml", *pair, instructions_file, tmp_path / "run",
        student__freeze=patterns, train__eps=EPS, tensor_parallel=tensor_parallel,
        data__prepared=str(tmp_path / "data"), data__isolate_documents=False,
        deepspeed=write_stage_config(tmp_path, stage))
    run_ranks(ranks, "train", recipe, target=without_export)
    truth = reference_loop(*pair, yaml.safe_load(recipe.read_text()), tmp_path / "data",
                           freezing(*parts))
    assert_trains_as(truth, tmp_path / "run")
    frozen = json.loads((tmp_path / "run" / "provenance.json").read_text())["optimizer"]["groups"]
    assert frozen["frozen"]["tensors"] == sum(
        any(part in name for part in parts) for name in truth[1])
