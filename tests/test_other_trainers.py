"""The loss in other trainers: the very code of losses/README.md, under transformers and TRL."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from amid_ds import AMiD, preset
from amid_ds.losses.reference import naive_loss

VOCABULARY, LEARNING_RATE = 31, 0.5
SETTINGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2,
            "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "optim": "sgd",
            "weight_decay": 0.0, "max_grad_norm": 0.0, "logging_steps": 1, "report_to": "none",
            "save_strategy": "no", "use_cpu": True, "remove_unused_columns": False,
            "disable_tqdm": True}


def documented(number: int) -> dict[str, object]:
    """What the first `number` blocks of the section define."""
    text = (ROOT / "amid_ds" / "losses" / "README.md").read_text()
    section = text.partition("## In other trainers")[2].partition("\n## ")[0]
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.S)[:number]:
        exec(block, names)
    return names


def make_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Padded rows of 12 ids, of which the prompt's and the padding's are not learnt."""
    rows, random = [], torch.Generator().manual_seed(0)
    for index in range(count):
        ids = torch.randint(3, VOCABULARY, (12,), generator=random)
        mask = (torch.arange(12) < 12 - index % 4).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(12) < 1 + 2 * (index % 3)), -100)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    # One that teaches nothing.
    rows[1]["labels"] = torch.full((12,), -100)
    return rows


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def models(pair: tuple[Path, Path], dtype: torch.dtype) -> list[torch.nn.Module]:
    return [AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval() for path in pair]


def plain_training(pair: tuple[Path, Path], objective: AMiD, rows: list[dict[str, torch.Tensor]],
                   steps: int = 2, per_step: int = 4) -> tuple[list[float], dict]:
    """Losses and weights of SGD in float64: each step's mean over the tokens of its rows."""
    student, teacher = models(pair, torch.float64)
    losses = []
    for step in range(steps):
        batch = stacked(rows[step * per_step:(step + 1) * per_step])
        asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
        learnt = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            taught = teacher(**asked).logits[:, :-1][learnt]
        loss = naive_loss(student(**asked).logits[:, :-1][learnt], taught, objective).mean()
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= LEARNING_RATE * parameter.grad
        losses.append(loss.item())
    return losses, student.state_dict()


