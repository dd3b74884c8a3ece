"""The packaged recipes: each one is parsed, planned and run for two steps on small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.data import write_jsonl
from support.ranks import run_ranks
from support.runs import read_metrics

from amid_ds import amid_loss
from amid_ds.cli import main
from amid_ds.config.library import RECIPES_FOLDER, find_recipe
from amid_ds.config.parse import load_recipe
from amid_ds.config.schedule import learning_rate
from amid_ds.training.objective import objective_at

# Recipe -> its models' family, ranks, and the overrides that make it small.
STAND_INS = {
    "amid_gpt2_dolly": ("gpt2", 1, ["train.global_batch_size=2", "train.micro_batch_size=2",
                                    "rollout.max_new_tokens=8",
                                    "rollout.adaptive.init_threshold=1.0"]),
    "distillm_gpt2_dolly": ("gpt2", 1, ["train.global_batch_size=2", "train.micro_batch_size=2",
                                        "rollout.max_new_tokens=8",
                                        "rollout.adaptive.init_threshold=1.0"]),
    "gkd": ("gpt2", 1,
            ["train.global_batch_size=2", "train.micro_batch_size=2", "rollout.max_new_tokens=8",
             "rollout.share=1.0"]),
    "pretrain": ("llama", 2, ["tensor_parallel=2", "train.global_batch_size=2"]),
    "study": ("llama", 1, ["train.global_batch_size=2", "train.micro_batch_size=2"]),
}


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> Path:
    """Instructions in the columns of the published sets."""
    rows = [{"instruction": "the river", "input": "",
             "output": "sings over the stone " * (1 + number % 3)}
            for number in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("recipes") / "instructions.jsonl", rows)


def test_every_recipe_has_its_stand_in():
    assert {path.stem for path in RECIPES_FOLDER.glob("*.yaml")} == set(STAND_INS)


@pytest.mark.parametrize("name", STAND_INS)
def test_a_recipe_is_parsed_planned_and_runs_two_steps(shared_model, text_file, instructions,
                                                       tmp_path, capsys, name):
    family, ranks, smaller = STAND_INS[name]
    recipe = load_recipe(find_recipe(name))
    data = text_file if recipe.data.train[0].is_text else instructions
    overrides = [f"student.model={shared_model(family, 0)}",
                 f"teacher.model={shared_model(family, 1)}", f"data.train.0.path={data}",
                 f"data.eval.0.path={data}", f"data.prepared={tmp_path / 'data'}", "data.workers=0",
                 "train.steps=2", "train.seq_length=96", "train.warmup_steps=0",
                 "train.eval_every=1", "train.log_every=1", f"output_dir={tmp_path / 'run'}",
                 *smaller]
    if recipe.data.auxiliary is not None:
        overrides.append(f"data.auxiliary.path={text_file}")
    assert main(["plan", str(find_recipe(name)), "--ranks-per-node", str(ranks), "--json",
                 *overrides]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    run_ranks(ranks, "train", find_recipe(name), *overrides)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2] and all(line["kd_loss"] > 0 for line in lines)
    assert recipe.rollout is None or all(line["rollout"] for line in lines)
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_the_gkd_recipes_loss_is_its_scripts():
    """0.9 KL(student ‖ m) + 0.1 KL(teacher ‖ m), m = 0.1 teacher + 0.9 student."""
    recipe = load_recipe(find_recipe("gkd"))
    student, teacher = torch.randn(2, 5, 17, generator=torch.Generator().manual_seed(0),
                                   dtype=torch.float64)
    objective = objective_at(recipe.loss, 0, recipe.train.total_steps).amid
    q, p = student.softmax(-1), teacher.softmax(-1)
    m = 0.1 * p + 0.9 * q
    truth = (0.9 * q * (q / m).log() + 0.1 * p * (p / m).log()).sum(-1)
    torch.testing.assert_close(amid_loss(student, teacher, objective), truth)


@pytest.mark.parametrize(("name", "peak"), [("amid_gpt2_dolly", 1e-4),
                                            ("distillm_gpt2_dolly", 5e-4), ("gkd", 5e-4)])
def test_a_papers_run_is_its_scripts_20_epochs_down_to_a_rate_of_1e_7(name, peak):
    train = load_recipe(find_recipe(name)).train
    # Dolly's rows that are not held out, as their code reads them.
    an_epoch = 11_435 // train.global_batch_size
    assert (train.total_steps, train.eval_every) == (20 * an_epoch, an_epoch)
    assert learning_rate(train, 0) == peak
    assert learning_rate(train, train.total_steps) == pytest.approx(1e-7)


@pytest.mark.parametrize("name", ["amid_gpt2_dolly", "distillm_gpt2_dolly", "gkd"])
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
