"""The language part of a multimodal checkpoint trains, teaches and is read as a model by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.families import save_tiny
from support.ranks import run_ranks
from support.reference_loop import reference_loop
from support.runs import (
    BIN,
    comparable_metrics,
    rank_environment,
    read_metrics,
    write_recipe,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3ForConditionalGeneration,
)

from amid_ds.cli import main
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


@pytest.mark.parametrize("family", [
    family if family in ("gemma3", "qwen3_5", "llama4", "qwen2_5_vl")
    else pytest.param(family, marks=pytest.mark.slow) for family in PARTS])
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


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and of those in it."""
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*") if file.is_file()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors")
            for name, tensor in load_file(file).items()}


def assert_only_language_differs(out: Path, original: Path, is_language) -> None:
    """Equal headers, other files and other tensors; every language tensor is another."""
    found, kept = contents(out), contents(original)
    assert found.keys() == kept.keys()
    for name, content in kept.items():
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(content[:8], "little")
            assert len(found[name]) == len(content) and found[name][:end] == content[:end]
        else:
            assert found[name] == content, name
    after, before = tensors_of(out), tensors_of(original)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != is_language(name), name


def test_into_puts_the_run_into_a_copy_of_its_folder_and_leaves_every_other_byte(run, pair,
                                                                                 tmp_path, capsys):
    original = tmp_path / "original"
    shutil.copytree(pair[0], original)
    (original / "preprocessor_config.json").write_text('{"any": 1}')
    (original / "more").mkdir()
    (original / "more" / "note.bin").write_bytes(bytes(range(256)))
    # As where models lie that all may read.
    for folder in (original / "more", original):
        folder.chmod(0o555)
    assert main(["export", str(run), str(tmp_path / "out"), "--into", str(original)]) == 0
    assert_only_language_differs(tmp_path / "out", original,
                                 lambda name: "language_model" in name or "lm_head" in name)
    assert all(entry.stat().st_mode & 0o200
               for entry in (tmp_path / "out", *(tmp_path / "out").rglob("*")))
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(whole) is Gemma3ForConditionalGeneration
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    part = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of_whole(whole), part(input_ids=IDS).logits,
                                   rtol=0, atol=0)
    # Of an earlier checkpoint, and not over what is there.
    assert main(["export", str(run), str(tmp_path / "out"), "--into", str(original)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_into_refuses_what_the_student_did_not_come_from(run, pair, tmp_path, capsys, shared_model):
    wider = save_tiny("gemma3", tmp_path / "wider", intermediate_size=80)
    scaled = save_tiny("gemma3", tmp_path / "scaled", query_pre_attn_scalar=16)
    for original, named in ((wider, "model.layers.0.mlp.down_proj.weight [32, 64], there [32, 80]"),
                            (scaled, "query_pre_attn_scalar 32, there 16"),
                            (pair[1], "is not the language part of"),
                            (shared_model("llama"), "is not multimodal"),
                            (tmp_path / "nowhere", "is no model's folder")):
        assert main(["export", str(run), str(tmp_path / "out"), "--into", str(original)]) == 2
        message = capsys.readouterr().err
        assert named in message and "Traceback" not in message
        assert not (tmp_path / "out").exists()
    argv = ["export", str(run), "--into", str(pair[0])]
    for more, named in (([str(tmp_path / "out"), "--merge"], "has no adapters"),
                        ([str(run / "checkpoints" / "out")], "is inside")):
        assert main([*argv, *more]) == 2
        assert named in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_resumes_and_teaches_and_begins_another_run(run, pair, instructions_file, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step_00000006")
    (again / "checkpoints" / "latest").write_text("step_00000003")
    run_ranks(2, "train", run.parent / "r.yaml", f"output_dir={again}")
    assert comparable_metrics(again) == comparable_metrics(run)
    recipe = write_recipe(tmp_path / "next.yaml", run, run / "model", instructions_file,
                          tmp_path / "next", train__steps=1)
    run_ranks(2, "train", recipe)
    # The student begins as its teacher is.
    assert read_metrics(tmp_path / "next")[0]["kd_loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_models_that_every_rank_holds_whole_train_alike(run, pair, instructions_file, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", *pair, instructions_file, tmp_path / "whole",
                          deepspeed="ds_configs/zero1_fp32.json", teacher__placement="replicated",
                          data__prepared=str(run.parent / "data"))
    run_ranks(2, "train", recipe)
    for line, true in zip(read_metrics(tmp_path / "whole"), read_metrics(run), strict=True):
        assert line["loss"] == pytest.approx(true["loss"], rel=1e-5)


@pytest.mark.slow
def test_adapters_are_merged_into_the_original(pair, instructions_file, tmp_path, capsys):
    recipe = write_recipe(
        tmp_path / "r.yaml", *pair, instructions_file, tmp_path / "run", train__steps=2,
        student__lora={"rank": 4, "targets": ["q_proj", "down_proj"]},
        deepspeed="ds_configs/zero3.json", teacher__placement="replicated")
    run_ranks(2, "train", recipe)
    argv = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--into", str(pair[0])]
    assert main(argv) == 2
    assert "add --merge" in capsys.readouterr().err
    # The adapters alone open on the text model of their base; stdout is the JSON's alone.
    evaluated = subprocess.run(
        [BIN / "amid-ds", "eval", tmp_path / "run" / "model", "--data", instructions_file,
         "--json"], capture_output=True, text=True, env=rank_environment(), check=True)
    assert json.loads(evaluated.stdout)["loss"] > 0
    assert "is multimodal" in evaluated.stderr
    assert main([*argv, "--merge"]) == 0
    assert_only_language_differs(tmp_path / "out", pair[0], lambda name: any(
        target in name and "language" in name for target in ("q_proj", "down_proj")))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--merge",
                 "--dtype", "fp32"]) == 0
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of_whole(whole), part(input_ids=IDS).logits,
                                   rtol=0, atol=0)
