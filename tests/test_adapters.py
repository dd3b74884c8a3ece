"""What leaves a run that trains in part: checkpoints, adapter folders, merged and whole models."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.ranks import Ranks, run_ranks
from support.runs import comparable_metrics, read_metrics, write_recipe
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from amid_ds.checkpoint import adapter_export, whole_student
from amid_ds.checkpoint.manifest import list_checkpoints
from amid_ds.checkpoint.whole_student import FrozenWeights, WholeStudent
from amid_ds.checkpoint.zero_shards import trained_shapes
from amid_ds.cli import main
from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.config.recipe import Lora, Student
from amid_ds.models.adapter_folders import model_source
from amid_ds.models.loading import meta_model
from amid_ds.models.trained import choose_trained
from amid_ds.planning.devices import Device, find_device
from amid_ds.planning.plan import make_plan

LORA = {"rank": 2, "alpha": 6.0}
SIZES = {"hidden_size": 64, "intermediate_size": 128}
# The adapters' elements: 2 layers, each of 7 matrices [out, in] with 2 · (out + in).
TRAINED = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
# Of a checkpoint's files beside the numbers: names, shapes, DeepSpeed's config.
OVERHEAD = 64_000


@pytest.fixture(scope="module")
def student(shared_model) -> Path:
    """Its head is its embedding."""
    return shared_model("llama-tied", 0, **SIZES)


@pytest.fixture(scope="module")
def recipe_for(student, shared_model, instructions_file,
               tmp_path_factory) -> Callable[..., Path]:
    """recipe_for(run, stage, **changes): 6 steps, a checkpoint after 3, an evaluation at the end.
    """
    root = tmp_path_factory.mktemp("recipes")

    def write(run: Path, stage: int = 3, **changes) -> Path:
        gathers = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        config = root / f"zero{stage}.json"
        config.write_text(json.dumps({"bf16": {"enabled": False},
                                      "zero_optimization": {"stage": stage, **gathers}}))
        rows = {"path": str(instructions_file), "prompt": "prompt", "response": "response"}
        settings = {"data__prepared": str(root / "data"), "checkpoint__every": 3,
                    "data__eval": [{**rows, "name": "rows"}], "deepspeed": str(config), **changes}
        return write_recipe(run.with_suffix(".yaml"), student, shared_model("llama", 1),
                            instructions_file, run, **settings)
    return write


@pytest.fixture(scope="module")
def lora_run(recipe_for, tmp_path_factory) -> Path:
    """A finished run with adapters, of two ranks at ZeRO stage 3."""
    run = tmp_path_factory.mktemp("lora") / "run"
    run_ranks(2, "train", recipe_for(run, student__lora=LORA))
    return run


@pytest.fixture(scope="module")
def merged(lora_run, tmp_path_factory) -> Path:
    """The run's whole model."""
    out = tmp_path_factory.mktemp("merged") / "model"
    assert main(["export", str(lora_run), str(out), "--merge"]) == 0
    return out


@pytest.fixture(scope="module")
def frozen_run(recipe_for, tmp_path_factory) -> Path:
    """A finished run that trains its second layer and the last norm alone, at ZeRO stage 2."""
    run = tmp_path_factory.mktemp("frozen") / "run"
    run_ranks(2, "train", recipe_for(run, 2, student__freeze=["embed_tokens", "layers.0.*"]))
    return run


def copy_at_step_3(run: Path, to: Path) -> Path:
    """The run as it was after its third step, in another folder."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("step_00000006", "model"))
    return to


def numbers_of(checkpoint: Path) -> list[Tensor]:
    """Every tensor of a checkpoint's files, in their order."""
    from amid_ds.engine.backend import import_deepspeed
    from amid_ds.engine.staging import tensors_in

    import_deepspeed()
    return [tensor for path in sorted(checkpoint.glob("*states.pt"))
            for tensor in tensors_in(torch.load(path, weights_only=False))]


