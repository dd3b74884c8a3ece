"""The packaged recipes: each one is parsed, planned and run for two steps on small models."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from support.chats import PLAIN
from support.data import write_jsonl
from support.ranks import run_ranks
from support.runs import read_metrics

from amid_ds import amid_loss
from amid_ds.cli import main
from amid_ds.config.library import RECIPES_FOLDER, find_recipe
from amid_ds.config.parse import load_recipe
from amid_ds.config.published import published, published_row
from amid_ds.config.recipe import Recipe
from amid_ds.config.schedule import learning_rate
from amid_ds.errors import InputError
from amid_ds.training.objective import objective_at

SMALL_BATCH = ["train.global_batch_size=2", "train.micro_batch_size=2"]
ADAPTIVE = [*SMALL_BATCH, "rollout.max_new_tokens=8", "rollout.adaptive.init_threshold=1.0"]
SAMPLED = [*SMALL_BATCH, "rollout.max_new_tokens=8", "rollout.share=1.0"]
# Recipe -> its models' family, ranks, and the overrides that make it small.
STAND_INS = {
    "amid_gpt2_dolly": ("gpt2", 1, ADAPTIVE),
    "amid_adaptive": ("gpt2", 1, ADAPTIVE),
    "distillm_gpt2_dolly": ("gpt2", 1, ADAPTIVE),
    "gkd": ("gpt2", 1, SAMPLED),
    "csd": ("gpt2", 1, SMALL_BATCH),
    "distillm2": ("llama", 1, SMALL_BATCH),
    "eopd": ("llama", 1, SAMPLED),
    "veto": ("llama", 1, SAMPLED),
    "opd_sampled": ("llama", 1, SAMPLED),
    "pretrain": ("llama", 2, ["tensor_parallel=2", "train.global_batch_size=2"]),
    "study": ("llama", 1, SMALL_BATCH),
}
ON_DOLLY = ["amid_gpt2_dolly", "amid_adaptive", "distillm_gpt2_dolly", "gkd", "csd"]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> Path:
    """Instructions in the columns of the published sets."""
    rows = [{"instruction": "the river", "input": "",
             "output": "sings over the stone " * (1 + number % 3)}
            for number in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("recipes") / "instructions.jsonl", rows)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    """Conversations of two turns."""
    rows = [{"messages": [{"role": "user", "content": "the river"},
                          {"role": "assistant", "content": "sings slowly " * (1 + number % 3)}]}
            for number in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("recipes") / "conversations.jsonl", rows)


@pytest.fixture(scope="module")
def chat_models(shared_model, tmp_path_factory) -> list[Path]:
    """Two Llamas whose tokenizer has a chat template."""
    folders = [tmp_path_factory.mktemp("chat") / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        shutil.copytree(shared_model("llama", seed), folder)
        (folder / "chat_template.jinja").write_text(PLAIN)
    return folders


def test_every_recipe_has_its_stand_in():
    assert {path.stem for path in RECIPES_FOLDER.glob("*.yaml")} == set(STAND_INS)


@pytest.mark.parametrize("name", STAND_INS)
def test_a_recipe_is_parsed_planned_and_runs_two_steps(shared_model, chat_models, text_file,
                                                       instructions, conversations, tmp_path,
                                                       capsys, name):
    family, ranks, smaller = STAND_INS[name]
    recipe = load_recipe(find_recipe(name))
    source = recipe.data.train[0]
    data = (text_file if source.is_text else instructions if source.template else conversations)
    student, teacher = (chat_models if source.messages
                        else [shared_model(family, 0), shared_model(family, 1)])
    sets = [f"data.train.{i}" for i in range(len(recipe.data.train))] + ["data.eval.0"]
    overrides = [f"student.model={student}", f"teacher.model={teacher}",
                 *(f"{rows}.path={data}" for rows in sets), f"data.prepared={tmp_path / 'data'}",
                 "data.workers=0", "train.epochs=null", "train.steps=2", "train.seq_length=96",
                 "train.warmup_steps=0", "train.eval_every=1", "train.log_every=1",
                 f"output_dir={tmp_path / 'run'}", *smaller]
    if recipe.data.auxiliary is not None:
        overrides.append(f"data.auxiliary.path={text_file}")
    if recipe.data.eval[0].generate is not None:
        overrides += ["data.eval.0.generate.max_new_tokens=8", "data.eval.0.generate.rows=2"]
    assert main(["plan", str(find_recipe(name)), "--ranks-per-node", str(ranks), "--json",
                 *overrides]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    run_ranks(ranks, "train", find_recipe(name), *overrides)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    # What is estimated from one token has either sign.
    sampled = recipe.rollout is not None and recipe.rollout.estimator == "sampled"
    assert sampled or all(line["kd_loss"] > 0 for line in lines)
    assert recipe.rollout is None or all(line["rollout"] for line in lines)
    assert all(key in line for key in recipe.train.statistics for line in lines)
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert recipe.checkpoint.best is None or (tmp_path / "run" / "best" / "config.json").exists()


def variants() -> list[list[str]]:
    """The lines of the README's table: a recipe's file and its overrides."""
    text = (RECIPES_FOLDER / "README.md").read_text(encoding="utf-8")
    return [shlex.split(line) for line in re.findall(r"`(\w+\.yaml .*?)` \|", text)]


def test_every_line_of_the_variants_is_a_recipe_whose_objective_exists():
    assert len(variants()) > 10
    for file, *overrides in variants():
        assert_has_an_objective(load_recipe(find_recipe(file.removesuffix(".yaml")), overrides))


def assert_has_an_objective(recipe: Recipe) -> None:
    """At the first and the last step."""
    for step in (0, 99):
        objective_at(recipe.loss, step, 100)


def test_a_published_row_has_a_number_for_every_set_and_a_run_of_ours():
    assert published().rows
    for row in published().rows.values():
        assert_has_an_objective(load_recipe(find_recipe(row.recipe), row.overrides))
        mean = sum(row.rouge_l.values()) / len(row.rouge_l)
        # Printed to two digits, of sets that are printed to two digits.
        assert row.average is None or abs(row.average - mean) < 0.0101
    assert published_row("amid").rouge_l["dolly"] == 26.44
    with pytest.raises(InputError, match="did you mean `gkd`"):
        published_row("gkdd")


def test_the_gkd_recipes_loss_is_its_scripts():
    """0.9 KL(student ‖ m) + 0.1 KL(teacher ‖ m), m = 0.1 teacher + 0.9 student."""
    recipe = load_recipe(find_recipe("gkd"))
    student, teacher = torch.randn(2, 5, 17, generator=torch.Generator().manual_seed(0),
                                   dtype=torch.float64)
    objective = objective_at(recipe.loss, 0, 100).amid
    q, p = student.softmax(-1), teacher.softmax(-1)
    m = 0.1 * p + 0.9 * q
    truth = (0.9 * q * (q / m).log() + 0.1 * p * (p / m).log()).sum(-1)
    torch.testing.assert_close(amid_loss(student, teacher, objective), truth)


def on_dolly() -> list[Recipe]:
    """The recipes for Dolly, and their variants."""
    lines = [[f"{name}.yaml"] for name in ON_DOLLY] + variants()
    return [load_recipe(find_recipe(name), overrides) for file, *overrides in lines
            if (name := file.removesuffix(".yaml")) in ON_DOLLY]


def test_a_run_on_dolly_is_evaluated_each_epoch_and_its_rate_ends_at_1e_7():
    for recipe in on_dolly():
        # Dolly's rows that are not held out, as their code reads them.
        an_epoch = 11_435 // recipe.train.global_batch_size
        assert recipe.train.epochs == (10 if "760M" in recipe.student.model else 20)
        assert recipe.train.eval_every == recipe.checkpoint.every == an_epoch
        steps = recipe.train.epochs * an_epoch
        train = recipe.train.model_copy(update={"steps": steps, "epochs": None})
        assert learning_rate(train, 0) in (1e-4, 5e-4)
        assert learning_rate(train, steps) == pytest.approx(1e-7)
        assert recipe.checkpoint.best.metric == "eval.heldout.rouge_l"


@pytest.mark.parametrize("name", ON_DOLLY)
def test_dollys_long_rows_keep_their_prompts(name):
    data = load_recipe(find_recipe(name)).data
    assert {rows.truncate for rows in (*data.train, *data.eval)} == {"right"}


def test_recipes_are_listed_copied_once_and_named_when_mistyped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(line in listed
               for line in ("amid_gpt2_dolly      AMiD (arXiv 2510.15982)", "gkd ", "pretrain "))
    assert main(["recipes", "copy", "pretrain"]) == 0
    assert capsys.readouterr().out == "pretrain.yaml\n"
    assert (tmp_path / "pretrain.yaml").read_bytes() == find_recipe("pretrain").read_bytes()
    assert main(["recipes", "copy", "pretrain"]) == 2 and "not there yet" in capsys.readouterr().err
    assert main(["recipes", "copy", "amid_gpt2_doly"]) == 2
    assert "did you mean `amid_gpt2_dolly`?" in capsys.readouterr().err
