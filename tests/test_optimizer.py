"""The optimizer is torch's AdamW, or Muon, in every layout; its groups survive any other layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from support.checkpoints import copy_old_runs
from support.patches import rank_without_compiler
from support.ranks import Ranks, rank_main, run_ranks
from support.reference_loop import reference_loop
from support.reference_muon import ReferenceMuon
from support.runs import read_metrics, write_recipe
from transformers import AutoModelForCausalLM

from amid_ds.cli import main
from amid_ds.config.parse import dump_recipe, load_recipe
from amid_ds.config.recipe import Train
from amid_ds.engine.optimizer import options_kept, parameter_groups
from amid_ds.errors import InputError, TrainingError
from amid_ds.models.loading import meta_model
from amid_ds.training.compatibility import changes_since_last_attempt, pin, refuse_other_run

STEPS, EVERY = 20, 5
# Of losses, norms and weights, relative; a wrong decay makes a difference of 1 %.
TOLERANCE = 1e-5
MUON = {"train__optimizer": "muon", "train__muon": {"learning_rate": 0.01, "momentum": 0.9}}


@pytest.fixture(scope="module")
def recipe_for(shared_model, instructions_file, tmp_path_factory) -> Callable[..., Path]:
    """recipe_for(run, student, **changes): a recipe of 20 steps with a strong decay."""
    prepared = tmp_path_factory.mktemp("prepared") / "data"

    def write(run: Path, student: str = "llama-tied", **changes) -> Path:
        settings = {"train__steps": STEPS, "train__learning_rate": 1e-3, "train__weight_decay": 0.5,
                    "data__prepared": str(prepared), **changes}
        return write_recipe(run.with_suffix(".yaml"), shared_model(student, 0),
                            shared_model("llama", 1), instructions_file, run, **settings)
    return write


def config_of_stage(folder: Path, stage: int) -> Path:
    path = folder / f"stage{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return path


def exported(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the run's model."""
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def farthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The greatest relative difference of a parameter."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


def assert_is_the_reference(run: Path, recipe: Path, **options) -> None:
    """The run's losses, norms, rates and weights are the plain loop's of its recipe."""
    values = yaml.safe_load(recipe.read_text())
    lines, weights = reference_loop(Path(values["student"]["model"]),
                                    Path(values["teacher"]["model"]), values,
                                    Path(values["data"]["prepared"]), **options)
    for line, truth in zip(read_metrics(run), lines, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert line[key] == pytest.approx(truth[key], rel=TOLERANCE), (line["step"], key)
    assert farthest(exported(run), weights) < TOLERANCE


# Ranks, tensor_parallel, ZeRO stage, decay_all.
LAYOUTS = [(1, 1, 3, False), (2, 1, 3, True)]
GRID = [(ranks, tp, stage, decay_all)
        for ranks, tp in ((1, 1), (2, 1), (2, 2)) for stage in range(4)
        for decay_all in (False, True) if (ranks, tp, stage, decay_all) not in LAYOUTS]


@pytest.mark.parametrize(("ranks", "tp", "stage", "decay_all"),
                         [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.slow)
                                      for case in GRID)])
