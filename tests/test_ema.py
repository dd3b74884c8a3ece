"""Running means of the student: the one that teaches, and the one that is exported."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.patches import patch_train_step, rank_without_compiler
from support.ranks import Ranks, rank_main, run_ranks
from support.reference_loop import reference_loop
from support.runs import (
    comparable_results,
    read_metrics,
    write_gathering_config,
    write_recipe,
)
from transformers import AutoModelForCausalLM

from amid_ds.checkpoint.card import exported_step
from amid_ds.checkpoint.zero_shards import ZeroShards, trained_shapes
from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError
from amid_ds.models.adapters import file_key
from amid_ds.models.loading import meta_model
from amid_ds.models.trained import choose_trained
from amid_ds.planning.devices import find_device
from amid_ds.planning.estimate import estimate_plan
from amid_ds.run.log import read_evaluations
from amid_ds.training.job import check_recipe

TEACHING, EXPORTED, STEPS = 0.5, 0.75, 6


@pytest.fixture
def recipe_for(instructions_file, tmp_path):
    """recipe_for(student, name, **changes): a recipe whose teacher is the student's mean."""
    def write(student: Path, name: str, **changes) -> Path:
        settings = {"train__ema": EXPORTED, "data__prepared": str(tmp_path / "data"),
                    "data__eval": [{"name": "all", "path": str(instructions_file),
                                    "prompt": "prompt", "response": "response"}],
                    "train__steps": STEPS, **changes}
        path = write_recipe(tmp_path / f"{name}.yaml", student, student, instructions_file,
                            tmp_path / name, **settings)
        recipe = yaml.safe_load(path.read_text())
        recipe["teacher"] = {"ema": TEACHING}
        path.write_text(yaml.safe_dump(recipe))
        return path
    return write


