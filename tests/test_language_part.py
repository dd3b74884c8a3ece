"""The language part of a multimodal checkpoint trains, teaches and is read as a model by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from support.families import save_tiny
from support.ranks import run_ranks
from support.reference_loop import reference_loop
from support.runs import read_metrics, write_recipe
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from amid_ds.models.loading import load_causal_lm, require_supported

PARTS = {"gemma3": "Gemma3ForCausalLM", "gemma4": "Gemma4ForCausalLM",
         "qwen3_5": "Qwen3_5ForCausalLM", "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
         "llama4": "Llama4ForCausalLM", "mistral3": "MistralForCausalLM",
         "qwen2_5_vl": "Qwen2ForCausalLM", "qwen3_vl": "Qwen3ForCausalLM",
         "glm4v": "Glm4ForCausalLM"}
IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def logits_of_whole(whole: torch.nn.Module) -> torch.Tensor:
    """The multimodal model's own logits of IDS, text alone."""
    # Llama 4's wrapper asks for pictures' outputs that a text has none of (transformers 5.24).
    inner = whole.language_model if whole.config.model_type == "llama4" else whole
    with torch.no_grad():
        return inner(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", PARTS)
def test_the_language_part_gives_the_logits_of_the_whole_model(family, tmp_path):
    folder = str(save_tiny(family, tmp_path / family))
    require_supported(folder)
    part = load_causal_lm(folder, "auto").eval()
    assert type(part).__name__ == PARTS[family]
    with torch.no_grad():
        found = part(input_ids=IDS, use_cache=False).logits
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    torch.testing.assert_close(found, logits_of_whole(whole), rtol=0, atol=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    """A student that AutoModelForCausalLM opens, and a teacher that it does not."""
    root = tmp_path_factory.mktemp("multimodal")
    return [save_tiny("gemma3", root / "student"), save_tiny("mistral3", root / "teacher", seed=1)]


@pytest.fixture(scope="module")
def run(pair, instructions_file) -> Path:
    """A run of both on two ranks under ZeRO-3, with a checkpoint each second step."""
    root = pair[0].parent
    recipe = write_recipe(root / "r.yaml", *pair, instructions_file, root / "run",
                          data__prepared=str(root / "data"), checkpoint__every=3)
    ranks = run_ranks(2, "train", recipe)
    (root / "log").write_text(ranks.output())
    return root / "run"


def test_a_run_of_two_multimodal_models_is_the_plain_loop_of_their_own_classes(run, pair):
    teacher = AutoModelForImageTextToText.from_pretrained(pair[1]).eval()
    recipe = yaml.safe_load((run.parent / "r.yaml").read_text())
    lines, weights = reference_loop(
        pair[0], lambda ids: teacher(input_ids=ids).logits, recipe, run.parent / "data")
    for line, true in zip(read_metrics(run), lines, strict=True):
        assert line["loss"] == pytest.approx(true["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(true["grad_norm"], rel=1e-4)
    student = AutoModelForCausalLM.from_pretrained(run / "model")
    assert type(student).__name__ == "Gemma3ForCausalLM"
    for name, weight in student.named_parameters():
        true = weights[name.replace("model.", "model.language_model.", 1)]
        torch.testing.assert_close(weight, true, rtol=1e-4, atol=1e-5)


def test_the_start_says_once_for_each_model_what_is_read(run, pair):
    log = (run.parent / "log").read_text()
    for folder, whole, part in zip(pair, ("Gemma3", "Mistral3"), ("Gemma3", "Mistral"),
                                   strict=True):
        said = f"{folder} is multimodal ({whole}ForConditionalGeneration): its language part is "
        assert log.count(said + f"read, as {part}ForCausalLM") == 1, log
