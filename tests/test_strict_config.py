"""Recipes, overrides and DeepSpeed configs are taken as they are written, or refused.

YAML 1.2's numbers and booleans, each value of its key's own type, no key twice, nothing that grows
without bound, and no DeepSpeed key that would be passed over.
"""

from __future__ import annotations

import json
import re
import time

import pytest
import yaml
from safetensors.torch import load_file
from support.patches import rank_without_compiler
from support.ranks import run_ranks
from support.runs import ROOT, read_metrics, write_recipe

from amid_ds.cli import main
from amid_ds.config.library import RECIPES_FOLDER
from amid_ds.config.parse import dump_recipe, load_recipe, parse_recipe
from amid_ds.config.strict import MAX_DEPTH, dump_yaml, load_json, load_yaml
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.ds_config import find_deepspeed_config, read_deepspeed_config
from amid_ds.engine.ds_schema import find_problems
from amid_ds.errors import InputError
from amid_ds.planning.devices import find_device
from amid_ds.planning.setting import read_zero_settings

STUDY = RECIPES_FOLDER / "study.yaml"
BOMB = ("a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
                  for old, new in zip("abcdefgh", "bcdefghi", strict=True)))


# --- YAML --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, value", [
    ("yes", "yes"), ("on", "on"), ("n", "n"), ("true", True), ("False", False), ("1:30", "1:30"),
    ("010", "010"), ("1_000", "1_000"), ("0o17", 15), ("0x1F", 31), ("-3", -3), ("1e-4", 1e-4),
    ("1.0e-4", 1e-4), ("1e5", 1e5), ("5.", 5.0), (".5", 0.5), ("-.inf", float("-inf")),
    ("2026-01-01", "2026-01-01"), ("~", None), ("", None), ("null", None), ("=", "=")])
def test_a_plain_value_is_what_yaml_1_2_says(text, value):
    read = load_yaml(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("value", [
    "1e-4", "yes", "010", "1:30", "0o7", "null", "~", "", "<<", "1_0", ".5", "\x1b", "a: b", "é",
    1e-5, 1e16, float("inf"), 1e-300, True, None, 0, -2, ["1", 1, 1.0]])
def test_what_is_dumped_reads_back_as_it_was(value):
    again = load_yaml(dump_yaml({"a": value}))
    assert again == {"a": value}
    assert isinstance(again, dict) and type(again["a"]) is type(value)


@pytest.mark.parametrize("text, fault", [
    ("{a: 1, a: 2}", "the key 'a' is there twice"), ("a: 1\nb: 2\n'a': 3", "there twice"),
    ("a: {b: 1, b: 1}", "there twice"), ("&a [*a]", "holds itself"), ("a: &a {b: *a}", "holds"),
    (BOMB, "its aliases followed"), ("[" * 10_000, f"more than {MAX_DEPTH} levels"),
    ("{a: " * 500, f"more than {MAX_DEPTH} levels"), ("- " * 500, f"more than {MAX_DEPTH} levels"),
    ("!!int 010", "not a YAML int"), ("!!bool yes", "not a YAML bool"),
    ("!!float 1:30", "not a YAML float"), ("!!python/name:os.system", "constructor"),
    ("!!binary aGk=", "constructor"), ("!!set {a}", "constructor"),
    ("1\n---\n2", "single document"),
    ('"\\uD800"', "half of a character")])
def test_yaml_that_is_no_plain_data_is_refused_at_once(text, fault):
    started = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(fault)):
        load_yaml(text)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"a": {"b": 1, "b": 2}}', "NaN",
                                  "[Infinity]", "1e999", "[" * 100_000, "9" * 5000, "{'a': 1}"])
def test_json_that_is_no_plain_data_is_refused(text):
    with pytest.raises(ValueError):
        load_json(text)


def test_a_file_that_never_ends_is_refused(capsys):
    assert main(["plan", "/dev/zero"]) == 2
    assert "more than" in capsys.readouterr().err


def test_aliases_and_merges_that_stay_small_are_taken():
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]") == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}


