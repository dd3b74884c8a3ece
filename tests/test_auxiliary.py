"""The auxiliary corpus: its cross entropy added with a coefficient, whatever the layout, exact over a resume."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import small
import torch
import yaml
from test_train import comparable
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.data import StepData

WEIGHT, STEPS = 0.7, 4


def plain_loop(student: Path, teacher: Path, prepared: Path) -> list[dict]:
    """The skewed KL on the instructions plus WEIGHT times cross entropy on the text, each over its own tokens."""
    model, guide = (AutoModelForCausalLM.from_pretrained(path) for path in (student, teacher))
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rows, text = (StepData(folder, seed=0, global_batch_size=4, micro_batch_size=1, dp_rank=0, dp_size=1, workers=0)
                  for folder in (prepared, prepared / "auxiliary"))
    lines = []
    for step in range(STEPS):
        kd, ce = [], []
        for ids, labels in itertools.chain.from_iterable(map(small.documents, rows.window(step))):
            keep = labels != -100
            log_q, log_p = (m(ids).logits[0, keep, :vocabulary].log_softmax(-1) for m in (model, guide))
            log_r = torch.log(0.3 * log_p.exp() + 0.7 * log_q.exp())
            kd.append((log_p.exp() * (log_p - log_r)).sum(-1))
        for batch in text.window(step):
            logits = model(batch.input_ids).logits[0, :, :vocabulary]
            ce.append(F.cross_entropy(logits, batch.labels[0], reduction="none")[batch.labels[0] != -100])
        kd, ce = torch.cat(kd).mean(), torch.cat(ce).mean()
        optimizer.zero_grad()
        (kd + WEIGHT * ce).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lines.append({"loss": (kd + WEIGHT * ce).item(), "kd_loss": kd.item(), "auxiliary_loss": ce.item(),
                      "grad_norm": norm.item()})
    return lines


def test_its_cross_entropy_is_added_with_the_coefficient_and_goes_on_where_it_was(tmp_path):
    student = small.make_model(tmp_path / "student", "llama-tied", 0)
    teacher = small.make_model(tmp_path / "teacher", "gpt2", 1)
    text = {"path": str(small.make_text(tmp_path / "text.jsonl")), "weight": WEIGHT}
    recipe = small.make_recipe(
        tmp_path / "r.yaml", student, teacher, small.make_instructions(tmp_path / "rows.jsonl"), tmp_path / "run",
        data__auxiliary=text, data__prepared=str(tmp_path / "data"), checkpoint__every=2,
        train={**yaml.safe_load(TRAIN), "steps": STEPS}, loss={"alpha": -1.0, "lam": 0.3, "ce_weight": 0.0})
    small.run(2, "train", recipe)      # two micro-batches of each corpus on either rank
    whole = comparable(tmp_path / "run")
    truth = plain_loop(student, teacher, tmp_path / "data")
    for line, expected in zip(whole, truth, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=2e-4), (line["step"], name)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    assert "resumed after step 2" in small.run(2, "train", recipe).text()
    assert comparable(tmp_path / "run") == whole


TRAIN = """{seq_length: 24, micro_batch_size: 1, global_batch_size: 4, learning_rate: 3.0e-3, schedule: constant}"""
