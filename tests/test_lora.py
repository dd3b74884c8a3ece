"""LoRA students train as peft's own loop in plain torch does, in every layout of the ranks."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from support.counting_rank import counting_rank
from support.eight_bits import quantizing_rank
from support.lora import EPS, assert_trains_as, with_peft, write_stage_config
from support.ranks import run_ranks
from support.reference_loop import reference_loop
from support.runs import comparable_metrics, read_metrics, write_recipe

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Lora, Student
from amid_ds.errors import InputError
from amid_ds.models.adapters import is_adapter, stored_name
from amid_ds.models.hollow import hollow_causal_lm
from amid_ds.models.loading import load_causal_lm, meta_model
from amid_ds.models.trained import choose_trained
from amid_ds.training.job import check_recipe

LORA = {"rank": 4, "alpha": 8.0}


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("family", "lora", "ranks", "tensor_parallel", "stage", "changes"), [
    ("llama", {}, 2, 1, 3, {}),
    ("qwen3", {"modules_to_save": ["lm_head", "q_norm"]}, 2, 2, 3, {}),
    slow("llama", {}, 1, 1, 3, {}),
    slow("llama", {}, 1, 1, 0, {}),
    slow("llama", {}, 2, 1, 2, {}),
    slow("llama", {}, 2, 1, 0, {}),
    slow("llama", {}, 2, 2, 2, {}),
    slow("llama", {}, 2, 2, 0, {}),
    slow("llama", {}, 4, 2, 3, {}),
    slow("llama", {}, 2, 1, 3, {"student__activation_checkpointing": True}),
    slow("llama", {"targets": ["q_proj", "down_proj"],
                   "modules_to_save": ["lm_head", "embed_tokens"]}, 2, 2, 3, {}),
    # The head is the embedding, and trains as one weight.
    slow("qwen2-tied", {"modules_to_save": ["embed_tokens"]}, 2, 2, 2, {}),
    # The head itself has an adapter.
    slow("llama", {"targets": ["q_proj", "lm_head"]}, 2, 1, 3, {}),
    slow("llama", {"targets": ["q_proj", "lm_head"]}, 2, 1, 2, {}),
    slow("llama", {"targets": ["q_proj", "lm_head"]}, 2, 2, 3, {}),
    # Linear layers of its own kind, and no plan to split them by.
    slow("gpt2", {}, 2, 1, 3, {}),
    slow("gpt2", {}, 2, 2, 3, {})])
def test_adapters_train_as_pefts_own_loop_does(shared_model, llama_pair, instructions_file,
                                               tmp_path, family, lora, ranks, tensor_parallel,
                                               stage, changes):
    pair, lora = (shared_model(family, 0), llama_pair[1]), {**LORA, **lora}
    recipe = write_recipe(
        tmp_path / "r.yaml", *pair, instructions_file, tmp_path / "run", student__lora=lora,
        train__eps=EPS, tensor_parallel=tensor_parallel, data__prepared=str(tmp_path / "data"),
        data__isolate_documents=False, deepspeed=write_stage_config(tmp_path, stage), **changes)
    run_ranks(ranks, "train", recipe)
    truth = reference_loop(*pair, yaml.safe_load(recipe.read_text()), tmp_path / "data",
                           with_peft(lora))
    assert_trains_as(truth, tmp_path / "run")


@pytest.mark.slow
def test_secondary_partitions_change_no_number(llama_pair, instructions_file, tmp_path):
    for name, hpz in (("plain", {}), ("hpz", {"zero_hpz_partition_size": 2})):
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", *llama_pair, instructions_file, tmp_path / name,
            student__lora=LORA, data__prepared=str(tmp_path / "data"),
            deepspeed=write_stage_config(tmp_path, 3, **hpz))
        run_ranks(2, "train", recipe)
    assert comparable_metrics(tmp_path / "hpz") == comparable_metrics(tmp_path / "plain")


@pytest.mark.slow
def test_the_frozen_base_is_gathered_as_the_students_and_may_travel_in_8_bits(
        llama_pair, instructions_file, tmp_path):
    def steps_of(name: str, target, lora: dict | None, **zero) -> tuple[list[dict], list[float]]:
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", *llama_pair, instructions_file, tmp_path / name,
            student__lora=lora, data__prepared=str(tmp_path / "data"),
            deepspeed=write_stage_config(tmp_path, 3, **zero))
        run_ranks(2, "train", recipe, target=target)
        lines = (tmp_path / name / "0.jsonl").read_text().splitlines()
        return ([json.loads(line) for line in lines],
                [line["loss"] for line in read_metrics(tmp_path / name)])

    whole, _ = steps_of("whole", counting_rank, None)
    adapted, losses = steps_of("adapted", counting_rank, LORA)
    _, rounded = steps_of("rounded", quantizing_rank, LORA, zero_quantized_weights=True)
    assert [line["teacher_bytes"] for line in adapted] == [line["teacher_bytes"] for line in whole]
    # The adapters are gathered beside all that is there without them.
    assert all(of_adapted["student_bytes"] > of_whole["student_bytes"] > 0
               for of_adapted, of_whole in zip(adapted[1:], whole[1:], strict=True))
    assert rounded == pytest.approx(losses, rel=0.02) and rounded != losses


@pytest.mark.slow
def test_dropout_of_adapters_follows_the_seed(llama_pair, instructions_file, tmp_path):
    def run(name: str, dropout: float) -> list[dict]:
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", *llama_pair, instructions_file, tmp_path / name,
            student__lora={**LORA, "dropout": dropout}, data__prepared=str(tmp_path / "data"))
        run_ranks(2, "train", recipe)
        return comparable_metrics(tmp_path / name)

    with_dropout = run("a", 0.3)
    assert run("b", 0.3) == with_dropout != run("c", 0.0)


# --- first values and names --------------------------------------------------------------------

@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_adapters_begin_as_pefts_do_and_the_models_other_names_stay(shared_model, family):
    folder = str(shared_model(family, 0))
    model = meta_model(folder)
    student = Student(model=folder, lora=Lora(rank=4))
    values = {name: make() for name, make in choose_trained(model, student, seed=5).items()}
    assert values and values.keys() == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(value.shape == model.get_parameter(name).shape for name, value in values.items())
    assert not any(value.any() for name, value in values.items() if "lora_B" in name)
    # Uniform within one over the root of a layer's inputs.
    scaled = torch.cat([(value * value.shape[1] ** 0.5).flatten()
                        for name, value in values.items() if "lora_A" in name])
    assert -1 <= scaled.min() < -0.99 and 0.99 < scaled.max() <= 1
    assert scaled.abs().mean() == pytest.approx(0.5, abs=0.03)
    others = choose_trained(meta_model(folder), student, seed=6)
    assert all("lora_B" in name or not torch.equal(make(), values[name])
               for name, make in others.items())
    # No two layers begin alike.
    starts = [value.flatten()[:8] for name, value in values.items() if "lora_A" in name]
    assert len({tuple(start.tolist()) for start in starts}) == len(starts)
    others = {stored_name(name) for name, _ in model.named_parameters() if not is_adapter(name)}
    assert others == {name for name, _ in meta_model(folder).named_parameters()}


def test_adapters_have_the_models_dtype_and_are_where_it_is(shared_model):
    folder = str(shared_model("llama", 0))
    for model in (load_causal_lm(folder, "bf16"), hollow_causal_lm(folder, torch.bfloat16)):
        device = model.device
        choose_trained(model, Student(model=folder, lora=Lora(rank=2)))
        assert {(p.dtype, p.device) for p in model.parameters()} == {(torch.bfloat16, device)}


# --- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize(("lora", "words"), [
    ({"targets": ["q_prj"]}, ["'q_prj'", "nothing in the model", "q_proj, k_proj, v_proj, o_proj"]),
    ({"targets": ["embed_tokens"]}, ["'embed_tokens'", "is a Embedding", "gate_proj"]),
    ({"targets": ["mlp"]}, ["'mlp'", "is a LlamaMLP"]),
    ({"targets": ["proj"]}, ["'proj'", "nothing in the model"]),
    ({"rank": 33}, ["student.lora.rank 33", "model.layers.0.self_attn.q_proj is 32 × 32"]),
    ({"modules_to_save": ["norms"]}, ["'norms'", "embed_tokens"]),
    ({"modules_to_save": ["up_proj"]}, ["both name model.layers.0.mlp.up_proj"])])
def test_what_names_nothing_to_adapt_is_refused_before_a_weight_is_read(
        llama_pair, instructions_file, tmp_path, monkeypatch, lora, words):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                          student__lora={"rank": 2, **lora})
    monkeypatch.setattr("amid_ds.models.weight_reader.WeightReader.fill", None)
    with pytest.raises(InputError) as error:
        check_recipe(load_recipe(recipe), 1)
    assert all(word in str(error.value) for word in words), error.value


def test_an_adapter_of_a_head_that_is_the_embedding_is_refused_by_name(shared_model):
    folder = str(shared_model("llama-tied", 0))
    with pytest.raises(InputError, match="names the head lm_head, whose weight is the embedding's"):
        choose_trained(meta_model(folder), Student(model=folder, lora=Lora(targets=["lm_head"])))


def test_without_peft_the_remedy_is_its_extra(llama_pair, instructions_file, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                          student__lora=LORA)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'amid-ds\[lora\]'"):
        check_recipe(load_recipe(recipe), 1)


@pytest.mark.parametrize(("changes", "words"), [
    ({"student__lora": LORA, "student__freeze": ["norm"]}, "`lora` with `freeze`"),
    ({"student__lora": {"targets": []}}, "`targets` and `modules_to_save` are names"),
    ({"student__lora": {"rank": 0}}, "student.lora.rank"),
    ({"student__freeze": [""]}, "empty pattern"),
    ({"student__lora": LORA, "train__optimizer": "muon", "train__muon": {"learning_rate": 0.01}},
     "`student.lora` with `train.optimizer: muon`")])
def test_a_recipe_that_cannot_be_meant_so_is_refused(llama_pair, instructions_file, tmp_path,
                                                     changes, words):
    recipe = write_recipe(tmp_path / "r.yaml", *llama_pair, instructions_file, tmp_path / "run",
                          **changes)
    with pytest.raises(InputError) as error:
        load_recipe(recipe)
    assert words in str(error.value), error.value
