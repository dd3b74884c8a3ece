"""What `student.freeze` names stays as it was, and the rest trains as plain torch does."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from support.lora import EPS, assert_trains_as, write_stage_config
from support.patches import rank_without_compiler
from support.ranks import run_ranks
from support.reference_loop import reference_adamw, reference_loop
from support.reference_muon import ReferenceMuon
from support.runs import write_recipe
from torch import nn

from amid_ds import AMiD, linear_amid_loss
from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Student
from amid_ds.errors import InputError
from amid_ds.losses import lm_head
from amid_ds.models.loading import meta_model
from amid_ds.models.trained import choose_trained
from amid_ds.training.job import check_recipe


def freezing(*parts: str):
    """A maker of the reference loop's optimizer that first freezes what has one of these parts."""
    def make(model: nn.Module, train: dict) -> torch.optim.Optimizer:
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.requires_grad_(False)
        return reference_adamw(model, train)

    return make


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("family", "patterns", "parts", "ranks", "tensor_parallel", "stage"), [
    ("llama", ["embed_tokens", "layers.0.*"], ["embed_tokens", "layers.0."], 2, 1, 3),
    slow("llama", ["embed_tokens", "layers.0.*"], ["embed_tokens", "layers.0."], 1, 1, 0),
    slow("llama", ["lm_head", "model.norm*"], ["lm_head", "model.norm"], 2, 2, 3),
    # No gradient comes back through the body.
    slow("llama", ["model"], ["model."], 2, 1, 3),
    # The head is the embedding.
    slow("qwen2-tied", ["lm_head", "*bias"], ["embed_tokens", "bias"], 2, 1, 2),
    slow("qwen2-tied", ["lm_head", "*bias"], ["embed_tokens", "bias"], 2, 2, 3),
    # Their norms are on split heads: one trains, one does not.
    slow("qwen3", ["layers.1.self_attn", "embed_tokens"], ["layers.1.self_attn", "embed_tokens"],
         2, 2, 3)])
def test_all_but_the_frozen_trains_as_plain_torch_does(shared_model, llama_pair, instructions_file,
                                                       tmp_path, family, patterns, parts, ranks,
                                                       tensor_parallel, stage):
    pair = shared_model(family, 0), llama_pair[1]
    recipe = write_recipe(
        tmp_path / "r.yaml", *pair, instructions_file, tmp_path / "run",
        student__freeze=patterns, train__eps=EPS, tensor_parallel=tensor_parallel,
        data__prepared=str(tmp_path / "data"), data__isolate_documents=False,
        deepspeed=write_stage_config(tmp_path, stage))
    run_ranks(ranks, "train", recipe)
    truth = reference_loop(*pair, yaml.safe_load(recipe.read_text()), tmp_path / "data",
                           freezing(*parts))
    assert_trains_as(truth, tmp_path / "run")
    groups = json.loads((tmp_path / "run" / "provenance.json").read_text())["optimizer"]["groups"]
    frozen = {name: weight for name, weight in truth[1].items()
              if any(part in name for part in parts)}
    assert groups["frozen"] == {"tensors": len(frozen),
                                "elements": sum(weight.numel() for weight in frozen.values())}
    assert sum(group["tensors"] for group in groups.values()) == len(truth[1])


class FrozenMuon(ReferenceMuon):
    """That of a model whose embedding and first layer are frozen."""

    def __init__(self, model: nn.Module, train: dict) -> None:
        freezing("embed_tokens", "layers.0.")(model, train)
        super().__init__(model, train)
        self.of_muon["params"] = [each for each in self.of_muon["params"] if each.requires_grad]


@pytest.mark.slow
def test_muon_steps_what_is_not_frozen(llama_pair, instructions_file, tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
        student__freeze=["embed_tokens", "layers.0.*"], train__eps=EPS, train__optimizer="muon",
        train__muon={"learning_rate": 0.01, "momentum": 0.95}, train__weight_decay=0.1,
        data__prepared=str(tmp_path / "data"), data__isolate_documents=False,
        deepspeed=write_stage_config(tmp_path, 3))
    run_ranks(2, "train", recipe, target=rank_without_compiler)
    assert_trains_as(reference_loop(*llama_pair, yaml.safe_load(recipe.read_text()),
                                    tmp_path / "data", FrozenMuon), tmp_path / "run")


def test_a_frozen_heads_gradient_is_never_made(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, teacher, weight, wide = (torch.randn(*shape, generator=generator) for shape in
                                     ((5, 8), (5, 12), (32, 8), (32, 12)))

    def gradient_of_hidden(trains: bool) -> torch.Tensor:
        own = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_(trains)
        linear_amid_loss(own, head, teacher, wide, AMiD(alpha=0.5, lam=0.3),
                         token_weights=torch.ones(5)).loss.backward()
        assert (head.grad is not None) == trains and own.grad is not None
        return own.grad

    expected = gradient_of_hidden(True)
    monkeypatch.setattr(lm_head, "_add_product", None)
    torch.testing.assert_close(gradient_of_hidden(False), expected, rtol=0, atol=0)


# --- patterns ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("family", "patterns", "prefixes"), [
    ("llama", ["embed_tokens"], ["model.embed_tokens."]),
    ("llama", ["model.embed_tokens*"], ["model.embed_tokens."]),
    ("llama", ["model.embed_tokens.weight", "lm_head"], ["model.embed_tokens.", "lm_head."]),
    ("llama", ["layers.1"], ["model.layers.1."]),
    ("llama", ["layers.1.*"], ["model.layers.1."]),
    ("llama", ["model.layers.[0-1].mlp"], ["model.layers.0.mlp.", "model.layers.1.mlp."]),
    ("llama", ["*.up_proj.weight"], ["model.layers.0.mlp.up_proj.", "model.layers.1.mlp.up_proj."]),
    # One weight under two names.
    ("llama-tied", ["lm_head"], ["model.embed_tokens."])])
def test_a_pattern_is_of_whole_parts_of_a_name(shared_model, family, patterns, prefixes):
    folder = str(shared_model(family, 0))
    model = meta_model(folder)
    choose_trained(model, Student(model=folder, freeze=patterns))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters()
                      if name.startswith(tuple(prefixes))} != set()


@pytest.mark.parametrize(("patterns", "words"), [
    (["wte"], ["'wte'", "names no parameter", "model.embed_tokens.weight"]),
    # A part of a part, and a layer that is not there.
    (["norm", "embed"], ["'embed'", "names no parameter"]),
    (["layers.2"], ["'layers.2'", "names no parameter"]),
    (["model", "lm_head"], ["names every parameter", "something to train"])])
def test_patterns_that_name_nothing_or_all_are_refused_before_a_weight_is_read(
        llama_pair, instructions_file, tmp_path, monkeypatch, patterns, words):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                          student__freeze=patterns)
    monkeypatch.setattr("amid_ds.models.weight_reader.WeightReader.fill", None)
    with pytest.raises(InputError) as error:
        check_recipe(load_recipe(recipe), 1)
    assert all(word in str(error.value) for word in words), error.value
