"""Delta-KD: the teacher's shift since its base, added to the student's base, is one teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.losses import LossProblem
from support.models import WORDS, make_model
from support.nodes import train_on_nodes
from support.ranks import Ranks
from support.reference_loop import reference_loop
from support.runs import comparable_metrics, read_metrics, write_gathering_config, write_recipe
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from amid_ds.cli import main
from amid_ds.config.parse import load_recipe
from amid_ds.errors import InputError
from amid_ds.losses import AMiD, LMHead, SummedHead, linear_amid_loss, linear_argmax
from amid_ds.losses.reference import naive_loss
from amid_ds.training.job import check_recipe

SCALE = 0.7


@pytest.fixture(scope="module")
def models(shared_model) -> dict[str, Path]:
    """Of different widths and heads: the teacher's logits are scaled, its base's are capped."""
    return {"student": shared_model("llama", 0), "student_base": shared_model("llama-tied", 3),
            "teacher": shared_model("llama", 1, hidden_size=64, intermediate_size=96),
            "base": shared_model("gemma2", 2)}


def target(models: dict[str, Path], scale: float = SCALE):
    """ids [1, L] -> z_student_base + scale · (log p_T - log p_base), in float64."""
    loaded = {name: AutoModelForCausalLM.from_pretrained(models[name])
              for name in ("teacher", "base", "student_base")}

    def logits(ids):
        z = {name: model(ids).logits.double() for name, model in loaded.items()}
        return (z["student_base"]
                + scale * (z["teacher"].log_softmax(-1) - z["base"].log_softmax(-1)))
    return logits


def delta(models: dict[str, Path], scale: float = SCALE) -> dict:
    own = {} if models["student_base"] == models["student"] else {
        "student_base": {"model": str(models["student_base"])}}
    return {"base": {"model": str(models["base"])}, "scale": scale, **own}


def write_delta(folder: Path, models: dict[str, Path], data: Path, out: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_recipe(folder / "recipe.yaml", models["student"], models["teacher"], data, out,
                        **{"teacher__delta": delta(models),
                           "deepspeed": str(write_gathering_config(folder)), **changes})


def train(ranks: int, recipe: Path, *overrides: str) -> None:
    processes = Ranks(ranks, "train", recipe, *overrides)
    assert processes.wait() == [0] * ranks, processes.output()


@pytest.fixture(scope="module")
def truth(models, text_file, tmp_path_factory):
    """(metrics of plain torch over the four models, the prepared data)."""
    folder = tmp_path_factory.mktemp("truth")
    recipe = write_delta(folder, models, text_file, folder / "run",
                         data__prepared=str(folder / "data"))
    train(1, recipe)
    lines, _ = reference_loop(models["student"], target(models),
                              yaml.safe_load(recipe.read_text()), folder / "data")
    return lines, folder / "data", folder / "run"


@pytest.mark.parametrize("ranks, overrides", [
    (2, ()), (2, ("tensor_parallel=2",)),
    pytest.param(2, ("teacher.placement=replicated",), marks=pytest.mark.slow),
    pytest.param(1, ("deepspeed=ds_configs/zero1_fp32.json",), marks=pytest.mark.slow),
    pytest.param(2, ("teacher.placement=node", "teacher.shard_over=1"), marks=pytest.mark.slow),
    pytest.param(4, ("tensor_parallel=2",), marks=pytest.mark.slow)])
def test_a_run_equals_plain_torch_over_the_four_models(models, text_file, truth, tmp_path, ranks,
                                                       overrides):
    lines, prepared, _ = truth
    recipe = write_delta(tmp_path, models, text_file, tmp_path / "run",
                         data__prepared=str(prepared))
    train(ranks, recipe, *overrides)
    for ours, expected in zip(read_metrics(tmp_path / "run"), lines, strict=True):
        assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_with_the_same_digits(models, text_file, truth, tmp_path):
    _, prepared, whole = truth
    recipe = write_delta(tmp_path, models, text_file, tmp_path / "run",
                         data__prepared=str(prepared))
    train_on_nodes(1, recipe, tmp_path / "run", stop_at=3)
    train(1, recipe)
    assert comparable_metrics(tmp_path / "run") == comparable_metrics(whole)


@pytest.mark.slow
def test_a_teacher_that_is_its_own_base_leaves_the_students_base(models, text_file, tmp_path):
    """Evaluations too are against it."""
    held = {"data__eval": [{"path": str(text_file)}]}
    alone = write_recipe(tmp_path / "alone.yaml", models["student"], models["student_base"],
                         text_file, tmp_path / "alone", train__steps=2, **held)
    own = write_delta(tmp_path / "own", {**models, "base": models["teacher"]}, text_file,
                      tmp_path / "run", train__steps=2, **held)
    for recipe in (alone, own):
        train(1, recipe)
    for ours, expected in zip(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "alone"),
                              strict=True):
        for key in ("loss", "kd_loss", "ce_loss", "grad_norm"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-6)
    ours, expected = (json.loads((tmp_path / run / "eval.jsonl").read_text().splitlines()[-1])
                      for run in ("run", "alone"))
    assert ours["kl_to_teacher"] == pytest.approx(expected["kl_to_teacher"], rel=1e-5)
    assert ours["top1_agreement"] == expected["top1_agreement"]


@pytest.mark.slow
def test_without_a_students_base_it_is_the_student_as_it_begins(models, text_file, truth, tmp_path):
    """With a scale of 0 the first step has no divergence then, and the next ones have one."""
    _, prepared, _ = truth
    alone = {**models, "student_base": models["student"]}
    recipe = write_delta(tmp_path, alone, text_file, tmp_path / "run", train__steps=3,
                         data__prepared=str(prepared), teacher__delta=delta(alone, 0.0))
    train(1, recipe)
    divergences = [line["kd_loss"] for line in read_metrics(tmp_path / "run")]
    assert abs(divergences[0]) < 1e-9 and divergences[2] > 1e-6


def test_the_plan_names_each_model_and_is_what_a_run_holds(models, text_file, truth, tmp_path,
                                                           capsys):
    _, prepared, _ = truth
    recipe = write_delta(tmp_path, models, text_file, tmp_path / "run",
                         data__prepared=str(prepared))
    train(2, recipe)
    left = json.loads((tmp_path / "run" / "measured.json").read_text())
    assert main(["plan", str(recipe), "--ranks-per-node", "2", "--device", "cpu", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    for section, part in (("memory_per_rank", "teacher_weights"),
                          ("network_per_step", "teacher_gathers")):
        assert plan[section][part] == pytest.approx(left[section][part], rel=0.05)
    frozen = {each["key"]: each for each in plan["frozen_models"]}
    assert {"teacher": "teacher", "teacher.delta.base": "base",
            "teacher.delta.student_base": "student_base"}.keys() == frozen.keys()
    for key, each in frozen.items():
        model = AutoModelForCausalLM.from_pretrained(models[key.rpartition(".")[2]])
        assert each["parameters"] == sum(p.numel() for p in model.parameters())
        assert each["flops"] > 0 and each["gathered_bytes"] > 0
    assert sum(each["weight_bytes"] for each in frozen.values()) == (
        plan["memory_per_rank"]["teacher_weights"])
    assert sum(each["flops"] for each in frozen.values()) == plan["flops_per_step"]["teacher"]
    assert main(["plan", str(recipe), "--ranks-per-node", "2", "--device", "cpu"]) == 0
    assert all(key in capsys.readouterr().out for key in [*frozen][:1])


def test_a_run_does_not_go_on_with_another_base(models, text_file, truth, tmp_path, shared_model):
    """Named otherwise, or under the same name with other weights."""
    _, prepared, _ = truth
    base, student_base = (shutil.copytree(models[name], tmp_path / name)
                          for name in ("base", "student_base"))
    recipe = write_delta(tmp_path, {**models, "base": base, "student_base": student_base},
                         text_file, tmp_path / "run", data__prepared=str(prepared))
    train_on_nodes(1, recipe, tmp_path / "run", stop_at=1)
    told = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert told["teacher.delta.base"]["model"] == str(base)
    assert len({told[key]["files_sha256"] for key in told if key.startswith("teacher")}) == 3
    for changed, source in ((f"teacher.delta.base.model={models['base']}", None),
                            ("teacher.delta.scale=0.6", None), ("", base), ("", student_base)):
        if source is not None:
            kept = (source / "model.safetensors").read_bytes()
            (source / "model.safetensors").write_bytes(kept[:-4] + b"\0\0\0\1")
        refused = Ranks(1, "train", recipe, *filter(None, [changed]))
        assert refused.wait() == [2]
        key = changed.partition("=")[0] or {
            base: "teacher.delta.base.sha256",
            student_base: "teacher.delta.student_base.sha256"}[source]
        assert key in refused.output()
        if source is not None:
            (source / "model.safetensors").write_bytes(kept)


@pytest.mark.parametrize("wrong", ["base", "student_base"])
def test_a_vocabulary_of_another_kind_is_refused_before_anything_loads(models, text_file, tmp_path,
                                                                       wrong, shared_model):
    other = make_model(tmp_path / "other", "llama", words=WORDS[:-1])
    recipe = write_delta(tmp_path, {**models, wrong: other}, text_file, tmp_path / "run")
    with pytest.raises(InputError, match=r"(?s)tokenizer .*other.* differ"):
        check_recipe(load_recipe(recipe), 1)
    recipe = write_delta(tmp_path, {**models, wrong: tmp_path / "nowhere"}, text_file,
                         tmp_path / "run")
    with pytest.raises(InputError, match="nowhere"):
        check_recipe(load_recipe(recipe), 1)


def test_a_cached_teacher_has_no_delta(models, text_file, tmp_path):
    recipe = write_delta(tmp_path, models, text_file, tmp_path / "run")
    raw = yaml.safe_load(recipe.read_text())
    del raw["teacher"]["model"]
    raw["teacher"]["cached"] = str(tmp_path)
    recipe.write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError, match=r"`teacher.delta` is unknown"):
        load_recipe(recipe)


OBJECTIVES = [AMiD(-1.0, 0.3), AMiD(0.5, 0.4, order="rq", temperature=1.7)]


@pytest.mark.parametrize("backend, dtype, bound", [
    ("torch", torch.float64, 1e-12), ("torch", torch.float32, 1e-5),
    ("triton", torch.float32, 1e-5), ("torch", torch.bfloat16, 2e-2),
    ("triton", torch.bfloat16, 2e-2)])
def test_a_sum_of_heads_is_the_loss_of_the_summed_logits(backend, dtype, bound):
    """One head has a bias and a scale, one neither, one a cap; several blocks."""
    draw = torch.Generator().manual_seed(5)
    low = LossProblem(dtype=torch.float64).to(dtype)
    hidden = [low.teacher, *(torch.randn(11, width, generator=draw).to(dtype) for width in (6, 5))]
    weights = [low.teacher_weight, *(torch.randn(44, width, generator=draw).to(dtype) / 2
                                     for width in (6, 5))]
    bias = torch.randn(44, generator=draw).to(dtype)
    heads = SummedHead((LMHead(weights[0], bias, scale=0.5), LMHead(weights[1]),
                        LMHead(weights[2], softcap=3.0)), (SCALE, -SCALE, 1.0))
    first, second, third = (h.double() @ w.double().t()
                            for h, w in zip(hidden, weights, strict=True))
    teacher = SCALE * (0.5 * (first + bias.double()) - second) + 3 * (third / 3).tanh()
    teacher, joined = teacher[:, :low.vocab_size], torch.cat(hidden, -1)
    truth = low.to(torch.float64)
    for objective in OBJECTIVES[:1 if backend == "triton" else 2]:
        student = F.linear(truth.student, truth.weight, truth.bias)[:, :low.vocab_size]
        expected = (low.weights * naive_loss(student, teacher, objective)).sum()
        out = linear_amid_loss(low.student, LMHead(low.weight, low.bias), joined, heads, objective,
                               token_weights=low.weights, vocab_size=low.vocab_size,
                               backend=backend, workspace_bytes=3_000)
        assert out.loss.item() == pytest.approx(expected.item(), rel=bound)
        for ours, theirs in zip(low.gradients(out.loss), truth.gradients(expected), strict=True):
            assert (ours.double() - theirs).norm() < bound * theirs.norm()
    chosen = linear_argmax(joined, heads, vocab_size=low.vocab_size)
    assert torch.equal(chosen, teacher.argmax(-1))
