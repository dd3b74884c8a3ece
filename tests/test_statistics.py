"""`train.statistics`: what metrics.jsonl says of both distributions, against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from support.data import split_documents
from support.ranks import run_ranks
from support.runs import read_metrics, write_recipe
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.config.parse import load_recipe
from amid_ds.config.recipe import Statistic
from amid_ds.data import Batch, PreparedLoader
from amid_ds.losses import AMiD
from amid_ds.models.distiller import Distiller, LossPart, StepObjective

NAMES = list(get_args(Statistic))
# At the first the teacher does not run.
STEPS, BATCH = 2, 6
WEIGHT = {"pieces": [{"steps": [0, 1], "value": 0.0}, {"steps": [1, 2], "value": 1.0}]}
TEMPERATURE = {"student": 2.0, "teacher": 1.5}
LAYOUTS = {"one rank": (1, ()), "two ranks": (2, ()),
           "tp 2": (2, ("tensor_parallel=2", "train.micro_batch_size=3"))}


def of_tokens(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    """[n, statistics] of teacher and student probabilities [n, V] and labels [n]."""
    found = {"teacher_entropy": -(p * p.log()).sum(-1), "student_entropy": -(q * q.log()).sum(-1),
             "divergence": (p * (p / q).log()).sum(-1), "overlap": torch.minimum(p, q).sum(-1),
             "label_probability": p.gather(1, labels[:, None])[:, 0],
             "agreement": (p.argmax(-1) == q.argmax(-1)).double()}
    return torch.stack([found[name] for name in NAMES], -1)


@torch.no_grad()
def by_hand(student: Path, teacher: Path, prepared: Path, by_sequence: bool) -> list[list[float]]:
    """Each step's statistics; the student never moves."""
    models = [AutoModelForCausalLM.from_pretrained(path).double() for path in (teacher, student)]
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    loader = PreparedLoader(prepared, seed=0, global_batch_size=BATCH, micro_batch_size=1,
                            dp_rank=0, dp_size=1, workers=0)
    lines = []
    for step in range(1, STEPS):
        sequences = []
        for batch in loader.window(step):
            for ids, labels in split_documents(batch):
                keep = labels != -100
                p, q = ((model(ids).logits[0, keep, :vocabulary] / TEMPERATURE[side]).softmax(-1)
                        for side, model in zip(("teacher", "student"), models, strict=True))
                sequences.append(of_tokens(p, q, labels[keep]))
        means = torch.stack([own.mean(0) for own in sequences if len(own)])
        lines.append((means if by_sequence else torch.cat(sequences)).mean(0).tolist())
    return lines


@pytest.fixture(scope="module")
def recipe(shared_model, instructions_file, tmp_path_factory) -> Path:
    """Of a student that does not move, on rows of unequal masks, in more micro-batches than one."""
    folder = tmp_path_factory.mktemp("statistics")
    return write_recipe(
        folder / "r.yaml", shared_model("llama"), shared_model("gpt2", 1), instructions_file,
        folder / "run", data__prepared=str(folder / "data"), train__statistics=NAMES,
        train__steps=STEPS, train__learning_rate=1e-30, train__global_batch_size=BATCH,
        train__seq_length=40, loss__temperature=TEMPERATURE, loss__kd_weight=WEIGHT)


@pytest.mark.parametrize("layout", ["two ranks", *(pytest.param(name, marks=pytest.mark.slow)
                                                   for name in ("one rank", "tp 2"))])
@pytest.mark.parametrize("normalise", [
    "tokens", pytest.param("sequence", marks=pytest.mark.slow)])
def test_statistics_are_means_over_the_global_batchs_tokens_on_any_ranks(layout, normalise, recipe,
                                                                         shared_model, tmp_path):
    ranks, overrides = LAYOUTS[layout]
    run_ranks(ranks, "train", recipe, f"output_dir={tmp_path / 'run'}",
              f"loss.normalise={normalise}", *overrides)
    truth = by_hand(shared_model("llama"), shared_model("gpt2", 1),
                    load_recipe(recipe).prepared_dir, normalise == "sequence")
    first, *others = read_metrics(tmp_path / "run")
    assert [first[name] for name in NAMES] == [None] * len(NAMES)
    for line, expected in zip(others, truth, strict=True):
        assert [line[name] for name in NAMES] == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_without_a_teacher_the_students_entropy_is_there_alone(shared_model):
    student = AutoModelForCausalLM.from_pretrained(shared_model("llama"))
    distiller = Distiller(student, None, vocab_size=30)
    ids = torch.arange(8)[None] + 3
    batch = Batch(ids, ids.roll(-1, 1), None, 0, [], [])
    parts = [LossPart(StepObjective(AMiD(temperature=2.0), 0.0, 1.0, tuple(NAMES)))]
    weights = torch.linspace(0.1, 1, 8)
    found = distiller(ids, batch.valid, batch.targets, weights, None, parts=parts).statistics
    q = student(ids).logits[0, :, :30].double().softmax(-1)
    entropy = (weights * -(q * q.log()).sum(-1)).sum().item()
    expected = [entropy if name == "student_entropy" else 0.0 for name in NAMES]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_run_with_statistics_learns_what_one_without_them_does_and_ranks_agree(recipe, tmp_path):
    for name, ranks, statistics in (("with", 1, NAMES), ("two", 2, NAMES), ("without", 1, [])):
        run_ranks(ranks, "train", recipe, f"output_dir={tmp_path / name}",
                  "train.learning_rate=3e-3", f"train.statistics=[{', '.join(statistics)}]")
    lines, of_two, plain = (read_metrics(tmp_path / name) for name in ("with", "two", "without"))
    for line, other, without in zip(lines, of_two, plain, strict=True):
        assert line["loss"] == without["loss"] and not set(NAMES) & without.keys()
        if line["overlap"] is not None:
            assert [other[name] for name in NAMES] == pytest.approx(
                [line[name] for name in NAMES], rel=1e-6)
