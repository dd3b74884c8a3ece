"""A model is loaded whole or not at all, and a run's models stay those that it began with."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.hub import publish, use_cache
from support.models import make_model, make_tokenizer
from support.ranks import Ranks, rank_main, run_ranks
from support.runs import comparable_metrics, write_recipe

from amid_ds.checkpoint.export import export
from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError
from amid_ds.models.loading import load_causal_lm, require_supported
from amid_ds.training.job import check_recipe


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    """Write the weights of the model in `folder` anew, as `change` gives them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Save the model in `folder` anew, in several files with an index."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")


def shards_without(folder: Path, remove: bool) -> None:
    """Take a file of a sharded model away, or its name out of the index too."""
    shard(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gone = content["weight_map"]["model.norm.weight"]
    (folder / gone).unlink()
    if remove:
        content["weight_map"] = {name: file for name, file in content["weight_map"].items()
                                 if file != gone}
        index.write_text(json.dumps(content))


def cut(folder: Path, size: int) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(size)


def layer_more(weights: dict) -> dict:
    return {**weights, **{name.replace("layers.1", "layers.2"): tensor.clone()
                          for name, tensor in weights.items() if "layers.1" in name}}


# name -> (what is done to a Llama's folder, what the message must say).
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "one tensor missing": (
        lambda folder: rewrite(folder, lambda weights: {
            name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}),
        ["1 missing: lm_head.weight"]),
    "integers without a scale": (
        lambda folder: rewrite(folder, lambda weights: {
            **weights, "lm_head.weight": weights["lm_head.weight"].to(torch.int8)}),
        ["1 quantized, without a quantization_config: lm_head.weight I8"]),
    "all names prefixed": (
        lambda folder: rewrite(folder, lambda weights: {
            f"module.{name}": tensor for name, tensor in weights.items()}),
        ["21 missing: lm_head.weight", "21 unexpected: module.lm_head.weight", "…"]),
    "a further layer": (lambda folder: rewrite(folder, layer_more),
                        ["9 unexpected: model.layers.2.input_layernorm.weight"]),
    "another shape": (
        lambda folder: rewrite(folder, lambda weights: {
            **weights, "lm_head.weight": weights["lm_head.weight"][:5].clone()}),
        ["1 of another shape: lm_head.weight [5, 32], in the model [31, 32]"]),
    "truncated": (lambda folder: cut(folder, 20_000), ["cannot be read"]),
    "its header cut": (lambda folder: cut(folder, 100), ["cannot be read"]),
    "empty": (lambda folder: cut(folder, 0), ["cannot be read"]),
    "a shard absent": (lambda folder: shards_without(folder, remove=False), ["cannot be read"]),
    "an index without a shard": (lambda folder: shards_without(folder, remove=True),
                                 ["missing: ", "model.norm.weight"]),
    "an index that is no JSON": (
        lambda folder: (shard(folder), (folder / "model.safetensors.index.json").write_text("{")),
        ["cannot be read"]),
    "config alone": (lambda folder: (folder / "model.safetensors").unlink(), ["cannot be read"]),
    "a pickle that is none": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        ["cannot be read"]),
}