@torch.no_grad()
def logits_of(model) -> Tensor:
    return model.eval()(input_ids=torch.arange(3, 27)[None]).logits


def evaluated(model: Path, instructions_file: Path, capfd) -> dict:
    assert main(["eval", str(model), "--data", str(instructions_file), "--seq-length", "24",
                 "--seeds", "0", "--json"]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_a_checkpoint_takes_bytes_for_the_adapters_and_none_for_the_base(lora_run, recipe_for):
    whole = sum(file.stat().st_size for file in (lora_run / "checkpoints").rglob("step_*/*.pt")) / 2
    # fp32 weights and two moments, and a step's count for each rank.
    numbers = [sum(tensor.numel() for tensor in numbers_of(path) if tensor.numel() > 1)
               for path in list_checkpoints(lora_run / "checkpoints")]
    assert numbers == [3 * TRAINED] * 2
    assert 12 * TRAINED < whole < 12 * TRAINED + OVERHEAD
    plan = make_plan(load_recipe(lora_run / "recipe.yaml"), 1, 2, find_device("cpu", 2))
    assert plan.checkpoint_bytes == 12 * TRAINED
    assert plan.parameters["trained"] == TRAINED


def test_a_frozen_tied_weight_is_in_the_checkpoint_under_neither_name(frozen_run):
    plan = make_plan(load_recipe(frozen_run / "recipe.yaml"), 1, 2, find_device("cpu", 2))
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert plan.parameters["trained"] == layer + 64
    for path in list_checkpoints(frozen_run / "checkpoints"):
        files = [torch.load(file, weights_only=False) for file in path.glob("mp*states.pt")]
        held = {name: tensor.numel() for file in files for name, tensor in file["module"].items()
                if tensor.numel()}
        assert sum(held.values()) == layer + 64
        assert all("layers.1." in name or name == "student.model.norm.weight" for name in held)


@pytest.mark.parametrize("which", ["lora_run", "frozen_run"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_digit(which, request, recipe_for,
                                                                  tmp_path):
    run = request.getfixturevalue(which)
    again = copy_at_step_3(run, tmp_path / "run")
    recipe = load_recipe(run / "recipe.yaml")
    run_ranks(2, "train", recipe_for(again, 3 if which == "lora_run" else 2, student__lora=(
        LORA if which == "lora_run" else None), student__freeze=recipe.student.freeze))
    assert comparable_metrics(again) == comparable_metrics(run)
    last, expected = (numbers_of(list_checkpoints(each / "checkpoints")[-1])
                      for each in (again, run))
    assert len(last) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(last, expected, strict=True))


@pytest.mark.parametrize(("ranks", "tp", "stage"), [
    (2, 2, 2), *(pytest.param(*layout, marks=pytest.mark.slow) for layout in (
        (1, 1, 3), (1, 1, 2), (4, 2, 3), (2, 1, 1), (2, 1, 0), (4, 2, 0)))])
def test_adapters_resume_in_another_layout(lora_run, recipe_for, tmp_path, ranks, tp, stage):
    again = copy_at_step_3(lora_run, tmp_path / "run")
    recipe = recipe_for(again, stage, student__lora=LORA, tensor_parallel=tp)
    assert "converting it once" in run_ranks(ranks, "train", recipe).output()
    whole = list_checkpoints(again / "checkpoints")[0] / "whole"
    assert all("lora_" in file.name for file in whole.glob("*.pt"))
    for ours, theirs in zip(read_metrics(again), read_metrics(lora_run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_peft_opens_the_run_and_gives_the_merged_models_and_the_engines_own_numbers(
        lora_run, merged, student, instructions_file, capfd):
    base = AutoModelForCausalLM.from_pretrained(student)
    before = logits_of(base)
    adapted = logits_of(PeftModel.from_pretrained(base, lora_run / "model"))
    whole = logits_of(AutoModelForCausalLM.from_pretrained(merged))
    assert (whole - before).abs().max() > 0.1
    torch.testing.assert_close(adapted, whole, rtol=1e-5, atol=1e-5)
    # transformers opens it too, and so do our own commands.
    opened = AutoModelForCausalLM.from_pretrained(lora_run / "model")
    torch.testing.assert_close(logits_of(opened), whole, rtol=1e-5, atol=1e-5)
    scores = [evaluated(path, instructions_file, capfd) for path in (lora_run / "model", merged)]
    assert scores[0].keys() == scores[1].keys()
    for name, score in scores[0].items():
        expected = scores[1][name]
        assert score == (expected and pytest.approx(expected, rel=1e-5)), name
    engine = json.loads((lora_run / "eval.jsonl").read_text().splitlines()[-1])
    assert engine["step"] == 6
    assert scores[0]["loss"] == pytest.approx(engine["loss"], rel=1e-5)


class DrawnShards:
    """In the place of a checkpoint: numbers that follow from a parameter's name."""

    def __init__(self, checkpoint: Path, shapes: dict[str, torch.Size]) -> None:
        self.shapes = shapes

    def whole(self, name: str, kind: str = "fp32") -> Tensor:
        draw = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.randn(self.shapes[name], generator=draw) * 0.1


@pytest.mark.parametrize(("family", "lora"), [
    ("gpt2", {}), ("llama", {"targets": ["o_proj", "lm_head"]}),
    ("llama-tied", {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("qwen3", {"targets": ["down_proj"], "modules_to_save": ["lm_head", "norm"]})])
def test_merged_weights_are_pefts_of_weights_either_way_round_and_of_modules_that_train_whole(
        family, lora, shared_model, tmp_path, monkeypatch):
    folder = shared_model(family, 0)
    student = Student(model=str(folder), lora=Lora(rank=4, alpha=6.0, **lora))
    trained, plain = meta_model(str(folder)), meta_model(str(folder))
    choose_trained(trained, student)
    for module in (adapter_export, whole_student):
        monkeypatch.setattr(module, "ZeroShards", DrawnShards)
    adapter_export.write_adapter(tmp_path, trained_shapes(trained), torch.float32, plain, student,
                                 tmp_path)
    weights = WholeStudent(tmp_path, trained, FrozenWeights(student), torch.float32).open()
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits_of(model)
    model.load_state_dict({name: weights.whole(name, parameter.shape)
                           for name, parameter in plain.named_parameters()}, strict=False)
    merged = logits_of(model)
    assert (merged - before).abs().max() > 0.1
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    for other in (theirs, model_source(str(tmp_path)).load("auto")):
        torch.testing.assert_close(logits_of(other), merged, rtol=1e-5, atol=1e-5)


def test_a_merged_model_has_the_bases_bytes_but_for_what_adapters_change(merged, student):
    ours, base = (load_file(folder / "model.safetensors") for folder in (merged, student))
    assert ours.keys() == base.keys()
    changed = {name for name in base if not torch.equal(ours[name], base[name])}
    assert changed == {name for name in base if "_proj." in name}


def test_generate_answers_with_adapters_as_with_the_merged_model(lora_run, merged,
                                                                 instructions_file, tmp_path):
    answers = []
    for number, model in enumerate((lora_run / "model", merged)):
        out = tmp_path / f"{number}.jsonl"
        assert main(["generate", str(model), "--prompts", str(instructions_file), "--out", str(out),
                     "--max-new-tokens", "8"]) == 0
        answers.append(out.read_text())
    assert answers[0] == answers[1]
    made = json.loads((tmp_path / "0.jsonl.made").read_text())
    assert made["model"] == str(lora_run / "model") and made["base.sha256"]


def test_a_frozen_run_leaves_a_whole_model_with_the_bases_bytes(frozen_run, student):
    ours, base = (load_file(folder / "model.safetensors")
                  for folder in (frozen_run / "model", student))
    assert ours.keys() == base.keys()
    same = {name for name in base if torch.equal(ours[name], base[name])}
    assert same == {name for name in base if "layers.0." in name or "embed" in name}


def test_a_run_begins_with_the_merged_weights_of_a_run_with_adapters(lora_run, merged, recipe_for,
                                                                     tmp_path):
    run_ranks(1, "train", recipe_for(tmp_path / "run", student__model=str(lora_run),
                                     student__freeze=["embed_tokens"], train__steps=1))
    start, expected = (load_file(folder / "model.safetensors")
                       for folder in (tmp_path / "run" / "start", merged))
    assert start.keys() == expected.keys()
    assert all(torch.equal(start[name], expected[name]) for name in expected)
    # The frozen part of it is read from there.
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(model["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_another_base_than_the_run_began_with_is_refused_by_both_hashes(lora_run, recipe_for,
                                                                        student, tmp_path, capfd):
    base = shutil.copytree(student, tmp_path / "base")
    again = copy_at_step_3(lora_run, tmp_path / "run")
    recipe = recipe_for(again, student__lora=LORA, student__model=str(base),
                        checkpoint__allow_change=["student.model"])
    text = (again / "recipe.yaml").read_text().replace(str(student), str(base))
    (again / "recipe.yaml").write_text(text)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((lora_run / "provenance.json").read_text())["student"]
    refused = Ranks(1, "train", recipe)
    assert refused.wait() == [2]
    assert f"student.sha256: '{facts['files_sha256']}' before, '" in refused.output()
    assert main(["export", str(again), str(tmp_path / "out"), "--merge"]) == 2
    assert f"hash was {facts['files_sha256']} and is " in capfd.readouterr().err
    # The adapters are the run's, whatever became of the base.
    assert main(["export", str(again), str(tmp_path / "out")]) == 0
    shutil.rmtree(base)
    assert main(["export", str(again), str(tmp_path / "whole"), "--merge"]) == 2
    assert "is not there" in capfd.readouterr().err


def test_bad_adapter_folders_and_wrong_merges_are_refused_by_name(
        lora_run, frozen_run, recipe_for, instructions_file, shared_model, tmp_path, capfd):
    def refusal(*command: object) -> str:
        assert main([str(each) for each in command]) == 2, command
        return capfd.readouterr().err

    assert "no adapters" in refusal("export", frozen_run, tmp_path / "out", "--merge")
    assert not (tmp_path / "out").exists()
    model = lora_run / "model"
    for key in ("student__model", "teacher__model"):
        text = refusal("plan", recipe_for(tmp_path / "r", **{key: str(model)}))
        assert f"{model} holds adapters" in text and "export RUN OUT --merge" in text
    broken = shutil.copytree(model, tmp_path / "broken")
    config = json.loads((broken / "adapter_config.json").read_text())
    for base, expected in ((tmp_path / "gone", "which is not there"),
                           (shared_model("llama", 0), "do not fit the model")):
        changed = {**config, "base_model_name_or_path": str(base)}
        (broken / "adapter_config.json").write_text(json.dumps(changed))
        text = refusal("eval", broken, "--data", instructions_file)
        assert expected in text and str(base) in text
    (broken / "adapter_config.json").write_text("{}")
    assert "base_model_name_or_path" in refusal("eval", broken, "--data", instructions_file)


def test_no_leave_changes_what_trains(lora_run, recipe_for, tmp_path):
    again = copy_at_step_3(lora_run, tmp_path / "run")
    for lora in (None, {**LORA, "rank": 4, "alpha": 7.0}):
        refused = Ranks(1, "train", recipe_for(again, student__lora=lora,
                                               checkpoint__allow_change=["student"]))
        assert refused.wait() == [2]
        assert "student.lora.rank: 2 before" in refused.output()
        # An earlier checkpoint would be exported at the scale of the new one.
        assert "student.lora.alpha: 6.0 before" in refused.output()
    # Nor do adapters of default values come to a run without any.
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe_for(plain))))
    refused = Ranks(1, "train", recipe_for(plain, student__lora={}))
    assert refused.wait() == [2]
    assert "student.lora.rank: None before, 16 now" in refused.output()


def test_a_plan_has_no_weight_gradients_of_the_base_and_lora_is_a_remedy(
        shared_folder, instructions_file, tmp_path):
    def save(folder: Path) -> None:
        LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
                    num_attention_heads=8, num_key_value_heads=8, vocab_size=32000,
                    tie_word_embeddings=False, dtype="bfloat16",
                    architectures=["LlamaForCausalLM"]).save_pretrained(folder)

    config = shared_folder("config", save)
    recipe = write_recipe(tmp_path / "r.yaml", config, config, instructions_file, tmp_path / "run",
                          train__seq_length=2048, train__global_batch_size=1,
                          deepspeed="ds_configs/zero3.json")
    lora = ["student.lora.rank=16"]
    whole, part = (make_plan(load_recipe(recipe, keys), 1, 1, Device("one", 80e9, 1e15, 5e10, 5e10))
                   for keys in ([], lora))
    body, head = 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096), 32000 * 1024
    adapters = 8 * 16 * (4 * 2 * 1024 + 3 * (1024 + 4096))
    attention = 8 * 2 * 1024 * 2048
    assert whole.flops_per_step["student"] == pytest.approx(
        3 * 2048 * (2 * body + 2 * head + attention), rel=1e-3)
    # Forward, and backward to the inputs: not to those of the first q, k and v, nor of their A.
    first = 3 * (1024 * 1024 + 16 * 1024)
    assert part.flops_per_step["student"] == pytest.approx(2048 * (
        2 * (2 * body + 2 * head) + 3 * 2 * adapters + 3 * attention - 2 * first), rel=1e-3)
    frozen = whole.parameters["trained"]
    assert part.parameters == {"trained": adapters, "frozen": frozen,
                               **dict.fromkeys(("held", "active"), adapters + frozen)}
    assert part.checkpoint_bytes == adapters * 14
    # bf16 weights, fp32 masters and moments; gradients as before.
    assert part.memory_per_rank["optimizer"] == 12 * adapters
    little = Device("little", part.memory_per_rank["total"] / 0.9, 1e15, 5e10, 5e10)
    remedies = make_plan(load_recipe(recipe), 1, 1, little).remedies
    assert any(remedy.startswith(f"{lora[0]}:") for remedy in remedies)
    # Not where the recipe would be refused.
    remedies = make_plan(load_recipe(recipe, ["teacher=null", "teacher={ema: 0.9}"]), 1, 1,
                         little).remedies
    assert remedies and not any(lora[0] in remedy for remedy in remedies)


def test_a_missing_peft_is_named_before_anything_loads(lora_run, instructions_file, recipe_for,
                                                       tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "peft", None)
    recipe = recipe_for(tmp_path / "run", student__lora=LORA)
    assert main(["doctor", str(recipe)]) == 1
    assert "student.lora, and peft is not installed; pip install" in capfd.readouterr().out
    monkeypatch.setattr("amid_ds.models.adapter_folders.load_causal_lm", None)
    monkeypatch.setattr("amid_ds.models.weight_reader.WeightReader.fill", None)
    model, out = str(lora_run / "model"), str(tmp_path / "out")
    for command in (["train", str(recipe)], ["eval", model, "--data", str(instructions_file)],
                    ["generate", model, "--prompts", str(instructions_file), "--out", out],
                    ["export", str(lora_run), out], ["export", str(lora_run), out, "--merge"]):
        assert main(command) == 2
        assert "pip install 'amid-ds[lora]'" in capfd.readouterr().err
        assert not Path(out).exists()