def test_a_run_is_that_of_torchs_adamw_with_two_groups(ranks, tp, stage, decay_all, recipe_for,
                                                       tmp_path):
    recipe = recipe_for(tmp_path / "run", tensor_parallel=tp, train__decay_all=decay_all,
                        train__betas=[0.8, 0.9], train__eps=1e-6,
                        deepspeed=str(config_of_stage(tmp_path, stage)))
    run_ranks(ranks, "train", recipe)
    assert_is_the_reference(tmp_path / "run", recipe)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_muon_is_its_authors_for_the_bodys_matrices_and_adamw_for_all_else(ranks, recipe_for,
                                                                           tmp_path):
    recipe = recipe_for(tmp_path / "run", "llama", **MUON)
    run_ranks(ranks, "train", recipe, target=rank_without_compiler)
    assert_is_the_reference(tmp_path / "run", recipe, make_optimizer=ReferenceMuon)
    groups = json.loads((tmp_path / "run" / "provenance.json").read_text())["optimizer"]["groups"]
    assert {name: counts["tensors"] for name, counts in groups.items()} == {
        "muon": 14, "decayed": 1, "plain": 6}
    assert sum(counts["elements"] for counts in groups.values()) == sum(
        tensor.numel() for tensor in exported(tmp_path / "run").values())
    lines = read_metrics(tmp_path / "run")
    # Some steps are clipped: by the norm of the gradients, which the reference has.
    assert max(line["grad_norm"] for line in lines) > 1
    for line in lines:
        assert line["learning_rate_muon"] == pytest.approx(10 * line["learning_rate"], rel=1e-12)


EXPECTED = {  # by family: (its embeddings, the rest of what is not decayed), as patterns of names
    "gpt2": ("wte wpe", "ln_1 ln_2 ln_f bias"),
    "llama": ("embed_tokens", "norm"),
    "llama-tied": ("embed_tokens", "norm"),
    "qwen3": ("embed_tokens", "norm"),
    "gemma2": ("embed_tokens", "norm"),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_matrices_that_are_no_embedding_are_decayed_and_muon_has_those_of_the_body(family,
                                                                                  shared_model):
    model = meta_model(str(shared_model(family, 0)))
    plain = " ".join(EXPECTED[family]).split()
    steps = {"steps": 1, "global_batch_size": 1}
    for name, group in parameter_groups(model, Train(**steps)).items():
        assert group == ("plain" if any(part in name for part in plain) else "decayed"), name
    for name, group in parameter_groups(model, Train(**steps, optimizer="muon")).items():
        expected = ("plain" if any(part in name for part in plain)
                    else "decayed" if name == "lm_head.weight" else "muon")
        assert group == expected, name
    assert set(parameter_groups(model, Train(**steps, decay_all=True)).values()) == {"decayed"}


def stop_after(run: Path, step: int) -> None:
    """Take back what the finished run did after the checkpoint of `step`."""
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "model")


@pytest.fixture(scope="module")
def run_of_two(recipe_for, tmp_path_factory) -> Path:
    """A finished run of two ranks under ZeRO-3, with its checkpoints after half of its steps."""
    run = tmp_path_factory.mktemp("two") / "run"
    run_ranks(2, "train", recipe_for(run, checkpoint__every=EVERY, checkpoint__keep=3))
    return run


@pytest.mark.parametrize(("ranks", "tp", "stage"), [
    (1, 1, 0), *(pytest.param(*case, marks=pytest.mark.slow)
                 for case in ((2, 2, 3), (1, 1, 2), (1, 1, 1), (2, 1, 0), (4, 2, 2)))])
def test_in_another_layout_each_group_keeps_its_moments_and_its_decay(ranks, tp, stage, run_of_two,
                                                                      recipe_for, tmp_path):
    truth, moved = exported(run_of_two), tmp_path / "run"
    shutil.copytree(run_of_two, moved)
    stop_after(moved, 2 * EVERY)
    recipe = recipe_for(moved, checkpoint__every=EVERY)
    run_ranks(ranks, "train", recipe, f"tensor_parallel={tp}",
              f"deepspeed={config_of_stage(tmp_path, stage)}")
    assert farthest(exported(moved), truth) < TOLERANCE
    # And back, from what that layout has saved.
    stop_after(moved, 3 * EVERY)
    assert "converting it once" in run_ranks(2, "train", recipe).output()
    assert farthest(exported(moved), truth) < TOLERANCE


@pytest.mark.parametrize(("config", "ranks"), [
    ("zero3_fp32", 1), *(pytest.param(*case, marks=pytest.mark.slow)
                         for case in (("zero3_fp32", 2), ("zero3", 1), ("zero3", 2)))])