# --- recipes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("override, words", [
    ("train.steps=true", "integer"), ("train.steps=010", "integer"), ("train.steps=8.0", "integer"),
    ("train.steps='8'", "integer"), ("train.steps=99999999999999999999", "9223372036854775807"),
    ("train.seed=18446744073709551616", "9223372036854775807"),
    ("train.seed=" + "9" * 5000, "integer"), ("train.learning_rate=yes", "number"),
    ("train.learning_rate=true", "number"), ("train.learning_rate='1e-4'", "number"),
    ("train.learning_rate=1e999", "finite"), ("train.max_hours=1:30", "number"),
    ("student.activation_checkpointing=yes", "true or false"),
    ("student.activation_checkpointing=1", "true or false"), ("student.revision=123", "in quotes"),
    ("loss.lam={linear: [0, true]}", "number"), ("loss.alpha={linear: [0, 1], steps: [0, 1.0]}",
                                                  "integer"),
    ("loss.order={pr: 1, qr: true}", "number"), ("data.train.0.weight='1'", "number"),
    ("train={steps: 1, steps: 2}", "there twice"), ("data.train.²=1", "not a section"),
    ('output_dir="a\\0b"', "NUL"), ("output_dir=" + "x" * 300, "255 bytes")])
def test_a_value_of_another_type_is_refused_with_the_key(override, words):
    with pytest.raises(InputError) as refused:
        load_recipe(STUDY, [override])
    key = override.partition("=")[0]
    assert words in str(refused.value) and key in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_an_integer_may_stand_for_a_number_and_a_short_exponent_is_one():
    recipe = load_recipe(STUDY, ["train.learning_rate=1e-4", "train.weight_decay=0", "loss.lam=1"])
    assert (recipe.train.learning_rate, recipe.train.weight_decay, recipe.loss.lam) == (1e-4, 0, 1)


