"""The auxiliary corpus: its cross entropy is added with a coefficient, and exact over a resume."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from support.data import split_documents
from support.ranks import run_ranks
from support.reference_loop import reference_adamw
from support.runs import comparable_metrics, write_recipe
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_ds.data import PreparedLoader

WEIGHT, STEPS = 0.7, 4
TRAIN = {"steps": STEPS, "seq_length": 24, "micro_batch_size": 1, "global_batch_size": 4,
         "learning_rate": 3e-3, "schedule": "constant"}


def reference_metrics(student: Path, teacher: Path, prepared: Path) -> list[dict]:
    """Each step's metrics: skewed KL on the instructions + WEIGHT · cross entropy on the text.

    Each is a mean over its own tokens.
    """
    model, guide = (AutoModelForCausalLM.from_pretrained(path) for path in (student, teacher))
    vocabulary = len(AutoTokenizer.from_pretrained(student))
    optimizer = reference_adamw(model, {})
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    rows, text = (PreparedLoader(folder, seed=0, global_batch_size=4, micro_batch_size=1, dp_rank=0,
                           dp_size=1, workers=0)
                  for folder in (prepared, prepared / "auxiliary"))
    lines = []
    for step in range(STEPS):
        kd, ce = [], []
        for ids, labels in itertools.chain.from_iterable(map(split_documents, rows.window(step))):
            keep = labels != -100
            log_q, log_p = (m(ids).logits[0, keep, :vocabulary].log_softmax(-1)
                            for m in (model, guide))
            log_r = torch.log(0.3 * log_p.exp() + 0.7 * log_q.exp())
            kd.append((log_p.exp() * (log_p - log_r)).sum(-1))
        for batch in text.window(step):
            logits = model(batch.input_ids).logits[0, :, :vocabulary]
            ce.append(F.cross_entropy(logits, batch.labels[0],
                                      reduction="none")[batch.labels[0] != -100])
        kd, ce = torch.cat(kd).mean(), torch.cat(ce).mean()
        optimizer.zero_grad()
        (kd + WEIGHT * ce).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lines.append({"loss": (kd + WEIGHT * ce).item(), "kd_loss": kd.item(),
                      "auxiliary_loss": ce.item(),
                      "grad_norm": norm.item()})
    return lines


def test_its_cross_entropy_is_added_with_the_coefficient_and_goes_on_where_it_was(
        shared_model, text_file, instructions_file, tmp_path):
    student, teacher = shared_model("llama-tied", 0), shared_model("gpt2", 1)
    text = {"path": str(text_file), "weight": WEIGHT}
    recipe = write_recipe(
        tmp_path / "r.yaml", student, teacher, instructions_file, tmp_path / "run",
        data__auxiliary=text, data__prepared=str(tmp_path / "data"), checkpoint__every=2,
        train=TRAIN,
        loss={"alpha": -1.0, "lam": 0.3, "ce_weight": 0.0})
    # Two micro-batches of each corpus on either rank.
    run_ranks(2, "train", recipe)
    whole = comparable_metrics(tmp_path / "run")
    truth = reference_metrics(student, teacher, tmp_path / "data")
    for line, expected in zip(whole, truth, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=2e-4), (line["step"], name)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    assert "resumed after step 2" in run_ranks(2, "train", recipe).output()
    assert comparable_metrics(tmp_path / "run") == whole