def test_muons_momentum_goes_on_in_the_same_layout_and_in_another(config, ranks, recipe_for,
                                                                  tmp_path):
    settings = {"train__steps": 6, "checkpoint__every": 3, "deepspeed": f"ds_configs/{config}.json",
                **MUON}
    whole = tmp_path / "whole"
    run_ranks(2, "train", recipe_for(whole, **settings), target=rank_without_compiler)
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    stop_after(moved, 3)
    run_ranks(ranks, "train", recipe_for(moved, **settings), target=rank_without_compiler)
    # On one rank gradients are summed in another order, in bf16 too.
    tolerance = 0.0 if ranks == 2 else 1e-5 if config == "zero3_fp32" else 1e-2
    assert farthest(exported(moved), exported(whole)) <= tolerance


def test_another_optimizer_is_never_an_allowed_change(run_of_two, recipe_for, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run_of_two, moved)
    ranks = Ranks(1, "train", recipe_for(moved, checkpoint__every=EVERY, **MUON),
                  "checkpoint.allow_change=[train]")
    assert ranks.wait() == [2], ranks.output()
    assert "train.optimizer: 'adamw' before, 'muon' now" in ranks.output()


def exchanged_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a rank whose optimizer decays what is to be left alone, and no other."""
    from amid_ds.engine import build

    right = build.parameter_groups
    other = {"decayed": "plain", "plain": "decayed"}
    build.parameter_groups = lambda *given: {name: other[group]
                                             for name, group in right(*given).items()}
    rank_main(argv, variables, log)


def test_exchanged_groups_would_change_the_run(run_of_two, recipe_for, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run_of_two, moved)
    stop_after(moved, 2 * EVERY)
    recipe = recipe_for(moved, checkpoint__every=EVERY)
    run_ranks(1, "train", recipe, target=exchanged_rank)
    assert farthest(exported(moved), exported(run_of_two)) > 100 * TOLERANCE


def two_groups(names: tuple[str, str], decay: float) -> torch.optim.AdamW:
    """An optimizer of two groups of one parameter each, after a step."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in names]
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "name": group, "names": [name], "weight_decay": decay}
         for parameter, name, group in zip(parameters, names, ("decayed", "plain"), strict=True)],
        fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    return optimizer


def test_a_checkpoint_gives_its_moments_and_not_its_options_and_no_other_parameters_moments():
    ours = two_groups(("a", "b"), decay=0.1)
    with options_kept(SimpleNamespace(optimizer=ours)):
        ours.load_state_dict(two_groups(("a", "b"), decay=0.7).state_dict())
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.1]
    with (pytest.raises(TrainingError, match="group `decayed` has other parameters"),
          options_kept(SimpleNamespace(optimizer=ours))):
        ours.load_state_dict(two_groups(("b", "a"), decay=0.1).state_dict())