def logged(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


class InOrder:
    """A Trainer that reads its rows in their order."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trained(pair, objective, folder: Path, **changes):
    """The documented Trainer after two steps of four rows."""
    student, teacher = models(pair, torch.float32)
    of_document = documented(1)["AMiDTrainer"]
    trainer = type("Ordered", (InOrder, of_document), {})(
        student, TrainingArguments(str(folder), **{**SETTINGS, **changes}),
        train_dataset=make_rows(8), data_collator=stacked, teacher=teacher, objective=objective)
    trainer.train()
    return trainer


def test_transformers_trainer_with_this_loss_is_a_plain_loop_in_float64(llama_pair, tmp_path):
    objective = AMiD(alpha=-3.0, lam=0.3, order="qr")
    trainer = trained(llama_pair, objective, tmp_path)
    losses, weights = plain_training(llama_pair, objective, make_rows(8))
    assert logged(trainer) == pytest.approx(losses, abs=1e-4)
    moved = 0.0
    before = models(llama_pair, torch.float64)[0].state_dict()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight.double(), weights[name], rtol=0, atol=1e-6)
        moved = max(moved, float((weights[name] - before[name]).abs().max()))
    assert moved > 1e-3
    assert trainer.evaluate(make_rows(4))["eval_loss"] > 0


@pytest.mark.slow
def test_under_autocast_it_is_the_same_up_to_bf16(llama_pair, tmp_path):
    objective = preset("gkd", beta=0.3)
    trainer = trained(llama_pair, objective, tmp_path, bf16=True)
    losses, _ = plain_training(llama_pair, objective, make_rows(8))
    assert logged(trainer) == pytest.approx(losses, rel=0.03)


@pytest.mark.slow
def test_two_devices_under_ddp_are_one_of_twice_the_batch(llama_pair, tmp_path):
    """One device accumulates four micro-batches of what each of two takes two of."""
    script = tmp_path / "ddp.py"
    script.write_text(f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
import test_other_trainers as tests
from amid_ds import preset

pair = [Path(path) for path in {[str(path) for path in llama_pair]!r}]
trainer = tests.trained(pair, preset("gkd", beta=0.3), Path({str(tmp_path)!r}),
                        per_device_train_batch_size=1, ddp_backend="gloo")
assert trainer.accelerator.num_processes == 2
if trainer.is_world_process_zero():
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    torch.save((tests.logged(trainer), weights), {str(tmp_path / "result.pt")!r})
""")
    subprocess.run([str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2",
                    "--standalone", str(script)], check=True, cwd=tmp_path,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    losses, weights = torch.load(tmp_path / "result.pt")
    expected, plain = plain_training(llama_pair, preset("gkd", beta=0.3), make_rows(8))
    assert losses == pytest.approx(expected, abs=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.double(), plain[name], rtol=0, atol=1e-6)


def gkd_trainer(pair, folder: Path, name: str = "FusedGKDTrainer", rows=None, **changes):
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig

    student, teacher = models(pair, torch.float32)
    arguments = {**SETTINGS, "lmbda": 0.0, "bf16": False, **changes}
    return type("Ordered", (InOrder, documented(2)[name]), {})(
        student, teacher, GKDConfig(str(folder), **arguments), data_collator=stacked,
        train_dataset=Dataset.from_list(rows or make_rows(8)),
        processing_class=AutoTokenizer.from_pretrained(pair[0]))


def loss_and_gradients(trainer, compute, **count) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = compute(trainer.model, stacked(make_rows(4)), **count)
    loss.backward()
    return loss.item(), {name: parameter.grad.clone()
                         for name, parameter in trainer.model.named_parameters()}


def test_trls_trainer_with_this_loss_has_the_losses_and_gradients_of_its_own(llama_pair, tmp_path):
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer

    trainer = gkd_trainer(llama_pair, tmp_path)
    for beta, count in itertools.product((0.0, 0.1, 0.5, 0.9, 1.0),
                                         ({}, {"num_items_in_batch": torch.tensor(37)})):
        ends = {0.0: preset("fkl"), 1.0: preset("rkl")}
        trainer.beta, trainer.objective = beta, ends.get(beta) or preset("gkd", beta=beta)
        ours = loss_and_gradients(trainer, trainer.compute_loss, **count)
        theirs = loss_and_gradients(
            trainer, lambda *args, **kw: GKDTrainer.compute_loss(trainer, *args, **kw), **count)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and theirs[0] > 0.01
        for name, gradient in theirs[1].items():
            torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_trls_trainer_trains_the_same_with_either_loss_and_on_its_own_words(
        llama_pair, tmp_path, beta):
    ours, theirs = (gkd_trainer(llama_pair, tmp_path, name, beta=beta)
                    for name in ("FusedGKDTrainer", "GKDTrainer"))
    for trainer in (ours, theirs):
        trainer.train()
    assert logged(ours) == pytest.approx(logged(theirs), rel=1e-4)
    for name, weight in ours.model.state_dict().items():
        torch.testing.assert_close(weight, theirs.model.state_dict()[name], rtol=0, atol=1e-5)
    # Another objective, on the student's own words.
    rows = [{**row, "prompts": row["input_ids"][:4], "prompt_attention_mask": torch.ones(4).long()}
            for row in make_rows(8)]
    free = gkd_trainer(llama_pair, tmp_path, rows=rows, lmbda=1.0, max_new_tokens=5)
    free.objective = AMiD(alpha=-5.0, lam=0.1)
    free.train()
    assert all(loss > 0 for loss in logged(free))
