"""Whatever a recipe or a DeepSpeed config holds, it is taken or refused in one message."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from support.runs import ROOT, write_recipe

from amid_ds.cli import main
from amid_ds.config.library import RECIPES_FOLDER
from amid_ds.config.parse import dump_recipe, load_recipe, parse_recipe
from amid_ds.config.recipe import Recipe
from amid_ds.config.recipe_schema import recipe_schema
from amid_ds.config.strict import dump_yaml, load_yaml
from amid_ds.engine.backend import import_deepspeed
from amid_ds.engine.ds_config import read_deepspeed_config
from amid_ds.errors import InputError

# Values that are wrong, or right in few places.
VALUES: list[object] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**18, 2**63, -2**70, 10**400, 0.5, -0.0, 1e-300, 1e308,
    float("inf"), float("nan"), "", "auto", "yes", "false", "010", "1:30", "1e400", "x" * 5000,
    "\x1b[31m", "\u202e", "../..", "null", "\ud800", "a\0b", [], {}, [1],
    ["a", None], [[[]]], {"a": 1}, {"enabled": True}, {"enabled": "auto"}, {"linear": [0, 1]},
    {"steps": [0, 1], "value": 2},
    {"by": "overlap", "linear": [{"linear": [0, 1]}, 1], "at": [0, 1e308]}, {"student": 2},
    {"by": "divergence", "top": 0.5}, {"preset": "skl", "lam": 0.5}, {"pr": {"by": "overlap"}},
    {"loss": {"preset": None, "order": "qr"}}, {"pieces": []},
    {"adaptive": [1, 0]}, {"alpha_beta": {"alpha": 1, "beta": -1}}]
# Pieces of text that YAML has a meaning for.
TOKENS = ["&a ", "*a", "<<: ", "!!int ", "!!python/none ", "- ", ": ", "? ", "|\n", ">\n", "---\n",
          "...\n", "{", "}", "[", "]", "'", '"', "#", "%YAML 1.1\n", "\t", "\x00", "\x85", "\ufeff",
          "1e9999", "0o7", "0x", "~", "@", "`"]
# The most that one input may take, on a machine that does other things too.
SECONDS = 20
# The config that transformers' documentation shows, and keys beside it.
PUBLISHED = {
    "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000,
             "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True,
        "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False, "flops_profiler": {"enabled": False},
    "comms_logger": {"enabled": False}, "communication_data_type": "bf16"}


def places(value: object) -> Iterator[tuple[dict | list, object]]:
    """Every (container, key or index) inside `value`."""
    items = (value.items() if isinstance(value, dict) else
             enumerate(value) if isinstance(value, list) else ())
    for key, part in items:
        yield value, key
        yield from places(part)


def change_values(value: dict, random_: random.Random) -> dict:
    """A copy of `value` with one to three changes: another value, a key more, less or misspelt."""
    changed = copy.deepcopy(value)
    for _ in range(random_.randint(1, 3)):
        container, key = random_.choice([*places(changed), (changed, next(iter(changed), "x"))])
        what = random_.random()
        if what < 0.7 or isinstance(container, list):
            container[key] = copy.deepcopy(random_.choice(VALUES))
        elif what < 0.85:
            container[str(key).replace("e", "E", 1) + random_.choice(["", "s", "\n"])] = (
                copy.deepcopy(random_.choice(VALUES)))
        else:
            container.pop(key, None)
    return changed


def change_text(text: str, random_: random.Random) -> bytes:
    """`text` with a few characters or lines cut, doubled, moved or replaced."""
    lines = text.splitlines(keepends=True)
    for _ in range(random_.randint(1, 4)):
        at, other = random_.randrange(len(lines)), random_.randrange(len(lines))
        line = lines[at]
        column = random_.randrange(len(line) + 1)
        lines[at] = random_.choice([
            line[:column] + random_.choice(TOKENS) + line[column:], line[:column],
            line[:column] + line[column + 3:], line + line, "", " " + line, lines[other],
            line.rstrip("\n")])
    data = bytearray("".join(lines).encode())
    if random_.random() < 0.3 and data:
        data[random_.randrange(len(data))] = random_.randrange(256)
    return bytes(data)


def taken(read: Callable[[], object], what: object) -> bool:
    """True if `read` takes its input, False if it refuses it by an InputError, in time."""
    started = time.monotonic()
    try:
        read()
    except InputError as error:
        assert len(str(error)) < 20_000
        return False
    finally:
        assert time.monotonic() - started < SECONDS, what
    return True


COUNTS = [60, pytest.param(4000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_a_recipe_is_taken_as_it_reads_or_refused(count, tmp_path):
    sources = sorted(RECIPES_FOLDER.glob("*.yaml"))
    path, outcomes = tmp_path / "r.yaml", set()

    def read() -> None:
        recipe = load_recipe(path)
        assert parse_recipe(dump_recipe(recipe), "it") == recipe

    for seed in range(count):
        random_ = random.Random(seed)
        text = random_.choice(sources).read_text()
        if seed % 2:
            path.write_bytes(change_text(text, random_))
        else:
            raw = load_yaml(text)
            assert isinstance(raw, dict)
            path.write_text(dump_yaml(change_values(raw, random_)), encoding="utf-8")
        outcomes.add(taken(read, seed))
    assert outcomes == {True, False}


# What a schema cannot say. Beside it: floats where integers are.
BEYOND_A_SCHEMA = {"value_error", "finite_number", "string_pattern_mismatch"}


@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.slow)])
def test_the_schema_takes_what_is_taken_and_refuses_what_has_another_shape(count):
    schema = Draft202012Validator(recipe_schema())
    raws = [load_yaml(path.read_text()) for path in sorted(RECIPES_FOLDER.glob("*.yaml"))]
    raws += [load_yaml(dump_recipe(parse_recipe(dump_yaml(raw), "it"))) for raw in raws]
    outcomes = set()
    for seed in range(count):
        random_ = random.Random(seed)
        text = dump_yaml(change_values(random_.choice(raws), random_))
        try:
            raw = load_yaml(text)
        except ValueError:
            continue
        fits = schema.is_valid(raw)
        try:
            parse_recipe(text, "it")
            outcomes.add("taken")
            assert fits, raw
        except InputError:
            if wrong_shapes(raw):
                outcomes.add("refused")
                assert not fits, raw
    assert outcomes == {"taken", "refused"}


def wrong_shapes(raw: dict) -> bool:
    """True where pydantic finds a key or value of another kind than the schema names."""
    try:
        Recipe.model_validate(raw)
    except ValidationError as error:
        return any(problem["type"] not in BEYOND_A_SCHEMA
                   and not isinstance(problem["input"], float)
                   for problem in error.errors())
    return False


@pytest.mark.parametrize("count", COUNTS)
def test_an_override_is_taken_or_refused(count):
    recipe = RECIPES_FOLDER / "study.yaml"
    keys = [f"{section}.{key}" for section in ("student", "teacher", "loss", "train", "checkpoint",
                                               "data", "data.train.0", "rollout", "slurm")
            for key in ("model", "steps", "lam", "seed", "keep", "path", "0", "x", "", "adaptive")]
    for seed in range(count):
        random_ = random.Random(seed)
        value = (json.dumps(random_.choice(VALUES)) if seed % 2
                 else "".join(random_.choices([*TOKENS, "a", "1", ",", " "], k=6)))
        override = f"{random_.choice(keys)}={value}"
        taken(lambda override=override: load_recipe(recipe, [override]), override)


@pytest.mark.parametrize("count", COUNTS)
def test_a_deepspeed_config_that_is_taken_is_one_for_deepspeed(count, shared_model, text_file,
                                                               tmp_path):
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    path = tmp_path / "ds.json"
    recipe = load_recipe(write_recipe(
        tmp_path / "r.yaml", shared_model("llama"), shared_model("llama", 1), text_file,
        tmp_path / "run", deepspeed=str(path)))
    sources = [PUBLISHED, *(json.loads(file.read_text())
                            for file in sorted((ROOT / "ds_configs").glob("*.json")))]

    def read() -> None:
        # What DeepSpeed refuses is an error of another kind, which fails the test.
        DeepSpeedConfig(dict(read_deepspeed_config(recipe, 1)))

    outcomes = set()
    for seed in range(count):
        random_ = random.Random(seed)
        source = random_.choice(sources)
        if seed % 3:
            path.write_text(json.dumps(change_values(source, random_)))
        else:
            path.write_bytes(change_text(json.dumps(source, indent=1), random_))
        outcomes.add(taken(read, path.read_bytes()))
    assert outcomes == {True, False}


@pytest.mark.parametrize("count", [8, pytest.param(400, marks=pytest.mark.slow)])
def test_a_plan_of_a_changed_recipe_ends_with_a_status_and_one_message(count, shared_model,
                                                                      text_file, tmp_path, capsys):
    good = load_yaml(write_recipe(tmp_path / "r.yaml", shared_model("llama"),
                                  shared_model("llama", 1), text_file,
                                  tmp_path / "run").read_text())
    assert isinstance(good, dict)
    path, device = tmp_path / "changed.yaml", "{memory: 80e9, flops: 1e15, bandwidth: 5e10}"
    for seed in range(count):
        path.write_text(dump_yaml(change_values(good, random.Random(seed))), encoding="utf-8")
        status = main(["plan", str(path), "--device", device])
        shown = capsys.readouterr()
        assert status in (0, 1, 2) and "Traceback" not in shown.err
        assert shown.err.count("amid-ds: ") == (status != 0), shown.err
