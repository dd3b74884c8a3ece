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
from support.data import write_jsonl, write_texts
from support.ranks import run_ranks
from support.runs import read_metrics
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds import AMiD, amid_loss, linear_amid_loss
from amid_ds.cli import main
from amid_ds.config.library import RECIPES_FOLDER, find_recipe
from amid_ds.config.parse import load_recipe
from amid_ds.config.published import published, published_row
from amid_ds.config.recipe import Recipe
from amid_ds.config.schedule import learning_rate
from amid_ds.errors import InputError
from amid_ds.experiments.chain import plan_chain
from amid_ds.models.distiller import StepObjectives
from amid_ds.training.objective import objective_at, objectives_at

SMALL_BATCH = ["train.global_batch_size=2", "train.micro_batch_size=2"]
ADAPTIVE = [*SMALL_BATCH, "rollout.max_new_tokens=4", "rollout.adaptive.init_threshold=1.0"]
SAMPLED = [*SMALL_BATCH, "rollout.max_new_tokens=4", "rollout.share=1.0"]
# Recipe -> its models' family, ranks, and the overrides that make it small ({student}: its folder).
STAND_INS = {
    "amid_gpt2_dolly": ("gpt2", 1, ADAPTIVE),
    "amid_adaptive": ("gpt2", 1, ADAPTIVE),
    "distillm_gpt2_dolly": ("gpt2", 1, ADAPTIVE),
    "gkd": ("gpt2", 1, SAMPLED),
    "csd": ("gpt2", 1, SMALL_BATCH),
    "distillm2": ("llama", 1, [*SMALL_BATCH, "student.lora.rank=4"]),
    "llm_neo": ("llama", 1, [*SMALL_BATCH, "student.lora.rank=4"]),
    "eopd": ("llama", 1, SAMPLED),
    "veto": ("llama", 1, SAMPLED),
    "opd_sampled": ("llama", 1, [*SAMPLED, "student.lora.rank=4"]),
    "pretrain": ("llama", 2, ["tensor_parallel=2", "train.global_batch_size=2"]),
    "mean_teacher": ("llama", 2, ["train.global_batch_size=2"]),
    "grown_vocabulary": ("llama", 1, SMALL_BATCH),
    "cached": ("llama", 1, SMALL_BATCH),
    "study": ("llama", 1, SMALL_BATCH),
    "delta_kd": ("llama", 1, [*SMALL_BATCH, "teacher.delta.base.model={student}"]),
}
ON_DOLLY = ["amid_gpt2_dolly", "amid_adaptive", "distillm_gpt2_dolly", "gkd", "csd"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Few rows of text: each evaluation reads all of them."""
    return write_texts(tmp_path_factory.mktemp("recipes") / "texts.jsonl", rows=20)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> Path:
    """Instructions in the columns of the published sets."""
    rows = [{"instruction": "the river", "input": "",
             "output": "sings over the stone " * (1 + number % 3)}
            for number in range(8)]
    return write_jsonl(tmp_path_factory.mktemp("recipes") / "instructions.jsonl", rows)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    """Conversations of two turns."""
    rows = [{"messages": [{"role": "user", "content": "the river"},
                          {"role": "assistant", "content": "sings slowly " * (1 + number % 3)}]}
            for number in range(8)]
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
def test_a_recipe_is_parsed_planned_and_runs_two_steps(shared_model, chat_models, texts,
                                                       instructions, conversations, tmp_path,
                                                       capsys, name):
    family, ranks, smaller = STAND_INS[name]
    recipe = load_recipe(find_recipe(name))
    source = recipe.data.train[0]
    data = (texts if source.is_text else instructions if source.template else conversations)
    student, teacher = (chat_models if source.messages
                        else [shared_model(family, 0), shared_model(family, 1)])
    sets = [f"data.train.{i}" for i in range(len(recipe.data.train))] + ["data.eval.0"]
    if recipe.live_teacher is not None and recipe.live_teacher.vocabulary == "grown":
        student = with_a_new_token(teacher, tmp_path / "grown")
    overrides = [f"student.model={student}",
                 *(f"{rows}.path={data}" for rows in sets), f"data.prepared={tmp_path / 'data'}",
                 "data.workers=0", "train.epochs=null", "train.steps=2", "train.seq_length=96",
                 "train.warmup_steps=0", "train.eval_every=2", "train.log_every=1",
                 f"output_dir={tmp_path / 'run'}",
                 *(each.format(student=student) for each in smaller)]
    live = f"teacher={{model: {teacher}}}"
    if recipe.cached_teacher is not None:
        run_ranks(ranks, "cache", find_recipe(name), *overrides, live, "--topk", 8, "--out",
                  tmp_path / "cache")
        overrides.append(f"teacher.cached={tmp_path / 'cache'}")
    elif recipe.live_teacher is not None:
        overrides.append(f"teacher.model={teacher}")
    if recipe.data.auxiliary is not None:
        overrides.append(f"data.auxiliary.path={texts}")
    if recipe.data.eval[0].generate is not None:
        overrides += ["data.eval.0.generate.max_new_tokens=4", "data.eval.0.generate.rows=2"]
    assert main(["plan", str(find_recipe(name)), "--ranks-per-node", str(ranks), "--json",
                 *overrides]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    run_ranks(ranks, "train", find_recipe(name), *overrides)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    # What is estimated from one token has either sign.
    sampled = recipe.rollout is not None and recipe.rollout.estimator == "sampled"
    # A running mean begins as the student.
    learnt = lines if recipe.live_teacher is not None else lines[1:]
    assert sampled or all(line["kd_loss"] > 0 for line in learnt)
    assert recipe.rollout is None or all(line["rollout"] for line in lines)
    assert all(key in line for key in recipe.train.statistics for line in lines)
    file = "config.json" if recipe.student.lora is None else "adapter_config.json"
    assert (tmp_path / "run" / "model" / file).exists()
    assert recipe.checkpoint.best is None or (tmp_path / "run" / "best" / "config.json").exists()


def with_a_new_token(model: Path, out: Path) -> Path:
    """A copy of the model with the token "the river"."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["the river"])
    copy = AutoModelForCausalLM.from_pretrained(model)
    copy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for saved in (copy, tokenizer):
        saved.save_pretrained(out)
    return out


def test_a_packaged_chain_is_checked_as_it_stands_but_for_its_models(shared_model, texts, tmp_path,
                                                                     monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "teacher_assistants"]) == 0
    assert main(["recipes", "copy", "pretrain"]) == 0
    for number, name in enumerate(("teacher", "medium", "small", "tiny")):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).symlink_to(shared_model("llama", number % 2))
    rows = [f"{key}.path={texts}" for key in ("data.train.0", "data.eval.0")]
    chain = plan_chain("teacher_assistants.yaml", [*rows, "train.seq_length=96"], 8)
    assert [link.recipe.live_teacher.model for link in chain.links] == [
        "models/teacher", "runs/assistants/medium/model", "runs/assistants/small/model"]