@pytest.fixture
def damaged(shared_model, tmp_path) -> Callable[[str], Path]:
    """damaged(name): a model's folder after that damage."""
    def make(name: str) -> Path:
        folder = Path(shutil.copytree(shared_model("llama", 0), tmp_path / "model"))
        DAMAGES[name][0](folder)
        return folder
    return make


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", DAMAGES)
def test_weights_that_are_not_the_models_are_named_before_anything_starts(
        name, role, damaged, shared_model, text_file, tmp_path, capsys):
    models = {"student": shared_model("llama", 0), "teacher": shared_model("llama", 1)}
    models[role] = damaged(name)
    recipe = write_recipe(tmp_path / "r.yaml", models["student"], models["teacher"], text_file,
                          tmp_path / "run")
    capsys.readouterr()
    assert main(["train", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"amid-ds: the weights of {models[role]} "), message
    assert "Traceback" not in message and "remedy:" in message and not (tmp_path / "run").exists()
    for words in DAMAGES[name][1]:
        assert words in message
    # The same of a model that was not checked before, such as one of the hub.
    with pytest.raises(InputError, match="the weights of"):
        load_causal_lm(str(models[role]), "fp32")


def test_every_command_that_reads_a_model_names_its_missing_weights(damaged, shared_model,
                                                                    text_file, tmp_path, capsys):
    model, good = str(damaged("one tensor missing")), str(shared_model("llama", 0))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the river"}\n')
    recipe = str(write_recipe(tmp_path / "r.yaml", Path(good), Path(model), text_file,
                              tmp_path / "run"))
    for argv in (["eval", model, "--data", str(text_file)],
                 ["eval", good, "--teacher", model, "--data", str(text_file)],
                 ["generate", model, "--prompts", str(prompts), "--out", str(tmp_path / "o.jsonl"),
                  "--max-new-tokens", "8"],
                 ["submit", recipe, "--dry-run", "--ranks-per-node", "1"],
                 ["doctor", recipe]):
        assert main(argv) == (1 if argv[0] == "doctor" else 2), argv
        told = capsys.readouterr()
        assert "1 missing: lm_head" in " ".join((told.err + told.out).split()), argv
        assert "Traceback" not in told.err


@pytest.mark.parametrize("pickled", [False, True])
def test_gpt2_with_the_buffers_of_old_versions_is_loaded(tmp_path, pickled):
    """As the published checkpoints of 2023 may be: a mask, its constant, the tied head, fp16."""
    folder = make_model(tmp_path / "gpt2", "gpt2")
    weights = {name: tensor.half()
               for name, tensor in load_file(folder / "model.safetensors").items()}
    old = {**weights, "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
           "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
           "lm_head.weight": weights["transformer.wte.weight"].clone()}
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(old, folder / "pytorch_model.bin")
    else:
        rewrite(folder, lambda _: old)
    require_supported(str(folder))
    loaded = load_causal_lm(str(folder), "fp32").state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in weights.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_both_ranks_refuse_a_teacher_with_a_missing_layer(stage, damaged, shared_model, text_file,
                                                          tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", shared_model("llama", 0),
                          damaged("a further layer"), text_file, tmp_path / "run",
                          deepspeed=f"ds_configs/zero{stage}_fp32.json")
    ranks = Ranks(2, "train", recipe)
    assert ranks.wait() == [2, 2]
    assert ranks.output().count("9 unexpected") == 1 and "Traceback" not in ranks.output()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma2", "qwen2-tied",
                                    "gpt2"])
def test_what_a_class_declares_is_no_damage(family, shared_model):
    folder = str(shared_model(family))
    require_supported(folder)
    load_causal_lm(folder, "fp32")


def test_experts_that_are_merged_at_loading_are_no_damage_and_one_less_is(tmp_path):
    vocabulary = len(make_tokenizer(tmp_path))
    config = transformers.MixtralConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert any(".experts.1." in name for name in on_disk)
    require_supported(str(tmp_path))
    rewrite(tmp_path, lambda weights: {name: tensor for name, tensor in weights.items()
                                       if ".experts.1." not in name})
    with pytest.raises(InputError, match=r"of another shape: model.layers.0"):
        require_supported(str(tmp_path))


def test_pickled_weights_and_a_file_without_metadata_are_read(shared_model, tmp_path):
    shutil.copytree(shared_model("llama"), tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "model.safetensors")
    shutil.copytree(tmp_path / "pickled", tmp_path / "plain")
    save_file(weights, tmp_path / "plain" / "model.safetensors")
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    for name in ("pickled", "plain"):
        require_supported(str(tmp_path / name))
        loaded = load_causal_lm(str(tmp_path / name), "fp32").state_dict()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_the_check_reads_no_weight(shared_model, tmp_path):
    """The values are holes of a sparse file of 40 GB, far more than would be read in a test."""
    folder = Path(shutil.copytree(shared_model("llama"), tmp_path / "big"))
    config = json.loads((folder / "config.json").read_text())
    rows, width = 10_000_000, 1024
    config |= {"vocab_size": rows, "hidden_size": width, "intermediate_size": 8,
               "num_hidden_layers": 1, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: list(parameter.shape) for name, parameter in
                  transformers.AutoModelForCausalLM.from_config(
                      transformers.AutoConfig.from_pretrained(folder)).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end > 40e9
    require_supported(str(folder))


FIRST, SECOND = "1" * 40, "2" * 40


def rank_with_cache(cache: str, argv: list[str], variables: dict[str, str], log: str) -> None:
    """A rank without a network, whose cache of the hub is the folder `cache`."""
    use_cache(Path(cache))
    rank_main(argv, variables, log)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of this process's cache of the hub, empty."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def test_a_run_goes_on_with_the_commits_of_the_hub_that_it_began_with(cache, shared_model,
                                                                       text_file, tmp_path):
    teachers = [shared_model("llama", seed) for seed in (1, 2)]
    publish(cache, "org/student", shared_model("llama", 0), FIRST)
    publish(cache, "org/teacher", teachers[0], FIRST)
    target = functools.partial(rank_with_cache, str(cache))
    recipe = write_recipe(tmp_path / "r.yaml", Path("org/student"), Path("org/teacher"), text_file,
                          tmp_path / "run", train__steps=4, checkpoint__every=2)
    through = write_recipe(tmp_path / "t.yaml", Path("org/student"), Path("org/teacher"), text_file,
                           tmp_path / "through", train__steps=4, checkpoint__every=2)
    for path in (recipe, through):
        ranks = Ranks(1, "train", path, target=target)
        assert ranks.wait() == [0], ranks.output()
    # As after two steps, with main moved since.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "run" / "model")
    publish(cache, "org/teacher", teachers[1], SECOND)
    resumed = Ranks(1, "train", recipe, target=target)
    assert resumed.wait() == [0] and "resumed after step 2" in resumed.output()
    assert comparable_metrics(tmp_path / "run") == comparable_metrics(tmp_path / "through")
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert facts["teacher"]["revision"] == facts["student"]["revision"] == FIRST
    assert load_recipe(tmp_path / "run" / "recipe.yaml").teacher.revision == FIRST
    # A branch that is named and has moved is not the run's teacher.
    moved = Ranks(1, "train", recipe, "teacher.revision=main", target=target)
    assert moved.wait() == [2]
    assert f"teacher.revision: '{FIRST}' before, '{SECOND}' now" in moved.output()
    # A new run takes what main is now.
    assert check_recipe(load_recipe(recipe, [f"output_dir={tmp_path / 'new'}"]), 1
                        ).recipe.teacher.revision == SECOND
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0