def stopping_rank(stop_after: int, argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank that asks to stop after step `stop_after`."""
    def around(trainer, batch):
        yield
        if trainer.world.is_main and trainer.state.step == stop_after:
            (trainer.job.run.path / "STOP").touch()

    patch_train_step(around)
    rank_main(argv, variables, log)


def zero_config(folder: Path, stage: int, bf16: bool = False) -> Path:
    path = folder / f"stage{stage}{'_bf16' * bf16}.json"
    path.write_text(json.dumps({"bf16": {"enabled": bf16},
                                "zero_optimization": {"stage": stage}}))
    return path


def exported_weights(run: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(run / folder)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_follows(run: Path, truth) -> None:
    lines, weights = truth
    for expected, line in zip(lines, read_metrics(run), strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (line["step"], name)
    for name, weight in exported_weights(run).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_mean_teacher_and_exported_mean_are_a_plain_loops(family, shared_model, recipe_for,
                                                          tmp_path):
    student = shared_model(family, 0, extra_rows=3)
    recipe = recipe_for(student, "run1", deepspeed=str(write_gathering_config(tmp_path)))
    run_ranks(1, "train", recipe)
    truth = reference_loop(student, None, yaml.safe_load(recipe.read_text()), tmp_path / "data")
    # By construction: the mean begins as the student.
    first, *others = read_metrics(tmp_path / "run1")
    assert abs(first["kd_loss"]) < 1e-6
    assert all(line["kd_loss"] > 1e-5 for line in others)
    assert_follows(tmp_path / "run1", truth)
    # Small weights stay whole here, from one step to the next.
    run_ranks(2, "train", recipe, f"output_dir={tmp_path / 'run2'}",
              "deepspeed=ds_configs/zero3_fp32.json")
    assert_follows(tmp_path / "run2", truth)


def test_a_run_that_stopped_goes_on_to_the_last_digit(shared_model, recipe_for, tmp_path):
    best = {"every": 100, "best": {"metric": "eval.all.kl_to_teacher", "mode": "min"}}
    whole, stopped = (recipe_for(shared_model("llama", 0), name, checkpoint=best,
                                 train__eval_every=2) for name in ("whole", "stopped"))
    run_ranks(2, "train", whole)
    ranks = Ranks(2, "train", stopped, target=functools.partial(stopping_rank, 3))
    assert ranks.wait() == [75, 75], ranks.output()
    run_ranks(2, "train", stopped)
    assert comparable_results(tmp_path / "stopped") == comparable_results(tmp_path / "whole")
    for model in ("model", "best"):
        first, second = (exported_weights(tmp_path / name, model) for name in ("whole", "stopped"))
        assert all(torch.equal(first[name], second[name]) for name in first)
    # The step is chosen by the student's distance to the mean that teaches; the weights are the
    # mean that is exported.
    distances = {line["step"]: line["kl_to_teacher"]
                 for line in read_evaluations(tmp_path / "whole")}
    step = exported_step(tmp_path / "whole" / "best")
    assert len(distances) == 3 and step == min(distances, key=lambda each: distances[each])
    shards = ZeroShards(tmp_path / "whole" / "checkpoints" / f"step_{step:08d}",
                        {name: weight.shape for name, weight in first.items()})
    assert all(torch.equal(first[name], shards.whole(name, "ema")) for name in first)


# (ranks, tensor_parallel, ZeRO stage, last step) of each attempt.
CHAIN = [(2, 1, 3, 2), (2, 2, 3, 4), (1, 1, 0, STEPS)]
WITHOUT_A_TEACHER = [(2, 2, 2, 2), (1, 1, 0, 3), (2, 1, 1, 5), (1, 1, 3, STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("chain", [CHAIN, WITHOUT_A_TEACHER], ids=["teacher", "exported"])
def test_means_move_through_layouts(chain, shared_model, recipe_for, tmp_path):
    student = shared_model("qwen3", 0, extra_rows=2)
    recipe = recipe_for(student, "moved")
    if chain is WITHOUT_A_TEACHER:
        settings = yaml.safe_load(recipe.read_text())
        settings["teacher"] = {"model": str(student)}
        recipe.write_text(yaml.safe_dump(settings))
    for ranks, tp, stage, last in chain:
        started = Ranks(ranks, "train", recipe, f"tensor_parallel={tp}",
                        f"deepspeed={zero_config(tmp_path, stage)}",
                        target=functools.partial(stopping_rank, last))
        assert started.wait() == [0 if last == STEPS else 75] * ranks, started.output()
    whole = recipe_for(student, "whole")
    whole.write_text(recipe.read_text())
    run_ranks(1, "train", whole, f"output_dir={tmp_path / 'whole'}",
              f"deepspeed={zero_config(tmp_path, 3)}")
    for ours, theirs in zip(*map(read_metrics, (tmp_path / "moved", tmp_path / "whole")),
                            strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["kd_loss"] == pytest.approx(theirs["kd_loss"], rel=1e-3, abs=1e-6)
    moved, expected = (exported_weights(tmp_path / name) for name in ("moved", "whole"))
    for name, weight in expected.items():
        torch.testing.assert_close(moved[name], weight, rtol=0, atol=2e-5, msg=name)


OFFLOADED = {"device": "cpu"}
CONFIGS = {
    "bf16, tensor parallel": (2, 3, True, {}, {"tensor_parallel": 2}),
    "bf16, stage 0": (1, 0, True, {}, {}),
    "offloaded": (2, 3, True, {"offload_optimizer": OFFLOADED, "offload_param": OFFLOADED}, {}),
    "muon": (2, 3, False, {"reduce_scatter": False}, {"train__optimizer": "muon"}),
    "hpZ": (2, 3, True, {"zero_hpz_partition_size": 2}, {}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (number > 0))
                                  for number, name in enumerate(CONFIGS)])
def test_each_checkpoint_has_the_means_of_the_weights_before_it(name, shared_model, recipe_for,
                                                                tmp_path):
    ranks, stage, bf16, zero, settings = CONFIGS[name]
    student = shared_model("llama", 0)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"bf16": {"enabled": bf16},
                                  "zero_optimization": {"stage": stage, **zero}}))
    recipe = recipe_for(student, "run", deepspeed=str(config), train__steps=3,
                        checkpoint={"every": 1, "keep": 3}, **settings)
    run_ranks(ranks, "train", recipe, target=rank_without_compiler)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype).float()
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shapes = {name: weight.shape for name, weight in start.items()}
    means = {"ema": (EXPORTED, dict(start)), "teacher_ema": (TEACHING, dict(start))}
    for step in range(1, 4):
        shards = ZeroShards(tmp_path / "run" / "checkpoints" / f"step_{step:08d}", shapes)
        for kind, (decay, mean) in means.items():
            for each in shapes:
                mean[each] = decay * mean[each] + (1 - decay) * shards.whole(each, "fp32")
                torch.testing.assert_close(shards.whole(each, kind), mean[each], rtol=1e-6,
                                           atol=1e-8)
    for each, weight in exported_weights(tmp_path / "run").items():
        assert torch.equal(weight, shards.whole(each, "ema").to(dtype).to(weight.dtype)), each
    # The teacher's body runs over the whole window at once.
    assert abs(read_metrics(tmp_path / "run")[0]["kd_loss"]) < (1e-3 if bf16 else 1e-6)


def test_the_plan_counts_both_means_and_the_teacher_that_one_is(shared_model, recipe_for, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
             "num_key_value_heads": 2}
    student = shared_model("llama", 0, **sizes)
    recipe = recipe_for(student, "run", train__steps=5,
                        deepspeed=str(write_gathering_config(tmp_path)))
    run_ranks(2, "train", recipe)
    plan = estimate_plan(load_recipe(recipe), 1, 2, find_device("cpu", 2))
    measured = json.loads((tmp_path / "run" / "measured.json").read_text())
    weights = plan.memory_per_rank["student_weights"]
    assert plan.memory_per_rank["means"] == 2 * weights
    assert plan.memory_per_rank["teacher_weights"] == weights
    for part in ("means", "teacher_weights", "optimizer"):
        assert measured["memory_per_rank"][part] == pytest.approx(plan.memory_per_rank[part],
                                                                  rel=0.05), part
    for part, size in measured["network_per_step"].items():
        assert plan.network_per_step[part] == pytest.approx(size, rel=0.05), part
    assert plan.read_at_start.teacher == 0 and not plan.placements
    assert plan.placement.reason == "it is partitioned as the student is"
    folder = tmp_path / "run" / "checkpoints" / "step_00000005"
    saved = sum(path.stat().st_size for path in folder.glob("*optim_states.pt"))
    assert saved == pytest.approx(plan.checkpoint_bytes, rel=0.05)


@pytest.mark.parametrize("changes, found", [
    (["teacher.ema=1.0"], "teacher.ema"),
    (["teacher.ema=0"], "teacher.ema"),
    (["train.ema=1"], "train.ema"),
    (["teacher.model=somewhere"], "teacher.model"),
    (["student.freeze=[lm_head.*]"], "trains whole"),
    (["student.lora={}"], "trains whole"),
    (["deepspeed=STAGE1"], "teacher.ema in the recipe needs stage 3 or 0"),
    (["deepspeed=STAGE2"], "teacher.ema in the recipe needs stage 3 or 0"),
])
def test_means_that_cannot_be_are_refused_by_name(changes, found, shared_model, recipe_for,
                                                  tmp_path):
    recipe = recipe_for(shared_model("llama", 0), "run")
    for stage in (1, 2):
        changes = [each.replace(f"STAGE{stage}", str(zero_config(tmp_path, stage)))
                   for each in changes]
    with pytest.raises(InputError, match=re.escape(found)):
        check_recipe(load_recipe(recipe, changes), 1)


def test_the_divergence_from_the_mean_may_select_the_best(shared_model, recipe_for):
    best = {"every": 2, "best": {"metric": "eval.all.kl_to_teacher", "mode": "min"}}
    recipe = recipe_for(shared_model("llama", 0), "run", train__eval_every=2, checkpoint=best)
    assert load_recipe(recipe).checkpoint.best is not None


@pytest.mark.parametrize("command", [["generate", "--out", "answers.jsonl"],
                                     ["cache", "--topk", "4"], ["plan", "--cache", "--topk", "4"]])
def test_what_asks_a_model_of_its_own_refuses_a_mean(command, shared_model, recipe_for, capsys):
    name, *options = command
    assert main([name, str(recipe_for(shared_model("llama", 0), "run")), *options]) == 2
    assert "has no `teacher` that is a model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mean_begins_late_only_by_leave(shared_model, recipe_for, tmp_path, capsys):
    recipe = recipe_for(shared_model("llama", 0), "run", checkpoint__every=2)
    ranks = Ranks(1, "train", recipe, "train.ema=null",
                  target=functools.partial(stopping_rank, 2))
    assert ranks.wait() == [75], ranks.output()
    assert main(["train", str(recipe)]) == 2
    assert "train.ema: None before, 0.75 now" in capsys.readouterr().err
    run_ranks(1, "train", recipe, "checkpoint.allow_change=[train.ema]")
    shapes = {name: weight.shape for name, weight in exported_weights(tmp_path / "run").items()}
    shards = [ZeroShards(tmp_path / "run" / "checkpoints" / f"step_{step:08d}", shapes)
              for step in (4, STEPS)]
    assert all(shards[1].kinds(name) == ["fp32", "exp_avg", "exp_avg_sq", "ema", "teacher_ema"]
               for name in shapes)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "running mean of the run's, with a decay of 0.75" in card
    assert "distilled from its own running mean (decay 0.5)" in card


@pytest.mark.slow
@pytest.mark.parametrize("part", [{"student__lora": {"rank": 2, "alpha": 6.0}},
                                  {"student__freeze": ["embed_tokens", "layers.0.*"]}])
def test_the_exported_mean_is_of_what_trains(part, shared_model, instructions_file, tmp_path):
    student, run = shared_model("llama-tied", 0), tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", student, shared_model("llama", 1),
                          instructions_file, run, **part, train__ema=EXPORTED,
                          checkpoint__every=1, checkpoint__keep=STEPS,
                          deepspeed=str(zero_config(tmp_path, 2)))
    run_ranks(2, "train", recipe)
    model, base = meta_model(str(student)), load_file(student / "model.safetensors")
    first = choose_trained(model, load_recipe(recipe).student)
    shapes = trained_shapes(model)
    means = {name: first[name]() if name in first else base[name] for name in shapes}
    for step in range(1, STEPS + 1):
        shards = ZeroShards(run / "checkpoints" / f"step_{step:08}", shapes)
        means = {name: EXPORTED * mean + (1 - EXPORTED) * shards.whole(name, "fp32")
                 for name, mean in means.items()}
    exported = load_file(next((run / "model").glob("*model.safetensors")))
    for name, mean in means.items():
        own = exported[file_key(name) if name in first else name]
        torch.testing.assert_close(own, mean, rtol=1e-5, atol=1e-6)
        assert not torch.equal(own, shards.whole(name, "fp32"))