@pytest.mark.parametrize("decay_all", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_allowed_change_of_decay_takes_effect_in_the_same_layout_as_in_another(
        decay_all, run_of_two, recipe_for, tmp_path):
    weights = []
    changes = ("train.weight_decay=0.9", f"train.decay_all={str(decay_all).lower()}",
               "checkpoint.allow_change=[train.decay_all, train.weight_decay]")
    for ranks in (2, 1):
        moved = tmp_path / str(ranks)
        shutil.copytree(run_of_two, moved)
        stop_after(moved, 2 * EVERY)
        run_ranks(ranks, "train", recipe_for(moved, checkpoint__every=EVERY), *changes)
        weights.append(exported(moved))
    assert farthest(weights[0], weights[1]) < TOLERANCE
    changed, before = weights[0], exported(run_of_two)
    assert farthest(changed, before) > 50 * TOLERANCE
    # A norm's weights begin at 1, and are decayed with all others alone.
    shrunk = before["model.norm.weight"].mean() - changed["model.norm.weight"].mean()
    assert (shrunk > 1e-3) == decay_all


@pytest.mark.parametrize(("target", "said"), [
    (rank_without_compiler, "this test has no compiler"),
    pytest.param(rank_main, "CPU Adam is ready", marks=pytest.mark.slow)])
def test_offloaded_state_is_stepped_by_cpu_adam_or_with_a_warning_by_torch(
        target, said, run_of_two, recipe_for, tmp_path):
    config = tmp_path / "offload.json"
    config.write_text(json.dumps({"zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    moved = tmp_path / "run"
    shutil.copytree(run_of_two, moved)
    stop_after(moved, 2 * EVERY)
    # Half of the steps were made by torch's AdamW, on the device.
    recipe = recipe_for(moved, checkpoint__every=EVERY)
    output = run_ranks(2, "train", recipe, f"deepspeed={config}", target=target).output()
    assert said in output and output.count("torch's fused AdamW steps") == ("this test" in said)
    assert farthest(exported(moved), exported(run_of_two)) < TOLERANCE


def test_a_run_of_version_0_1_keeps_what_that_version_did_where_its_recipe_says_nothing(
        tmp_path, monkeypatch):
    monkeypatch.chdir(copy_old_runs(tmp_path))
    old, saved = load_recipe("stream.yaml"), Path("stream/recipe.yaml")
    for _ in range(2):
        kept = pin(old)
        assert kept.train.decay_all and kept.train.weight_decay == 0.01
        assert kept.train.betas == [0.9, 0.999] != old.train.betas
        assert kept.student.router_aux_loss == 0 != old.student.router_aux_loss
        refuse_other_run(kept)
        assert changes_since_last_attempt(kept) == {}
        # As the first start of this version leaves it.
        saved.write_text(dump_recipe(kept))
    changed = pin(load_recipe("stream.yaml", ["train.betas=[0.9, 0.95]"]))
    with pytest.raises(InputError, match=r"train\.betas\.1: 0\.999 before, 0\.95 now"):
        refuse_other_run(changed)
    changed = pin(load_recipe("stream.yaml", ["student.router_aux_loss=auto"]))
    with pytest.raises(InputError, match=r"student\.router_aux_loss: 0\.0 before, 'auto' now"):
        refuse_other_run(changed)


BAD = {
    "all at once": (["train.betas=[0.9, 1.0]", "train.eps=0", "train.weight_decay=-1",
                     "train.muon.momentum=0.9"],
                    ["`train.betas.1`: found 1.0", "`train.eps`: found 0", "`train.weight_decay`",
                     "`train.muon`; `train.optimizer` is adamw", "has 4 problem(s)"]),
    "one beta": (["train.betas=[0.9]"], ["`train.betas`"]),
    "8 bits": (["train.optimizer=adamw_8bit"], ["'adamw' or 'muon'"]),
    "a stage": (["train.optimizer=muon", "deepspeed=ds_configs/zero2.json"],
                ["zero_optimization.stage: 2", "optimizer: muon in the recipe needs stage 3"]),
    "offload": (["train.optimizer=muon", "deepspeed=ds_configs/zero3_offload.json"],
                ["offload_optimizer in zero3_offload.json", "muon in the recipe needs all on"]),
    "tensor parallelism": (["train.optimizer=muon", "tensor_parallel=2"],
                           ["muon in the recipe needs whole matrices"]),
}


@pytest.mark.parametrize("wrong", BAD)
def test_what_no_optimizer_can_be_is_refused_before_a_model_is_read(wrong, recipe_for, tmp_path,
                                                                    capsys):
    overrides, messages = BAD[wrong]
    ranks = 2 if "tensor_parallel=2" in overrides else 1
    assert main(["plan", str(recipe_for(tmp_path / "run")), "--ranks-per-node", str(ranks),
                 *overrides]) == 2
    found = capsys.readouterr().err
    for message in messages:
        assert message in found
