"""`recipes schema`: the schema and `load_recipe` take and refuse the same shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from amid_ds.cli import main
from amid_ds.config.library import RECIPES_FOLDER
from amid_ds.config.loss_section import DIVERGENCE_NAMES, ORDER_NAMES, PRESET_NAMES
from amid_ds.config.parse import dump_recipe, parse_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.config.recipe_schema import recipe_keys, recipe_schema
from amid_ds.config.strict import dump_yaml, load_yaml
from amid_ds.errors import InputError
from amid_ds.losses.divergences import DIVERGENCES
from amid_ds.losses.objective import ORDERS, PRESETS

LEAST = {"student": {"model": "s"}, "data": {"train": [{"path": "a.jsonl"}]},
         "train": {"steps": 2, "global_batch_size": 4}, "output_dir": "out"}
SCHEDULES: list[object] = [
    1, 0.5, {"linear": [0, 1]}, {"cosine": [0.1, 0.9], "steps": [0, 5]}, {"value": 0.5},
    {"pieces": [{"steps": [0, 1], "value": 0}, {"steps": [1, 2], "linear": [0, 1]}]}]
PER_TOKEN: list[object] = [
    {"by": "overlap"}, {"by": "divergence", "linear": [{"linear": [0, 1]}, 1], "at": [0, 1]}]
# Forms that a section takes beside its own keys: (section, value).
TAKEN: list[tuple[str, object]] = [
    *(("loss", {"lam": value}) for value in (*SCHEDULES, *PER_TOKEN, {"adaptive": [0, 1]})),
    *(("loss", {"kd_weight": value, "ce_weight": 1}) for value in SCHEDULES),
    *(("loss", {"order": value}) for value in ("pr", {"pr": 0.5, "qr": PER_TOKEN[0]})),
    *(("loss", {"divergence": value}) for value in ("kl", {"alpha_beta": {
        "alpha": 1, "beta": {"linear": [0, 1]}}}, {"concrete_score": {"first": "teacher"}})),
    ("loss", {"temperature": {"student": 2, "teacher": {"linear": [1, 2]}}}),
    ("loss", {"preset": "taid", "t": {"adaptive": [0.4, 1.0], "rate": 1e-3}}),
    ("loss", {"preset": "veto", "beta": PER_TOKEN[0], "order": "qr"}),
    ("loss", {"preset": None, "token_weight": {"by": "student_entropy", "top": 0.5}}),
    ("teacher", None), ("teacher", {"cached": "c", "rest": None}), ("teacher", {"ema": 0.99}),
    ("student", {"model": "s", "lora": {"targets": ["q_proj"]}}),
    ("student", {"model": "s", "lora": {}, "router_aux_loss": 0}),
    ("data", {"train": [{"path": "a", "loss": {"preset": "gkd", "beta": 0.5}}],
              "eval": [{"path": "b.jsonl"}, {"path": "c", "name": None}, {"path": "d/é.jsonl"}]}),
    ("train", {"epochs": 1, "steps": None, "global_batch_size": 4, "optimizer": "muon"}),
    ("train", {"steps": 1, "global_batch_size": 4, "optimizer": "muon", "muon": None}),
    ("rollout", None), ("checkpoint", {}), ("eval_tasks", {"every": 100, "tasks": ["arc_easy"]})]
# Of another shape.
REFUSED: list[tuple[str, object]] = [
    ("losss", {}), ("loss", {"lamda": 1}), ("loss", {"lam": "a"}), ("loss", {"lam": True}),
    ("loss", {"order": 1}), ("loss", {"temperature": {"student": "1"}}), ("loss", None),
    ("loss", {"kd_weight": "a"}), ("teacher", {}), ("teacher", {"model": "t", "cached": "c"}),
    ("student", {}), ("student", {"model": 5}), ("student", {"model": "s", "dtype": "fp16"}),
    ("data", {}), ("data", {"train": []}), ("data", {"train": {"path": "a"}}),
    ("train", {"steps": "ten", "global_batch_size": 4}), ("train", {"steps": 2}),
    ("train", {"steps": 2, "global_batch_size": 0}), ("checkpoint", {"keep": 1}),
    ("train", {"steps": 2, "global_batch_size": 4, "betas": [0.9]}), ("output_dir", None)]


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    Draft202012Validator.check_schema(recipe_schema())
    return Draft202012Validator(recipe_schema())


def is_taken(raw: dict) -> bool:
    try:
        parse_recipe(dump_yaml(raw), "it")
    except InputError:
        return False
    return True


@pytest.mark.parametrize("section, value", TAKEN, ids=str)
def test_every_form_of_a_value_is_taken_by_both(schema, section, value):
    raw = {"teacher": {"model": "t"}, **LEAST, section: value}
    if section == "teacher" and value is None:
        raw["loss"] = {"kd_weight": {"linear": [0, 1]}, "ce_weight": 0}
    assert is_taken(raw)
    assert [error.message for error in schema.iter_errors(raw)] == []


@pytest.mark.parametrize("teacher", [{"model": "t"}, None], ids=["taught", "plain"])
@pytest.mark.parametrize("section, value", REFUSED, ids=str)
def test_another_shape_is_refused_by_both(schema, section, value, teacher):
    raw = {**LEAST, "teacher": teacher, section: value}
    assert not is_taken(raw) and not schema.is_valid(raw)


@pytest.mark.parametrize("path", sorted(RECIPES_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_packaged_recipe_fits_as_it_is_and_resolved(schema, path):
    raw = load_yaml(path.read_text())
    resolved = load_yaml(dump_recipe(parse_recipe(path.read_text(), path.stem)))
    assert schema.is_valid(raw) and schema.is_valid(resolved)


def test_the_command_prints_the_schema_alone_with_a_meaning_for_each_key(capsys):
    assert main(["recipes", "schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == recipe_schema()
    sections = {"Recipe": printed, **printed["$defs"]}
    silent = [f"{name}.{key}" for name, section in sections.items()
              for key, value in section["properties"].items()
              if "description" not in value and "$ref" not in value]
    assert silent == []
    assert printed["$defs"]["Train"]["properties"]["seq_length"]["default"] == 512
    assert "None" not in json.dumps(printed)


def test_the_names_that_editors_and_shells_offer_are_those_of_the_losses():
    assert set(PRESET_NAMES) == set(PRESETS)
    assert set(DIVERGENCE_NAMES) == set(DIVERGENCES) and set(ORDER_NAMES) == set(ORDERS)


def test_the_keys_that_shells_offer_are_keys_of_the_recipe():
    keys = recipe_keys()
    assert {"train.learning_rate", "data.train.0.path", "loss.preset", "teacher.placement",
            "teacher.cached", "rollout.adaptive.capacity", "output_dir"} <= keys.keys()
    assert keys["train.schedule"] == ["constant", "cosine", "linear", "wsd"]
    assert keys["student.lora.targets"] == ["all-linear"]
    unknown = [key for key in keys for error in errors_of(nested(key.split(".")))
               if error["type"] == "extra_forbidden" and error["loc"][-1] == key.split(".")[-1]]
    # Each kind of teacher has its own keys.
    assert {key for key in unknown if not key.startswith("teacher.")} == set()


def nested(keys: list[str]) -> object:
    """A recipe of the one key: {"a": {"b": None}}; a 0 is the first of a list."""
    if not keys:
        return None
    inner = nested(keys[1:])
    return [inner] if keys[0] == "0" else {keys[0]: inner}


def errors_of(raw: object) -> Iterator[dict]:
    try:
        Recipe.model_validate(raw)
    except ValidationError as error:
        yield from error.errors()