def variants() -> list[list[str]]:
    """The lines of the README's table: a recipe's file and its overrides."""
    text = (RECIPES_FOLDER / "README.md").read_text(encoding="utf-8")
    return [shlex.split(line) for line in re.findall(r"`(\w+\.yaml .*?)` \|", text)]


def test_every_line_of_the_variants_is_a_recipe_whose_objective_exists():
    assert len(variants()) > 10
    for file, *overrides in variants():
        assert_has_an_objective(load_recipe(find_recipe(file.removesuffix(".yaml")), overrides))


def assert_has_an_objective(recipe: Recipe) -> None:
    """At the first and the last step, for rows of every origin."""
    for loss in recipe.losses:
        for step in (0, 99):
            objective_at(loss, step, 100)


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


def objectives_of(name: str, step: int = 0) -> StepObjectives:
    """What the packaged recipe learns from at `step` of 100."""
    recipe = load_recipe(find_recipe(name), ["train.epochs=null", "train.steps=100"])
    return objectives_at(recipe, step)


def models() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student's logits, with a gradient; teacher's logits; q; p), peaked tokens and flat ones."""
    logits = torch.randn(2, 12, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student, teacher = logits * torch.linspace(0.2, 5, 12, dtype=torch.float64)[:, None]
    student.requires_grad_()
    return student, teacher, student.softmax(-1), teacher.softmax(-1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a ‖ b), of each token."""
    return (a * (a / b).log()).sum(-1)


def assert_learns(amid: AMiD, truth: Tensor, student: Tensor, teacher: Tensor) -> None:
    """The objective is `truth`, in value and gradient."""
    value = amid_loss(student, teacher, amid)
    torch.testing.assert_close(value, truth)
    gradient, = torch.autograd.grad(truth.sum(), student, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), student)[0], gradient)


def test_the_gkd_recipes_loss_is_its_scripts():
    """0.9 KL(student ‖ m) + 0.1 KL(teacher ‖ m), m = 0.1 teacher + 0.9 student."""
    student, teacher, q, p = models()
    m = 0.1 * p + 0.9 * q
    assert_learns(objectives_of("gkd").base.amid, 0.9 * kl(q, m) + 0.1 * kl(p, m), student, teacher)