def test_a_key_that_is_twice_in_a_recipe_is_refused_with_its_line(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(STUDY.read_text() + "\noutput_dir: elsewhere\n")
    assert main(["train", str(path)]) == 2
    message = capsys.readouterr().err
    assert "the key 'output_dir' is there twice" in message and "line" in message


def test_every_recipe_of_the_package_and_its_copy_in_a_run_are_taken():
    for path in RECIPES_FOLDER.glob("*.yaml"):
        recipe = load_recipe(path)
        assert parse_recipe(dump_recipe(recipe), path.name) == recipe


def yaml_in_documents() -> list[str]:
    texts = [path.read_text() for folder in (ROOT, *ROOT.glob("*/"), *ROOT.glob("amid_ds/*/"))
             for path in folder.glob("*.md")]
    return [document for text in texts for block in re.findall(r"```yaml\n(.*?)```", text, re.S)
            for document in block.split("\n---\n")]


def test_yaml_in_the_documents_means_what_it_meant_to_yaml_1_1():
    """Nothing that the documents show is read as something else than most other readers do."""
    blocks = yaml_in_documents()
    assert len(blocks) >= 3
    for block in blocks:
        read = load_yaml(block)
        assert read == yaml.safe_load(re.sub(r"(?<=[ :\[])(\d)e-", r"\1.0e-", block))


@pytest.mark.parametrize("device", ["{memory: 80e9, flops: true, bandwidth: 1}", BOMB, "[" * 5000,
                                    "{memory: 1, memory: 1, flops: 1, bandwidth: 1}",
                                    "{memory: '1', flops: 1, bandwidth: 1}"])
def test_a_devices_numbers_are_read_as_strictly(device):
    with pytest.raises(InputError, match="the device"):
        find_device(device, 1)
    assert find_device("{memory: 80e9, flops: 1e15, bandwidth: 5e10}", 1).memory == 80e9


# --- DeepSpeed ---------------------------------------------------------------------------------

@pytest.fixture
def check(shared_model, text_file, tmp_path):
    """check(config, *overrides): the config with the recipe's numbers in it, on one rank."""
    path = tmp_path / "ds.json"
    recipe = write_recipe(tmp_path / "r.yaml", shared_model("llama"),
                          shared_model("llama", 1, hidden_size=64, intermediate_size=96), text_file,
                          tmp_path / "run", deepspeed=str(path))

    def read(config: object, *overrides: str):
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return read_deepspeed_config(load_recipe(recipe, overrides), 1)

    return read


WRONG = {
    "a section that is a boolean": ({"bf16": True}, ["bf16: true, it is a section"]),
    "a section that is null": ({"fp16": None}, ["fp16: null, it is a section"]),
    "a section that is a number": ({"zero_optimization": 3}, ["zero_optimization: 3"]),
    "a boolean in quotes": ({"bf16": {"enabled": "false"}}, ['bf16.enabled: "false"', "boolean"]),
    "a boolean that is a number": ({"bf16": {"enabled": 1}}, ["bf16.enabled: 1", "boolean"]),
    "a misspelt section": ({"zero_optimisation": {"stage": 3}},
                           ["zero_optimisation", "did you mean `zero_optimization`"]),
    "a misspelt key": ({"zero_optimization": {"stage": 3, "overlap_com": True}},
                       ["zero_optimization.overlap_com", "did you mean `overlap_comm`"]),
    "a misspelt key inside a section": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memry": True}}},
        ["offload_param.pin_memry", "did you mean `pin_memory`"]),
    "a stage that is a boolean": ({"zero_optimization": {"stage": True}},
                                  ["stage: true", "0 to 3"]),
    "a stage in quotes": ({"zero_optimization": {"stage": "3"}}, ['stage: "3"', "0 to 3"]),
    "a key twice": ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}',
                    ["'bf16' is there twice"]),
    "a key twice in a section": ('{"zero_optimization": {"stage": 1, "stage": 3}}',
                                 ["'stage' is there twice"]),
    "a batch size that is a boolean": ({"train_micro_batch_size_per_gpu": True},
                                       ["true", "1 by the recipe"]),
    "a name of before": ({"zero_optimization": {"stage": 2, "cpu_offload": True}},
                         ["cpu_offload is an old name", "offload_optimizer"]),
    "more than 64 bits": ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1e30}},
                          ["reduce_bucket_size", "64 bits"]),
    "NVMe": ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
             ['device: "nvme"']),
    "weights offloaded below stage 3": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        ["offload_param at stage 2", "stage 3"]),
    "an optimizer offloaded at stage 0": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["needs stage 1"]),
    "shards in an order of their own": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        ["round_robin_gradients", "scrambled"]),
    "loading that takes a GPU's index for a rank's number": (
        {"zero_optimization": {"stage": 3, "pipeline_loading_checkpoint": True}},
        ["pipeline_loading_checkpoint", "true"]),
    "what DeepSpeed does and an engine here does not": (
        {"amp": {"enabled": True}, "checkpoint": {}}, ["amp", "checkpoint", "take it out"]),
    "gradients of fp32 added up in bf16": (
        {"bf16": {"enabled": False}, "zero_optimization": {"stage": 3},
         "data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype: bf16", "fp32"]),
    "gradients added up in fp32 where DeepSpeed cannot": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
         "data_types": {"grad_accum_dtype": "fp32"}}, ["grad_accum_dtype: fp32", "needs stage 2"]),
    "the old name of bf16": ({"bfloat16": {"enabled": True}}, ["its name is `bf16`"]),
    "all at once": ({"foo": 1, "bf16": {"enabled": 2}, "gradient_clipping": 3,
                     "zero_optimization": {"stag": 3}},
                    ["foo is unknown", "bf16.enabled: 2", "gradient_clipping: 3",
                     "zero_optimization.stag is unknown"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_deepspeed_config_that_would_be_misread_is_refused(case, check):
    config, words = WRONG[case]
    with pytest.raises(InputError) as refused:
        check(config)
    assert [word for word in words if word not in str(refused.value)] == []


def test_every_packaged_config_is_taken(check):
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert find_problems(json.loads(path.read_text())) == {}
        check(path.read_text())


def test_a_config_that_is_missing_is_not_taken_for_the_packaged_one_of_its_name():
    for name in ("zero3.json", "ds_configs/zero3.json", "./ds_configs/zero3.json"):
        assert find_deepspeed_config(name).parent.name == "ds_configs"
    for name in ("/nowhere/ds_configs/zero3.json", "my/ds_configs/zero3.json", "/zero3.json"):
        with pytest.raises(InputError, match="is not there"):
            find_deepspeed_config(name)


@pytest.mark.parametrize("text", ['{"bf16": {}, // for H100\n}', '{"bf16": {},}', "{'bf16': {}}"])
def test_what_json_lacks_is_said_where_a_config_has_it(text, check):
    with pytest.raises(InputError, match="JSON has no comments"):
        check(text)


class _Asked(dict):
    """A mapping that notes the keys that it is asked for."""

    def __init__(self, values: dict) -> None:
        super().__init__(values)
        self.asked: set[object] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_every_key_that_deepspeed_reads_is_known_here_as_honoured_owned_or_refused():
    """So that a key that a new DeepSpeed brings is decided on, and none is refused as unknown."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    config = _Asked({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    DeepSpeedConfig(config)
    assert {"bf16", "zero_optimization", "optimizer", "compile"} <= config.asked
    lines = find_problems({str(key): {} for key in config.asked})
    assert [line for of_key in lines.values() for line in of_key if "unknown" in line] == []


# Stage, bf16, micro-batches, what the file says, what DeepSpeed is told.
ACCUMULATION = [(3, True, 4, None, "fp32"), (2, True, 4, None, "fp32"), (3, True, 1, None, None),
                (1, True, 4, None, None), (3, False, 4, None, None), (3, True, 4, "bf16", "bf16"),
                (3, True, 1, "fp32", "fp32")]


@pytest.mark.parametrize("stage, bf16, micro_batches, said, told", ACCUMULATION)
def test_gradients_of_several_micro_batches_add_up_in_fp32_unless_the_file_says_otherwise(
        stage, bf16, micro_batches, said, told, check):
    config = {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage}}
    if said is not None:
        config["data_types"] = {"grad_accum_dtype": said}
    read = check(config, f"train.global_batch_size={micro_batches}")
    assert read.get("data_types", {}).get("grad_accum_dtype") == told


# --- "auto" ------------------------------------------------------------------------------------

def test_auto_of_transformers_documentation_is_the_recipes_or_the_models_number(check):
    config = check({
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto",
                                                  "weight_decay": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto",
                              "stage3_prefetch_bucket_size": "auto",
                              "stage3_param_persistence_threshold": "auto", "sub_group_size": 1e9},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2000, "wall_clock_breakdown": False}, "student.dtype=bf16")
    assert config["bf16"] == {"enabled": True} and config["fp16"]["enabled"] is False
    assert "optimizer" not in config and "auto" not in json.dumps(config)
    # The teacher is the wider one, of 64.
    assert config["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 64 * 64, "stage3_prefetch_bucket_size": 3686,
        "stage3_param_persistence_threshold": 640, "sub_group_size": 10**9}
    assert read_zero_settings(config).reduce_bucket == 64 * 64
    assert check({"bf16": {"enabled": "auto"}}, "student.dtype=fp32")["bf16"] == {"enabled": False}


@pytest.mark.parametrize("config, words", [
    ({"bf16": {"enabled": "auto"}}, "while student.dtype is auto"),
    ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, "nothing decides it"),
    ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto"}}}, "train.schedule"),
    ({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}}, "train.learning_rate"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, "train.learning_rate")])
def test_auto_that_nothing_decides_is_refused_by_name(config, words, check):
    with pytest.raises(InputError, match=words):
        check(config)


# --- offload -----------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_an_optimizer_offloaded_below_stage_3_trains_and_exports_as_one_that_is_not(
        stage, llama_pair, text_file, tmp_path):
    models = {}
    for name, offload in (("plain", {}), ("offloaded", {"offload_optimizer": {"device": "cpu"}})):
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({"zero_optimization": {
            "stage": stage, "reduce_bucket_size": 10**6, **offload}}))
        recipe = write_recipe(tmp_path / f"{name}.yaml", *llama_pair, text_file, tmp_path / name,
                              deepspeed=str(config), train__steps=3)
        run_ranks(2, "train", recipe, target=rank_without_compiler)
        models[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    losses, offloaded = ([line["loss"] for line in read_metrics(tmp_path / name)]
                         for name in models)
    assert offloaded == pytest.approx(losses, rel=1e-6)
    for name, weight in models["plain"].items():
        assert (weight - models["offloaded"][name]).abs().max() < 1e-6