def test_generated_answers_are_not_continued_by_another_commit(cache, shared_model, tmp_path,
                                                               capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the river"}\n')
    argv = ["generate", "org/model", "--prompts", str(tmp_path / "prompts.jsonl"),
            "--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "2"]
    publish(cache, "org/model", shared_model("llama", 0), FIRST)
    assert main(argv) == 0
    publish(cache, "org/model", shared_model("llama", 1), SECOND)
    assert main(argv) == 2
    assert "made with something else: revision" in capsys.readouterr().err


def test_a_model_that_the_cache_does_not_hold_is_one_message(cache, shared_model, text_file,
                                                            tmp_path, capsys):
    publish(cache, "org/half", shared_model("llama", 0), FIRST)
    (cache / "models--org--half" / "snapshots" / FIRST / "model.safetensors").unlink()
    good = shared_model("llama", 0)
    for model, words in (("org/absent", r"no (model|tokenizer) can be .* 'org/absent'"),
                         ("org/half", "the weights of org/half cannot be read")):
        recipe = write_recipe(tmp_path / "r.yaml", Path(model), good, text_file, tmp_path / "run")
        for argv in (["train", str(recipe)], ["eval", model, "--data", str(text_file)]):
            assert main(argv) == 2, argv
            message = capsys.readouterr().err
            assert re.search(words, message) and message.count("remedy:") == 1
            assert "Traceback" not in message and not (tmp_path / "run").exists()


def test_a_run_is_exported_after_its_student_has_moved_with_the_settings_of_generation(
        shared_model, text_file, tmp_path):
    student = Path(shutil.copytree(shared_model("llama", 0), tmp_path / "student"))
    config = json.loads((student / "config.json").read_text())
    # As older models of the hub have them; the second is one that validation warns about.
    config |= {"do_sample": True, "temperature": 0.7, "max_length": 50, "num_beams": 3}
    (student / "config.json").write_text(json.dumps(config))
    (student / "generation_config.json").unlink()
    transformers.AutoModelForCausalLM.from_pretrained(student).save_pretrained(tmp_path / "truth")
    recipe = write_recipe(tmp_path / "r.yaml", student, None, text_file, tmp_path / "run",
                          train__steps=1)
    run_ranks(1, "train", recipe)
    student.rename(tmp_path / "elsewhere")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    for folder in ("run/model", "out"):
        for name in ("generation_config.json", "config.json"):
            assert (json.loads((tmp_path / folder / name).read_text())
                    == json.loads((tmp_path / "truth" / name).read_text())), (folder, name)
        assert ((tmp_path / folder / "tokenizer.json").read_text()
                == (tmp_path / "elsewhere" / "tokenizer.json").read_text())
    load_causal_lm(str(tmp_path / "out"), "fp32")
    # A run of an older version kept nothing: one message says what is missing.
    shutil.rmtree(tmp_path / "run" / "student_files")
    with pytest.raises(InputError, match=f"no model can be read from '{student}'"):
        export(tmp_path / "run", tmp_path / "late")


@pytest.mark.parametrize("values, words", [
    ({"num_attention_heads": 0}, "modulo by zero"), ({"dtype": "float99"}, "float99"),
    ({"num_hidden_layers": 10**19}, "num_hidden_layers is 10000000000000000000")])
def test_a_config_that_its_class_fails_on_or_never_ends_with_is_one_message(
        values, words, shared_model, tmp_path):
    folder = shutil.copytree(shared_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(InputError, match=f"no model can be read from .*{words}"):
        require_supported(str(folder))