def test_distillm2s_two_texts_have_their_own_losses():
    """Skew KL of the teacher's; of the student's skew reverse KL, q in the mixture a number."""
    student, teacher, q, p = models()
    objectives = objectives_of("distillm2")
    assert_learns(objectives.by_source[0].amid, kl(p, 0.1 * p + 0.9 * q), student, teacher)
    assert_learns(objectives.by_source[1].amid, kl(q, 0.9 * p + 0.1 * q.detach()), student, teacher)
    recipe = load_recipe(find_recipe("distillm2"))
    assert recipe.loss.normalise == "sequence"
    # A pair's two losses are added up, and the mean is over pairs.
    assert [each.kd_weight for each in objectives.by_source.values()] == [2.0, 2.0]


def test_eopd_adds_forward_kl_where_the_teacher_is_unsure():
    student, teacher, q, p = models()
    unsure = -(p * p.log()).sum(-1) >= 0.8
    assert unsure.any() and not unsure.all()
    assert_learns(objectives_of("eopd").sampled.amid, kl(q, p) + unsure * kl(p, q), student,
                  teacher)


def test_csds_gradient_is_its_scripts():
    """q (D - Σ q D), D the residual of the logits."""
    student, teacher, q, _ = models()
    objective = objectives_of("csd").base
    residual, q = (student - teacher).detach(), q.detach()
    centred = residual - (q * residual).sum(-1, keepdim=True)
    loss = objective.kd_weight * amid_loss(student, teacher, objective.amid).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], q * centred)


@pytest.mark.parametrize(("step", "beta"), [(0, 0.8), (99, 0.0)])
def test_vetos_target_is_p_times_a_power_of_q_that_goes_to_0(step, beta):
    student, teacher, q, p = models()
    target = (p * q.detach()**beta) / (p * q.detach()**beta).sum(-1, keepdim=True)
    assert_learns(objectives_of("veto", step).sampled.amid, kl(target, q), student, teacher)


def test_amid_adaptives_alpha_rises_with_the_overlap_of_the_two():
    student, teacher, q, p = models()
    alpha = -5 + 6 * torch.minimum(p, q).sum(-1, keepdim=True).detach()
    c = (1 - alpha) / 2
    r = (0.1 * p**c + 0.9 * q**c)**(1 / c)
    r = r / r.sum(-1, keepdim=True)
    x, y = 0.2, 0.7
    mixed = p**x * r**y - x / (x + y) * p**(x + y) - y / (x + y) * r**(x + y)
    assert_learns(objectives_of("amid_adaptive").base.amid, -mixed.sum(-1) / (x * y), student,
                  teacher)


def test_opd_sampleds_gradient_is_a_policy_gradient_whose_mean_is_reverse_kls():
    """Of each label y that the student may sample: (log q(y) - log p(y)) ∇log q(y)."""
    student, teacher, q, p = models()
    amid, gradients = objectives_of("opd_sampled").sampled.amid, []
    head, ones = torch.eye(17, dtype=torch.float64), torch.ones(12)
    for label in range(17):
        loss = linear_amid_loss(student, head, teacher, head, amid, token_weights=ones,
                                labels=torch.full((12,), label)).loss
        advantage = (q / p).log()[..., label].detach()
        truth, = torch.autograd.grad((advantage * q.log()[..., label]).sum(), student,
                                     retain_graph=True)
        gradients.append(torch.autograd.grad(loss, student)[0])
        torch.testing.assert_close(gradients[-1], truth)
    mean = sum(q[..., [label]] * each for label, each in enumerate(gradients))
    exact, = torch.autograd.grad(kl(q, p).sum(), student)
    torch.testing.assert_close(mean.detach(), exact)


def on_dolly() -> list[Recipe]:
    """The recipes for Dolly, and their variants."""
    lines = [[f"{name}.yaml"] for name in ON_DOLLY] + variants()
    return [load_recipe(find_recipe(name), overrides) for file, *overrides in lines
            if (name := file.removesuffix(".yaml")) in ON_DOLLY]


def test_a_run_on_dolly_is_evaluated_each_epoch_and_its_rate_ends_at_1e_7():
    for recipe in on_dolly():
        # Dolly's rows that are not held out, as their code reads them.
        an_epoch = 11_435 // recipe.train.global_batch_size
        is_large = "760M" in recipe.student.model or "openllama" in recipe.student.model
        assert recipe.train.epochs == (10 if is_large else 20)
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
